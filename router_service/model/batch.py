"""What one forward pass works on. Built by the engine from the scheduler's output.

Shapes: T tokens of the batch, B sequences, M blocks of the longest table, R rows sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """One micro-batch. The tokens of a sequence are adjacent and in order; all on one device.

    A sequence contributes its scheduled tokens: one in decode, a chunk in prefill. The KV of its
    earlier tokens is already in the blocks of its table.
    """

    token_ids: torch.Tensor
    """int64 [T]."""
    positions: torch.Tensor
    """int64 [T], position in the sequence, from 0."""
    slot_mapping: torch.Tensor
    """int64 [T]: block_id * block_size + offset, where the token's KV is written."""
    query_start: tuple[int, ...]
    """B + 1 offsets into T; sequence b has tokens query_start[b] : query_start[b + 1]."""
    context_lens: tuple[int, ...]
    """B lengths including this step's tokens."""
    block_tables: torch.Tensor
    """int64 [B, M], padded with 0."""
    sample_rows: torch.Tensor
    """int64 [R]: rows of T whose logits are wanted (last token of sequences that sample)."""

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens)
