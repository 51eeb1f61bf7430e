"""Attention of one micro-batch over the paged KV cache.

An `AttentionPlan` is made once per step and used by all layers. It sorts the sequences into decode
groups (one query each, computed together over padded copies of their keys) and prefill chunks
(one sequence each). Key j is visible to query i of the same sequence if j <= i and, with a sliding
window, i - j < sliding_window; keys that no query of a chunk sees are not read.

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

from router_service.batch import ForwardBatch
from router_service.kv_cache import KVCache

_MAX_PADDING_TOKENS = 256
_MAX_GROUP_TOKENS = 1 << 15


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
class PrefillChunk:
    """Adjacent queries of one sequence, the rows start:stop of T."""

    start: int
    stop: int
    head_rows: Tensor
    """int64 [K * L]."""
    mask: Tensor | None
    """[Q, L], 0 or -inf; None if plainly causal over the chunk itself."""

    def attend(self, layer: int, queries: Tensor, kv_cache: KVCache, output: Tensor) -> None:
        queries = queries[self.start : self.stop]
        num_queries, num_heads, head_dim = queries.shape
        num_kv_heads = kv_cache.num_kv_heads
        num_groups = num_heads // num_kv_heads
        keys, values = (
            rows.view(num_kv_heads, 1, -1, head_dim).expand(-1, num_groups, -1, -1)
            for rows in kv_cache.gather(layer, self.head_rows)
        )
        result = F.scaled_dot_product_attention(
            queries.view(num_queries, num_kv_heads, num_groups, head_dim).permute(1, 2, 0, 3),
            keys,
            values,
            attn_mask=self.mask,
            is_causal=self.mask is None,
        )
        target = output[self.start : self.stop].view(num_queries, num_kv_heads, num_groups, -1)
        target.copy_(result.permute(2, 0, 1, 3))


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """What all layers of one step share."""

    slot_mapping: Tensor
    parts: tuple[DecodeGroup | PrefillChunk, ...]

    @staticmethod
    def build(
        batch: ForwardBatch, kv_cache: KVCache, *, sliding_window: int | None, dtype: torch.dtype
    ) -> AttentionPlan:
        builder = _PlanBuilder(batch, kv_cache, sliding_window, dtype)
        return AttentionPlan(slot_mapping=batch.slot_mapping, parts=tuple(builder.parts()))

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, kv_cache: KVCache
    ) -> Tensor:
        """Queries [T, H, D], keys and values [T, K, D], rotated -> [T, H, D].

        Writes the keys and values into the cache first.
        """
        kv_cache.write(layer, self.slot_mapping, keys, values)
        output = queries.new_empty(queries.shape)
        for part in self.parts:
            part.attend(layer, queries, kv_cache, output)
        return output


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
        return [
            *(self._decode_group(seqs, num_keys) for seqs in group_by_length(num_keys)),
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
        num_keys = self._num_keys(seq, stop - start)
        slots = self._slots([seq], [num_keys], num_keys)
        window = self._sliding_window
        mask = None
        if num_keys > stop - start or (window is not None and num_keys > window):
            keys = torch.arange(num_keys, device=self._device)
            queries = keys[num_keys - (stop - start) :, None]
            hidden = keys > queries
            if window is not None:
                hidden |= queries - keys >= window
            mask = self._additive(hidden)
        return PrefillChunk(
            start=start, stop=stop, head_rows=self._kv_cache.head_rows(slots), mask=mask
        )

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


def group_by_length(num_keys: dict[int, int]) -> list[list[int]]:
    """Sort sequences (id -> number of keys) into groups of about the same length.

    Longest first; a group is closed when its padding would exceed 256 keys, about what one more
    kernel call costs, or its padded copy 32 768 keys. Ids within a group ascend.
    """
    groups: list[list[int]] = []
    longest = padding = 0
    for seq in sorted(num_keys, key=lambda seq: (-num_keys[seq], seq)):
        padding += longest - num_keys[seq]
        is_full = groups and (len(groups[-1]) + 1) * longest > _MAX_GROUP_TOKENS
        if not groups or is_full or padding > _MAX_PADDING_TOKENS:
            groups.append([])
            longest, padding = num_keys[seq], 0
        groups[-1].append(seq)
    return [sorted(group) for group in groups]
