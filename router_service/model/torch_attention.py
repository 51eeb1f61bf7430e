"""Attention by torch, where there is no native kernel: on CUDA, in float16, on other processors.

A `TorchAttentionPlan` sorts the sequences into decode groups (one query each, computed together
over padded copies of their keys) and prefill chunks (one sequence each). Keys that no query of a
chunk sees are not read. Rounding depends on how long a group's longest sequence is and on how a
prompt is cut into chunks.

Shapes: T tokens, H query heads, K key-value heads, G = H / K, D head_dim, B sequences of a group,
Q queries of a chunk, L keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from router_service.model.batch import ForwardBatch
from router_service.model.kv_cache import KVCache
from router_service.model.rotary import Rotation

_MAX_PADDING = 256
# On a CPU copies are read again while they are in its cache; elsewhere few launches count.
_GROUP_BYTES = {"cpu": 1 << 20}
_OTHER_GROUP_BYTES = 1 << 28
_QUERIES_AT_ONCE = {"cpu": 64}
_OTHER_QUERIES_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """Sequences with one query each and about as many visible keys."""

    query_rows: Tensor | None
    """int64 [B] rows of T; None if they are all of T in order."""
    head_rows: Tensor
    """int64 [B * K * L], see `KVCache.head_rows`; short sequences repeat their last key."""
    mask: Tensor | None
    """[B, 1, 1, L], 0 or -inf; None if nothing is padded."""

    def attend(self, layer: int, queries: Tensor, kv_cache: KVCache, output: Tensor) -> None:
        if self.query_rows is not None:
            queries = queries.index_select(0, self.query_rows)
        num_seqs, num_heads, head_dim = queries.shape
        num_kv_heads = kv_cache.num_kv_heads
        keys, values = kv_cache.gather(layer, self.head_rows)
        result = F.scaled_dot_product_attention(
            queries.reshape(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim),
            keys.view(num_seqs, num_kv_heads, -1, head_dim),
            values.view(num_seqs, num_kv_heads, -1, head_dim),
            attn_mask=self.mask,
        ).reshape(num_seqs, num_heads, head_dim)
        if self.query_rows is None:
            output.copy_(result)
        else:
            output.index_copy_(0, self.query_rows, result)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuerySlice:
    """Some queries of a chunk, the rows `queries` of T, with the chunk's `keys` that they see."""

    queries: slice
    keys: slice
    mask: Tensor
    """[Q, L] of the slice, 0 or -inf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """Adjacent queries of one sequence, in slices that skip most of the keys they do not see."""

    head_rows: Tensor
    """int64 [K * L] of all keys of the chunk."""
    slices: tuple[QuerySlice, ...]

    def attend(self, layer: int, queries: Tensor, kv_cache: KVCache, output: Tensor) -> None:
        _, num_heads, head_dim = queries.shape
        num_kv_heads = kv_cache.num_kv_heads
        grouped = (-1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        # A head's group shares its keys by a stride of 0; nothing is repeated in memory.
        keys, values = (
            rows.view(num_kv_heads, 1, -1, head_dim).expand(-1, grouped[2], -1, -1)
            for rows in kv_cache.gather(layer, self.head_rows)
        )
        for part in self.slices:
            result = F.scaled_dot_product_attention(
                queries[part.queries].view(grouped).permute(1, 2, 0, 3),
                keys[:, :, part.keys],
                values[:, :, part.keys],
                attn_mask=part.mask,
            )
            output[part.queries].view(grouped).copy_(result.permute(2, 0, 1, 3))


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchAttentionPlan:
    """An `AttentionPlan`; what all layers of one step share."""

    positions: Tensor
    slot_mapping: Tensor
    rotation: Rotation
    parts: tuple[DecodeGroup | PrefillChunk, ...]

    @staticmethod
    def build(
        batch: ForwardBatch, kv_cache: KVCache, *, sliding_window: int | None, rotation: Rotation
    ) -> TorchAttentionPlan:
        builder = _PlanBuilder(batch, kv_cache, sliding_window, rotation.cos.dtype)
        return TorchAttentionPlan(
            positions=batch.positions,
            slot_mapping=batch.slot_mapping,
            rotation=rotation,
            parts=tuple(builder.parts()),
        )

    def attend(self, layer: int, qkv: Tensor, kv_cache: KVCache) -> Tensor:
        heads = qkv.view(len(qkv), -1, kv_cache.head_dim)
        num_heads = heads.shape[1] - 2 * kv_cache.num_kv_heads
        qk, values = heads.tensor_split([num_heads + kv_cache.num_kv_heads], dim=1)
        rotated = self.rotation.apply(qk, self.positions)
        queries, keys = rotated.tensor_split([num_heads], dim=1)
        kv_cache.write(layer, self.slot_mapping, keys, values)
        output = queries.new_empty(queries.shape)
        for part in self.parts:
            part.attend(layer, queries, kv_cache, output)
        return output.view(len(qkv), -1)


class _PlanBuilder:
    def __init__(
        self,
        batch: ForwardBatch,
        kv_cache: KVCache,
        sliding_window: int | None,
        dtype: torch.dtype,
    ) -> None:
        self._batch = batch
        self._kv_cache = kv_cache
        self._sliding_window = sliding_window
        self._dtype = dtype
        self._device = batch.token_ids.device

    def parts(self) -> list[DecodeGroup | PrefillChunk]:
        num_queries = [stop - start for start, stop in pairwise(self._batch.query_start)]
        decodes = [seq for seq, count in enumerate(num_queries) if count == 1]
        num_keys = {seq: self._num_keys(seq, 1) for seq in decodes}
        max_bytes = _GROUP_BYTES.get(self._device.type, _OTHER_GROUP_BYTES)
        groups = group_by_length(num_keys, max_keys=max_bytes // self._kv_cache.layer_token_bytes)
        return [
            *(self._decode_group(seqs, num_keys) for seqs in groups),
            *(self._prefill_chunk(seq) for seq, count in enumerate(num_queries) if count > 1),
        ]

    def _num_keys(self, seq: int, num_queries: int) -> int:
        """Keys that at least one of the sequence's queries sees; they are its last ones."""
        context_len = self._batch.context_lens[seq]
        if self._sliding_window is None:
            return context_len
        return min(context_len, self._sliding_window + num_queries - 1)

    def _decode_group(self, seqs: Sequence[int], num_keys: dict[int, int]) -> DecodeGroup:
        longest = max(num_keys[seq] for seq in seqs)
        slots = self._slots(seqs, [num_keys[seq] for seq in seqs], longest)
        mask = None
        if any(num_keys[seq] < longest for seq in seqs):
            lengths = torch.tensor([num_keys[seq] for seq in seqs], device=self._device)
            padding = torch.arange(longest, device=self._device) >= lengths[:, None]
            mask = self._additive(padding)[:, None, None, :]
        rows = [self._batch.query_start[seq] for seq in seqs]
        is_whole = rows == list(range(self._batch.num_tokens))
        return DecodeGroup(
            query_rows=None if is_whole else torch.tensor(rows, device=self._device),
            head_rows=self._kv_cache.head_rows(slots),
            mask=mask,
        )

    def _prefill_chunk(self, seq: int) -> PrefillChunk:
        start, stop = self._batch.query_start[seq], self._batch.query_start[seq + 1]
        num_queries, num_keys = stop - start, self._num_keys(seq, stop - start)
        mask = self._causal_mask(num_queries, num_keys)
        width = _QUERIES_AT_ONCE.get(self._device.type, _OTHER_QUERIES_AT_ONCE)
        slices = []
        for first in range(0, num_queries, width):
            last = min(first + width, num_queries)
            end = num_keys - num_queries + last
            begin = 0
            if self._sliding_window is not None:
                begin = max(0, end - (last - first) - self._sliding_window + 1)
            slices.append(
                QuerySlice(
                    queries=slice(start + first, start + last),
                    keys=slice(begin, end),
                    mask=mask[first:last, begin:end],
                )
            )
        slots = self._slots([seq], [num_keys], num_keys)
        return PrefillChunk(head_rows=self._kv_cache.head_rows(slots), slices=tuple(slices))

    def _causal_mask(self, num_queries: int, num_keys: int) -> Tensor:
        """[Q, L]; the queries are the last of the keys."""
        keys = torch.arange(num_keys, device=self._device)
        distances = keys[num_keys - num_queries :, None] - keys
        hidden = distances < 0
        if self._sliding_window is not None:
            hidden |= distances >= self._sliding_window
        return self._additive(hidden)

    def _slots(self, seqs: Sequence[int], num_keys: Sequence[int], longest: int) -> Tensor:
        """int64 [B, longest]: slots of each sequence's last keys, the last repeated as padding."""
        context_lens = [self._batch.context_lens[seq] for seq in seqs]
        first = torch.tensor(
            [length - count for length, count in zip(context_lens, num_keys, strict=True)]
        )
        last = torch.tensor(context_lens) - 1
        positions = first[:, None] + torch.arange(longest)
        positions = torch.minimum(positions, last[:, None]).to(self._device)
        tables = self._batch.block_tables
        if list(seqs) != list(range(self._batch.num_seqs)):
            tables = tables.index_select(0, torch.tensor(seqs, device=self._device))
        block_size = self._kv_cache.block_size
        block_ids = tables.gather(1, positions // block_size)
        return block_ids * block_size + positions % block_size

    def _additive(self, hidden: Tensor) -> Tensor:
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(hidden, float("-inf"))


def group_by_length(num_keys: dict[int, int], *, max_keys: int) -> list[list[int]]:
    """Sort sequences (id -> number of keys) into groups of about the same length.

    Longest first; a group is closed when its padding would exceed 256 keys, about what one more
    kernel call costs, or its padded copy `max_keys`. Ids within a group ascend.
    """
    groups: list[list[int]] = []
    longest = padding = 0
    for seq in sorted(num_keys, key=lambda seq: (-num_keys[seq], seq)):
        padding += longest - num_keys[seq]
        is_full = bool(groups) and (len(groups[-1]) + 1) * longest > max_keys
        if not groups or is_full or padding > _MAX_PADDING:
            groups.append([])
            longest, padding = num_keys[seq], 0
        groups[-1].append(seq)
    return [sorted(group) for group in groups]
