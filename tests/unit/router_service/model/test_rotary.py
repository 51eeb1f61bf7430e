from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralRotaryEmbedding,
    apply_rotary_pos_emb,
)

from router_service.model.rotary import RotaryTable
from services.core.kernels.attention import NativeAttention
from services.core.kernels.library import Isa, native_library
from tests.support.forward import TINY_CONFIG

CPU = torch.device("cpu")


def rotate_as_transformers(heads: Tensor, positions: Tensor, rope_theta: float) -> Tensor:
    config = MixtralConfig(
        hidden_size=32,
        num_attention_heads=4,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
    )
    cos, sin = MixtralRotaryEmbedding(config)(heads, positions[None])
    rotated, _ = apply_rotary_pos_emb(heads[None], heads[None], cos, sin, unsqueeze_dim=2)
    result: Tensor = rotated[0]
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope_theta", [10000.0, 1e6])
def test_rotation_equals_that_of_transformers(dtype: torch.dtype, rope_theta: float) -> None:
    table = RotaryTable(replace(TINY_CONFIG, rope_theta=rope_theta), dtype=dtype, device=CPU)
    positions = torch.tensor([0, 1, 2, 300, 31999, 5])
    heads = torch.randn(6, 3, 8).to(dtype)
    rotated = table.rotation(32000).apply(heads, positions)
    assert torch.equal(rotated, rotate_as_transformers(heads, positions, rope_theta))


@pytest.mark.skipif(native_library() is None, reason="kernels are not built")
@pytest.mark.parametrize("isa", [Isa.AMX, Isa.AVX2, Isa.PORTABLE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 24, 64, 128])
def test_the_native_rotation_has_the_bits_of_torchs_and_fills_the_tokens_slots(
    isa: Isa, dtype: torch.dtype, head_dim: int
) -> None:
    library = native_library()
    assert library is not None
    num_heads, num_kv_heads = 6, 2
    config = replace(TINY_CONFIG, head_dim=head_dim)
    rotation = RotaryTable(config, dtype=dtype, device=CPU).rotation(500)
    positions = torch.tensor([7, 8, 9, 499, 0])
    slots = torch.tensor([3, 11, 4, 0, 9])
    qkv = torch.randn(5, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    rotated = rotation.apply(qkv[:, : num_heads + num_kv_heads], positions)
    expected = torch.cat([rotated, qkv[:, num_heads + num_kv_heads :]], dim=1)
    attention = NativeAttention(
        library,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=4,
        sliding_window=None,
        positions=positions,
        slot_mapping=slots,
        query_start=(0, 3, 4, 5),
        context_lens=(10, 500, 1),
        block_tables=torch.zeros(3, 125, dtype=torch.int64),
        cos=rotation.cos,
        sin=rotation.sin,
    )
    keys, values = torch.zeros(2, 12, num_kv_heads, head_dim, dtype=dtype)
    library.limit_isa(isa)
    try:
        attention.rotate_and_store(qkv, keys, values)
    finally:
        library.limit_isa(Isa.AMX)
    assert torch.equal(qkv, expected)
    assert torch.equal(keys[slots], expected[:, num_heads : num_heads + num_kv_heads])
    assert torch.equal(values[slots], expected[:, num_heads + num_kv_heads :])
    assert keys.count_nonzero() == expected[:, num_heads : num_heads + num_kv_heads].count_nonzero()


def test_a_rotation_does_not_depend_on_how_far_the_table_has_grown() -> None:
    short = RotaryTable(TINY_CONFIG, dtype=torch.float32, device=CPU)
    grown = RotaryTable(TINY_CONFIG, dtype=torch.float32, device=CPU)
    assert len(grown.rotation(9001).cos) >= 9001
    expected = short.rotation(256)
    got = grown.rotation(256)
    assert torch.equal(got.cos[:256], expected.cos)
    assert torch.equal(got.sin[:256], expected.sin)


def test_products_of_rotated_vectors_depend_on_the_distance_alone() -> None:
    table = RotaryTable(TINY_CONFIG, dtype=torch.float32, device=CPU)
    query, key = torch.randn(2, 1, 1, 8)

    def product(query_position: int, key_position: int) -> float:
        rotation = table.rotation(200)
        rotated_query = rotation.apply(query, torch.tensor([query_position]))
        rotated_key = rotation.apply(key, torch.tensor([key_position]))
        return float((rotated_query * rotated_key).sum())

    assert product(17, 5) == pytest.approx(product(112, 100), abs=1e-4)
    assert product(17, 5) != pytest.approx(product(17, 6), abs=1e-3)
