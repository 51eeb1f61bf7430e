"""Which rows go to which worker, and how what comes back becomes the layer's output. Pure.

Sums are arranged so that the result has the same bits whoever computes which expert: a worker
answers with rows already rounded to the activation dtype, and sums start from zeros. For K <= 2 a
token's at most two rows are added in any order (addition is commutative), so workers may add their
own; for K > 2 every row comes back and the rows of a token are added in ascending expert id.

Index work is done in numpy, which at a few dozen elements is several times cheaper than torch.

Shapes: T tokens, K experts per token, E experts, A = T x K assignments, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """What one worker computes: the rows `token_ids` [t], and assignments over these t rows.

    `places` [a] are those of `GatedTokens`, None where there are none.
    """

    worker: int
    token_ids: Tensor
    assignments: Assignments
    places: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchPlan:
    """One frame per worker that has anything to do; `token_ids` are those of all, one by one."""

    frames: tuple[PlannedFrame, ...]
    token_ids: Tensor

    def select(self, hidden_states: Tensor) -> Sequence[Tensor]:
        """[T, H] -> the rows [t, H] of each frame."""
        if len(self.frames) == 1 and len(self.token_ids) == len(hidden_states):
            return [hidden_states]  # token ids ascend, so these are all tokens in order
        rows = hidden_states.index_select(0, self.token_ids)
        return torch.split_with_sizes(rows, [len(frame.token_ids) for frame in self.frames])


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


def plan_dispatch(gated: GatedTokens, worker_of_expert: NDArray[np.int64]) -> DispatchPlan:
    """Send every assignment to the worker of its expert, every token once to each worker.

    `worker_of_expert` [E]; assignments of an expert whose worker is negative are left out.
    """
    rows_per_expert = gated.rows_per_expert.tolist()
    experts_of = _experts_by_worker(worker_of_expert.tolist(), rows_per_expert)
    # Index work is done for all workers at once: assignments sorted by worker, then by expert.
    worker_of_assignment = worker_of_expert[gated.expert_ids]
    order = np.argsort(worker_of_assignment, kind="stable")
    order = order[np.count_nonzero(worker_of_assignment < 0) :]
    workers, tokens = worker_of_assignment[order], gated.token_rows[order]
    is_sent = np.zeros((max(experts_of, default=0) + 1, gated.num_tokens), dtype=np.bool_)
    is_sent[workers, tokens] = True
    token_ids = is_sent.nonzero()[1]
    token_rows = (is_sent.cumsum(axis=1) - 1)[workers, tokens]
    topk_weights = gated.topk_weights[order]
    places = None if gated.places is None else gated.places[order]

    frames = []
    first, first_token = 0, 0
    for worker, num_tokens in enumerate(is_sent.sum(axis=1).tolist()):
        if num_tokens == 0:
            continue
        counts = tuple([rows_per_expert[expert] for expert in experts_of[worker]])
        own = slice(first, first + sum(counts))
        frames.append(
            PlannedFrame(
                worker=worker,
                token_ids=torch.from_numpy(token_ids[first_token : first_token + num_tokens]),
                assignments=Assignments(
                    expert_ids=tuple(experts_of[worker]),
                    rows_per_expert=counts,
                    token_rows=torch.from_numpy(token_rows[own]),
                    topk_weights=torch.from_numpy(topk_weights[own]),
                ),
                places=None if places is None else torch.from_numpy(places[own]),
            )
        )
        first, first_token = own.stop, first_token + num_tokens
    return DispatchPlan(frames=tuple(frames), token_ids=torch.from_numpy(token_ids))


def frame_bytes(num_tokens: int, *, top_k: int, row_bytes: int) -> int:
    """A bound on a frame of so many tokens, and on its answer. `row_bytes` is H x itemsize."""
    rows_per_token = 1 if top_k <= MAX_COMBINED_TOP_K else top_k
    return num_tokens * (rows_per_token * row_bytes + 8 * top_k) + _FRAME_OVERHEAD_BYTES


def rows_that_fit(max_frame_bytes: int, *, top_k: int, row_bytes: int) -> int:
    """The inverse of `frame_bytes`; at least 1."""
    per_token = frame_bytes(1, top_k=top_k, row_bytes=row_bytes) - _FRAME_OVERHEAD_BYTES
    return max(1, (max_frame_bytes - _FRAME_OVERHEAD_BYTES) // per_token)


def split_frame(
    frame: PlannedFrame, rows: Tensor, max_rows: int
) -> Iterator[tuple[PlannedFrame, Tensor]]:
    """The frame and its rows [t, H] in pieces of consecutive rows, at most `max_rows` each."""
    expert_of = np.repeat(frame.assignments.expert_ids, frame.assignments.rows_per_expert)
    token_rows = frame.assignments.token_rows.numpy()
    for start in range(0, len(rows), max_rows):
        own = np.flatnonzero((token_rows >= start) & (token_rows < start + max_rows))
        expert_ids, counts = np.unique(expert_of[own], return_counts=True)
        assignments = Assignments(
            expert_ids=tuple(expert_ids.tolist()),
            rows_per_expert=tuple(counts.tolist()),
            token_rows=torch.from_numpy(token_rows[own] - start),
            topk_weights=frame.assignments.topk_weights[own],
        )
        piece = PlannedFrame(
            worker=frame.worker,
            token_ids=frame.token_ids[start : start + max_rows],
            assignments=assignments,
            places=None if frame.places is None else frame.places[own],
        )
        yield piece, rows[start : start + max_rows]


def combine_frames(gated: GatedTokens, answers: Sequence[tuple[PlannedFrame, Tensor]]) -> Tensor:
    """The layer's output [T, H] from the frames that cover all assignments, in any order.

    An answer is [t, H] where `gated.combine`, else [a, H].
    """
    first = answers[0][1]
    if gated.combine and len(answers) == 1 and len(first) == gated.num_tokens:
        return first
    output = first.new_zeros((gated.num_tokens, first.shape[1]))
    if gated.combine:
        for frame, rows in answers:
            output.index_add_(0, frame.token_ids, rows)
        return output
    by_place = first.new_empty((gated.num_tokens * gated.top_k, first.shape[1]))
    for frame, rows in answers:
        assert frame.places is not None
        by_place.index_copy_(0, frame.places, rows)
    by_rank = by_place.view(gated.num_tokens, gated.top_k, -1)
    for rank in range(gated.top_k):
        output.add_(by_rank[:, rank])
    return output


def _experts_by_worker(
    worker_of_expert: list[int], rows_per_expert: list[int]
) -> dict[int, list[int]]:
    """The experts with assignments and a worker, ascending, by worker."""
    experts: dict[int, list[int]] = {}
    pairs = zip(worker_of_expert, rows_per_expert, strict=True)
    for expert, (worker, num_rows) in enumerate(pairs):
        if num_rows and worker >= 0:
            experts.setdefault(worker, []).append(expert)
    return experts
