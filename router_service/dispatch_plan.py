"""Which rows go to which worker, and how what comes back becomes the layer's output. Pure.

Sums are arranged so that the result has the same bits whoever computes which expert: a worker
answers with rows already rounded to the activation dtype, and sums start from zeros. For K <= 2 a
token's at most two rows are added in any order (addition is commutative), so workers may add their
own; for K > 2 every row comes back and the rows of a token are added in ascending expert id.

Index work is done in numpy, which at a few dozen elements is several times cheaper than torch.

Shapes: T tokens, K experts per token, E experts, A = T x K assignments, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.core.expert_ffn import Assignments

MAX_COMBINED_TOP_K = 2
"""Up to this many experts per token, workers sum what is theirs of a token."""
_FRAME_OVERHEAD_BYTES = 4096
"""More than a frame has beside rows, weights and row numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedTokens:
    """A layer call's assignments in ascending expert id, within it ascending token."""

    num_tokens: int
    top_k: int
    rows_per_expert: NDArray[np.int64]
    """[E]."""
    expert_ids: NDArray[np.int64]
    """[A], ascending."""
    token_rows: NDArray[np.int64]
    """[A]."""
    topk_weights: NDArray[np.float32]
    """[A]."""
    places: NDArray[np.int64] | None
    """[A]: token * K + how many of the token's experts have a lower id: the row's place in the
    order of summing. None where `combine`, which needs no order."""

    @property
    def combine(self) -> bool:
        """Whether whoever computes also sums, per token, what it computed."""
        return self.top_k <= MAX_COMBINED_TOP_K


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFrame:
    """What one worker computes: `token_ids` [t] of the T tokens, and assignments over those t rows.

    `token_ids` is None where the frame has all tokens. `places` [a] are those of `GatedTokens`.
    """

    worker: int
    token_ids: Tensor | None
    assignments: Assignments
    places: Tensor | None

    def select(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> the frame's rows [t, H]."""
        if self.token_ids is None:
            return hidden_states
        return hidden_states.index_select(0, self.token_ids)


def group_by_expert(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> GatedTokens:
    """From the gate's int64 [T, K] and float32 [T, K], on the CPU."""
    num_tokens, top_k = topk_ids.shape
    ids: NDArray[np.int64] = topk_ids.numpy()
    flat_ids = ids.reshape(-1)
    order = np.argsort(flat_ids, kind="stable")
    token_rows = order // top_k
    places = None
    if top_k > MAX_COMBINED_TOP_K:
        ranks = np.argsort(np.argsort(ids, axis=1), axis=1).reshape(-1)[order]
        places = token_rows * top_k + ranks
    return GatedTokens(
        num_tokens=num_tokens,
        top_k=top_k,
        rows_per_expert=np.bincount(flat_ids, minlength=num_experts),
        expert_ids=flat_ids[order],
        token_rows=token_rows,
        topk_weights=topk_weights.numpy().reshape(-1)[order],
        places=places,
    )


def all_assignments(gated: GatedTokens) -> Assignments:
    """Everything in one piece, for who holds all experts."""
    expert_ids = np.flatnonzero(gated.rows_per_expert)
    return Assignments(
        expert_ids=tuple(expert_ids.tolist()),
        rows_per_expert=tuple(gated.rows_per_expert[expert_ids].tolist()),
        token_rows=torch.from_numpy(gated.token_rows),
        topk_weights=torch.from_numpy(gated.topk_weights),
    )


def plan_frames(
    gated: GatedTokens, worker_of_expert: NDArray[np.int64]
) -> tuple[PlannedFrame, ...]:
    """One frame per worker that has anything to do.

    `worker_of_expert` [E]; assignments of an expert whose worker is negative are left out.
    """
    used = np.flatnonzero((gated.rows_per_expert > 0) & (worker_of_expert >= 0))
    workers = np.unique(worker_of_expert[used])
    if len(workers) == 1 and len(used) == np.count_nonzero(gated.rows_per_expert):
        return (_frame(gated, int(workers[0]), slice(None)),)
    worker_of_assignment = worker_of_expert[gated.expert_ids]
    return tuple(
        _frame(gated, int(worker), np.flatnonzero(worker_of_assignment == worker))
        for worker in workers
    )


def frame_bytes(num_tokens: int, *, top_k: int, row_bytes: int) -> int:
    """A bound on a frame of so many tokens, and on its answer. `row_bytes` is H x itemsize."""
    rows_per_token = 1 if top_k <= MAX_COMBINED_TOP_K else top_k
    return num_tokens * (rows_per_token * row_bytes + 8 * top_k) + _FRAME_OVERHEAD_BYTES


def rows_that_fit(max_frame_bytes: int, *, top_k: int, row_bytes: int) -> int:
    """The inverse of `frame_bytes`; at least 1."""
    per_token = frame_bytes(1, top_k=top_k, row_bytes=row_bytes) - _FRAME_OVERHEAD_BYTES
    return max(1, (max_frame_bytes - _FRAME_OVERHEAD_BYTES) // per_token)


def split_frame(frame: PlannedFrame, num_tokens: int, max_rows: int) -> tuple[PlannedFrame, ...]:
    """The frame in pieces of consecutive tokens, each of at most `max_rows` of its rows."""
    token_ids = frame.token_ids if frame.token_ids is not None else torch.arange(num_tokens)
    expert_of = np.repeat(frame.assignments.expert_ids, frame.assignments.rows_per_expert)
    rows = frame.assignments.token_rows.numpy()
    pieces = []
    for start in range(0, len(token_ids), max_rows):
        own = np.flatnonzero((rows >= start) & (rows < start + max_rows))
        expert_ids, counts = np.unique(expert_of[own], return_counts=True)
        assignments = Assignments(
            expert_ids=tuple(expert_ids.tolist()),
            rows_per_expert=tuple(counts.tolist()),
            token_rows=torch.from_numpy(rows[own] - start),
            topk_weights=frame.assignments.topk_weights[own],
        )
        pieces.append(
            PlannedFrame(
                worker=frame.worker,
                token_ids=token_ids[start : start + max_rows],
                assignments=assignments,
                places=None if frame.places is None else frame.places[own],
            )
        )
    return tuple(pieces)


def combine_frames(gated: GatedTokens, answers: Iterable[tuple[PlannedFrame, Tensor]]) -> Tensor:
    """The layer's output [T, H] from the frames that cover all assignments, in any order.

    An answer is [t, H] where `gated.combine`, else [a, H].
    """
    pairs = list(answers)
    if gated.combine:
        return _add_combined(gated, pairs)
    return _add_in_expert_order(gated, pairs)


def _add_combined(gated: GatedTokens, pairs: list[tuple[PlannedFrame, Tensor]]) -> Tensor:
    first_frame, first = pairs[0]
    if len(pairs) == 1 and first_frame.token_ids is None:
        return first
    output = first.new_zeros((gated.num_tokens, first.shape[1]))
    for frame, rows in pairs:
        if frame.token_ids is None:
            output.add_(rows)
        else:
            output.index_add_(0, frame.token_ids, rows)
    return output


def _add_in_expert_order(gated: GatedTokens, pairs: list[tuple[PlannedFrame, Tensor]]) -> Tensor:
    hidden_size = pairs[0][1].shape[1]
    rows = pairs[0][1].new_empty((gated.num_tokens * gated.top_k, hidden_size))
    for frame, answer in pairs:
        assert frame.places is not None
        rows.index_copy_(0, frame.places, answer)
    by_rank = rows.view(gated.num_tokens, gated.top_k, hidden_size)
    output = rows.new_zeros((gated.num_tokens, hidden_size))
    for rank in range(gated.top_k):
        output.add_(by_rank[:, rank])
    return output


def _frame(gated: GatedTokens, worker: int, own: NDArray[np.int64] | slice) -> PlannedFrame:
    """The frame of the assignments `own`, which are all those of some experts."""
    token_rows, expert_ids = gated.token_rows[own], gated.expert_ids[own]
    present = np.zeros(gated.num_tokens, dtype=np.bool_)
    present[token_rows] = True
    row_of_token = np.cumsum(present) - 1
    has_all = bool(row_of_token[-1] == gated.num_tokens - 1)
    rows_per_expert = np.bincount(expert_ids)
    held = np.flatnonzero(rows_per_expert)
    assignments = Assignments(
        expert_ids=tuple(held.tolist()),
        rows_per_expert=tuple(rows_per_expert[held].tolist()),
        token_rows=torch.from_numpy(row_of_token[token_rows]),
        topk_weights=torch.from_numpy(gated.topk_weights[own]),
    )
    return PlannedFrame(
        worker=worker,
        token_ids=None if has_all else torch.from_numpy(np.flatnonzero(present)),
        assignments=assignments,
        places=None if gated.places is None else torch.from_numpy(gated.places[own]),
    )
