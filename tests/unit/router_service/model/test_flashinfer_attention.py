"""What a paged kernel library is told, with a plain implementation of it in its place."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from router_service.model.batch import ForwardBatch
from router_service.model.flashinfer_attention import (
    FlashInferAttention,
    PageTable,
    flashinfer_for,
)
from router_service.model.kv_cache import KVCache
from router_service.model.rotary import RotaryTable
from router_service.model.torch_attention import TorchAttentionPlan
from tests.support.checkpoints import fresh_seed
from tests.support.forward import TINY_CONFIG

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS = 4, 64
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 8
SEQUENCES = ((7, 1), (12, 5), (1, 1), (8, 8), (17, 1))
"""(tokens in all, tokens of this step): decodes, whole prompts and a later chunk."""


class PlainLibrary:
    """Paged attention as FlashInfer documents it, key by key from the page table in float64."""

    def __init__(self) -> None:
        self.wrappers: list[PlainWrapper] = []

    def BatchPrefillWithPagedKVCacheWrapper(  # noqa: N802 - the library's name
        self, workspace: Tensor, layout: str
    ) -> PlainWrapper:
        assert workspace.dtype == torch.uint8
        assert layout == "NHD"
        self.wrappers.append(PlainWrapper())
        return self.wrappers[-1]


class PlainWrapper:
    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        window_left: int,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert causal
        assert q_data_type == kv_data_type
        assert (num_qo_heads, num_kv_heads, head_dim_qk) == (NUM_HEADS, NUM_KV_HEADS, HEAD_DIM)
        tables = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(table.dtype == torch.int32 for table in tables)
        self._queries, self._pages, self._ids, self._last = (table.tolist() for table in tables)
        self._page_size, self._window_left = page_size, window_left

    def run(self, queries: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        output = torch.empty_like(queries)
        for seq, (start, stop) in enumerate(pairwise(self._queries)):
            pages = self._ids[self._pages[seq] : self._pages[seq + 1]]
            length = (len(pages) - 1) * self._page_size + self._last[seq]
            keys, values = (part[pages].flatten(0, 1)[:length].double() for part in cache)
            for row in range(start, stop):
                position = length - (stop - row)
                first = 0 if self._window_left < 0 else max(0, position - self._window_left)
                for head in range(NUM_HEADS):
                    own = head // (NUM_HEADS // NUM_KV_HEADS)
                    seen = slice(first, position + 1)
                    scores = keys[seen, own] @ queries[row, head].double() / HEAD_DIM**0.5
                    output[row, head] = scores.softmax(0) @ values[seen, own]
        return output


def _scene(sequences: Sequence[tuple[int, int]]) -> tuple[ForwardBatch, KVCache]:
    """A batch over blocks in scrambled order; what no sequence owns is NaN."""
    cache = KVCache(
        TINY_CONFIG, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU
    )
    cache.tensor.fill_(float("nan"))
    free = list(range(1, NUM_BLOCKS))
    random.shuffle(free)
    tables = [[free.pop() for _ in range(-(-length // BLOCK_SIZE))] for length, _ in sequences]
    width = max(map(len, tables))
    slots = []
    for table, (length, count) in zip(tables, sequences, strict=True):
        own = [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(length)]
        for layer in range(TINY_CONFIG.num_hidden_layers):
            shape = (length - count, NUM_KV_HEADS, HEAD_DIM)
            cache.write(
                layer, torch.tensor(own[: length - count], dtype=torch.int64),
                torch.randn(shape), torch.randn(shape),
            )  # fmt: skip
        slots += own[length - count :]
    counts = [count for _, count in sequences]
    return ForwardBatch(
        token_ids=torch.zeros(sum(counts), dtype=torch.int64),
        positions=torch.cat([torch.arange(length - count, length) for length, count in sequences]),
        slot_mapping=torch.tensor(slots),
        query_start=(0, *accumulate(counts)),
        context_lens=tuple(length for length, _ in sequences),
        block_tables=torch.tensor([table + [0] * (width - len(table)) for table in tables]),
        sample_rows=torch.tensor([], dtype=torch.int64),
    ), cache


@pytest.mark.parametrize("sliding_window", [None, 3])
def test_a_paged_library_gives_what_torch_gives(sliding_window: int | None) -> None:
    seed = fresh_seed()
    torch.manual_seed(seed)
    random.seed(seed)
    batch, cache = _scene(SEQUENCES)
    other_cache = _copy_of(cache)
    rotation = RotaryTable(TINY_CONFIG, dtype=torch.float32, device=CPU).rotation(32)
    paged = FlashInferAttention(PlainLibrary(), CPU).plan(
        batch, cache, num_heads=NUM_HEADS, sliding_window=sliding_window, rotation=rotation
    )
    plain = TorchAttentionPlan.build(
        batch, other_cache, sliding_window=sliding_window, rotation=rotation
    )
    for layer in range(TINY_CONFIG.num_hidden_layers):
        qkv = torch.randn(batch.num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
        torch.testing.assert_close(
            paged.attend(layer, qkv.clone(), cache),
            plain.attend(layer, qkv.clone(), other_cache),
            rtol=1e-4,
            atol=1e-5,
        )


def test_the_page_table_lists_used_blocks_only() -> None:
    batch, _ = _scene(((8, 8), (5, 1)))
    pages = PageTable.of(batch, BLOCK_SIZE)
    assert pages.page_start.tolist() == [0, 2, 4]
    assert pages.page_ids.tolist() == batch.block_tables.flatten().tolist()
    assert pages.last_page_len.tolist() == [4, 1]
    assert pages.query_start.tolist() == [0, 8, 9]


def test_steps_under_way_have_wrappers_of_their_own_and_leave_them_behind() -> None:
    library = PlainLibrary()
    kernel = FlashInferAttention(library, CPU)
    batch, cache = _scene(((5, 1),))
    options: dict[str, Any] = {
        "num_heads": NUM_HEADS,
        "sliding_window": None,
        "rotation": RotaryTable(TINY_CONFIG, dtype=torch.float32, device=CPU).rotation(8),
    }
    first, second = (kernel.plan(batch, cache, **options) for _ in range(2))
    assert len(library.wrappers) == 2
    del first, second
    gc.collect()
    kernel.plan(batch, cache, **options)
    assert len(library.wrappers) == 2


def test_a_cpu_is_not_served() -> None:
    assert flashinfer_for(torch.bfloat16, CPU) is None


def _copy_of(cache: KVCache) -> KVCache:
    copy = KVCache(
        TINY_CONFIG, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU
    )
    copy.tensor.copy_(cache.tensor)
    return copy
