from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from router_service.model.kv_cache import KVCache
from services.core.errors import ConfigurationError
from tests.support.forward import TINY_CONFIG


def make_cache(dtype: torch.dtype = torch.float32, num_blocks: int = 5) -> KVCache:
    device = torch.device("cpu")
    return KVCache(TINY_CONFIG, num_blocks=num_blocks, block_size=4, dtype=dtype, device=device)


def test_what_is_written_to_slots_is_gathered_from_them_head_by_head() -> None:
    cache = make_cache()
    slots = torch.tensor([17, 3, 8, 0])
    keys, values = torch.randn(2, 4, 2, 8)
    cache.write(1, slots, keys, values)
    rows = cache.head_rows(torch.tensor([[3, 0], [8, 17]]))
    got_keys, got_values = (rows.view(2, 2, 2, 8) for rows in cache.gather(1, rows))
    for sequence, tokens in enumerate([(1, 3), (2, 0)]):
        for place, token in enumerate(tokens):
            assert torch.equal(got_keys[sequence, :, place], keys[token])
            assert torch.equal(got_values[sequence, :, place], values[token])


def test_a_write_touches_its_own_layer_and_slots_only() -> None:
    cache = make_cache()
    ones = torch.ones(1, 2, 8)
    cache.write(2, torch.tensor([6]), ones, ones)
    assert cache.tensor.sum() == 2 * 2 * 8
    assert cache.tensor[2, :, 1, 2].sum() == 2 * 2 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_exported_block_is_a_copy_that_another_cache_imports_bit_by_bit(
    dtype: torch.dtype,
) -> None:
    source, target = make_cache(dtype), make_cache(dtype, num_blocks=9)
    source.tensor.normal_()
    block = source.export_block(3)
    assert block.shape == (3, 2, 4, 2, 8)
    assert block.is_contiguous()
    assert block.device.type == "cpu"
    expected = block.clone()
    source.tensor.zero_()
    target.import_block(7, block)
    assert torch.equal(target.tensor[:, :, 7], expected)
    assert not target.tensor[:, :, :7].any()


def test_a_block_of_another_layout_is_refused() -> None:
    cache = make_cache()
    with pytest.raises(ValueError, match="a block is"):
        cache.import_block(0, torch.zeros(3, 2, 4, 2, 4))
    with pytest.raises(ValueError, match="float16"):
        cache.import_block(0, torch.zeros(3, 2, 4, 2, 8, dtype=torch.float16))


def test_as_many_blocks_as_fit_the_bytes_are_counted() -> None:
    block_bytes = 3 * 2 * 4 * 2 * 8 * 2
    assert KVCache.num_blocks_for(TINY_CONFIG, 10 * block_bytes, 4, torch.bfloat16) == 10
    assert KVCache.num_blocks_for(TINY_CONFIG, 10 * block_bytes - 1, 4, torch.bfloat16) == 9
    assert make_cache(torch.bfloat16, 10).tensor.nbytes == 10 * block_bytes


def test_too_few_bytes_for_a_block_name_the_setting() -> None:
    wide = replace(TINY_CONFIG, num_hidden_layers=300)
    with pytest.raises(ConfigurationError, match="kv_cache_bytes=4096") as raised:
        KVCache.num_blocks_for(wide, 4096, 16, torch.float32)
    assert raised.value.details["setting"] == "kv_cache_bytes"
