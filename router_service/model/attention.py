"""Attention of one micro-batch over the paged KV cache.

Key j is visible to query i of the same sequence if j <= i and, with a sliding window,
i - j < sliding_window.
Shapes: T tokens, H query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from router_service.model.batch import ForwardBatch
from router_service.model.kv_cache import KVCache
from router_service.model.rotary import Rotation
from router_service.model.torch_attention import TorchAttentionPlan
from services.core.kernels.attention import NativeAttention, supports_attention
from services.core.kernels.attention_part import Gated, NativeAttentionPart
from services.core.kernels.choice import native_kernels_for
from services.core.kernels.library import NativeLibrary


class AttentionPlan(Protocol):
    """Made once per step and used by all of its layers."""

    def attend(self, layer: int, qkv: Tensor, kv_cache: KVCache) -> Tensor:
        """Queries, keys and values side by side [T, (H + 2K) * D] -> [T, H * D].

        Rotates queries and keys (`qkv` may be overwritten) and writes keys and values into the
        cache first.
        """
        ...


def plan_attention(
    batch: ForwardBatch,
    kv_cache: KVCache,
    *,
    num_heads: int,
    sliding_window: int | None,
    rotation: Rotation,
) -> AttentionPlan:
    """The plan for the fastest kernels at hand; the native one copies no keys."""
    dtype, device = rotation.cos.dtype, rotation.cos.device
    library = native_kernels_for(dtype, device)
    if library is None or not supports_attention(dtype, device, kv_cache.head_dim):
        return TorchAttentionPlan.build(
            batch, kv_cache, sliding_window=sliding_window, rotation=rotation
        )
    return NativeAttentionPlan(
        library,
        batch,
        kv_cache,
        num_heads=num_heads,
        sliding_window=sliding_window,
        rotation=rotation,
    )


class NativeAttentionPlan:
    """An `AttentionPlan` whose bits for a query depend on the query and its own keys alone."""

    def __init__(
        self,
        library: NativeLibrary,
        batch: ForwardBatch,
        kv_cache: KVCache,
        *,
        num_heads: int,
        sliding_window: int | None,
        rotation: Rotation,
    ) -> None:
        self.attention = NativeAttention(
            library,
            num_heads=num_heads,
            num_kv_heads=kv_cache.num_kv_heads,
            head_dim=kv_cache.head_dim,
            block_size=kv_cache.block_size,
            sliding_window=sliding_window,
            positions=batch.positions,
            slot_mapping=batch.slot_mapping,
            query_start=batch.query_start,
            context_lens=batch.context_lens,
            block_tables=batch.block_tables,
            cos=rotation.cos,
            sin=rotation.sin,
        )

    def attend(self, layer: int, qkv: Tensor, kv_cache: KVCache) -> Tensor:
        keys, values = kv_cache.by_slot(layer)
        self.attention.rotate_and_store(qkv, keys, values)
        return self.attention.attend(qkv, keys, values)

    def attend_and_gate(
        self,
        part: NativeAttentionPart,
        layer: int,
        x: Tensor,
        update: Tensor | None,
        kv_cache: KVCache,
    ) -> tuple[Tensor, Gated | None]:
        """All of the layer that comes before its experts; see `NativeAttentionPart`."""
        return part(x, update, self.attention, *kv_cache.by_slot(layer))
