"""Paged attention by FlashInfer (https://docs.flashinfer.ai), where it is installed on a GPU.

It reads keys and values where they lie in their blocks, of any block size, for prefill and decode
in one call; torch's own kernels work on gathered copies.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import weakref
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from router_service.model.batch import ForwardBatch
from router_service.model.kv_cache import KVCache
from router_service.model.rotary import Rotation

_WORKSPACE_BYTES = 128 << 20


@functools.cache
def flashinfer_for(dtype: torch.dtype, device: torch.device) -> FlashInferAttention | None:
    """The library's kernels, None where it is not installed or does not serve dtype and device."""
    is_served = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if not is_served or importlib.util.find_spec("flashinfer") is None:
        return None
    return FlashInferAttention(importlib.import_module("flashinfer"), device)


class FlashInferAttention:
    """Plans the attention of steps, of which several may be under way at once.

    `library` is the module. A wrapper of it holds the plan of one step; the wrappers' kernels share
    one workspace, as they run in turn on one stream.
    """

    def __init__(self, library: Any, device: torch.device) -> None:
        self._library = library
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._idle: list[Any] = []

    def plan(
        self,
        batch: ForwardBatch,
        kv_cache: KVCache,
        *,
        num_heads: int,
        sliding_window: int | None,
        rotation: Rotation,
    ) -> FlashInferPlan:
        """An `AttentionPlan`; its wrapper is used again once it is dropped."""
        pages = PageTable.of(batch, kv_cache.block_size)
        wrapper = self._idle.pop() if self._idle else self._new_wrapper()
        wrapper.plan(
            pages.query_start,
            pages.page_start,
            pages.page_ids,
            pages.last_page_len,
            num_heads,
            kv_cache.num_kv_heads,
            kv_cache.head_dim,
            kv_cache.block_size,
            causal=True,
            window_left=-1 if sliding_window is None else sliding_window - 1,
            q_data_type=rotation.cos.dtype,
            kv_data_type=kv_cache.tensor.dtype,
        )
        plan = FlashInferPlan(wrapper, batch, num_heads=num_heads, rotation=rotation)
        weakref.finalize(plan, self._idle.append, wrapper)
        return plan

    def _new_wrapper(self) -> Any:
        return self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")


class FlashInferPlan:
    def __init__(
        self, wrapper: Any, batch: ForwardBatch, *, num_heads: int, rotation: Rotation
    ) -> None:
        self._wrapper = wrapper
        self._positions = batch.positions
        self._slot_mapping = batch.slot_mapping
        self._num_heads = num_heads
        self._rotation = rotation

    def attend(self, layer: int, qkv: Tensor, kv_cache: KVCache) -> Tensor:
        """Queries, keys and values side by side [T, (H + 2K) * D] -> [T, H * D]."""
        heads = qkv.view(len(qkv), -1, kv_cache.head_dim)
        qk, values = heads.tensor_split([self._num_heads + kv_cache.num_kv_heads], dim=1)
        rotated = self._rotation.apply(qk, self._positions)
        queries, keys = rotated.tensor_split([self._num_heads], dim=1)
        kv_cache.write(layer, self._slot_mapping, keys, values)
        layer_cache = kv_cache.tensor[layer]
        output: Tensor = self._wrapper.run(queries.contiguous(), (layer_cache[0], layer_cache[1]))
        return output.view(len(qkv), -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTable:
    """The blocks of B sequences one after the other, int32: `page_ids` where the block tables lie,
    the rest on the CPU. The queries of a sequence are the last of its keys."""

    query_start: Tensor
    """[B + 1] offsets into the batch's tokens."""
    page_start: Tensor
    """[B + 1] offsets into `page_ids`."""
    page_ids: Tensor
    last_page_len: Tensor
    """[B] tokens in each sequence's last block, 1 to block_size."""

    @staticmethod
    def of(batch: ForwardBatch, block_size: int) -> PageTable:
        num_pages = [-(-length // block_size) for length in batch.context_lens]
        page_start = [0, *accumulate(num_pages)]
        width = batch.block_tables.shape[1]
        places = [
            row * width + column
            for row, (first, last) in enumerate(pairwise(page_start))
            for column in range(last - first)
        ]
        where = torch.tensor(places).to(batch.block_tables.device)
        last_page_len = [
            length - (pages - 1) * block_size
            for length, pages in zip(batch.context_lens, num_pages, strict=True)
        ]
        return PageTable(
            query_start=torch.tensor(batch.query_start, dtype=torch.int32),
            page_start=torch.tensor(page_start, dtype=torch.int32),
            page_ids=batch.block_tables.flatten()[where].to(torch.int32),
            last_page_len=torch.tensor(last_page_len, dtype=torch.int32),
        )
