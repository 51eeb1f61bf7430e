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
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router_service.dispatch.replica_choice import Share
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
        return self.places is None


class PlannedFrame(NamedTuple):
    """What one worker computes: t tokens, and a assignments over their rows as the wire has them.

    A tuple, since a few are made per layer call.
    """

    worker: int
    token_ids: NDArray[np.int64]
    """[t], ascending."""
    expert_ids: tuple[int, ...]
    rows_per_expert: tuple[int, ...]
    token_rows: bytes
    """int32 [a]: rows of the frame."""
    topk_weights: bytes
    """float32 [a]."""
    places: NDArray[np.int64] | None
    """[a] of `GatedTokens.places`, None where there are none."""

    @property
    def num_assignments(self) -> int:
        return len(self.token_rows) // 4

    @property
    def assignments(self) -> Assignments:
        """The same as tensors."""
        token_rows = np.frombuffer(self.token_rows, dtype=np.int32)
        topk_weights = np.frombuffer(self.topk_weights, dtype=np.float32)
        return Assignments(
            expert_ids=self.expert_ids,
            rows_per_expert=self.rows_per_expert,
            token_rows=torch.from_numpy(token_rows.astype(np.int64)),
            topk_weights=torch.from_numpy(topk_weights.copy()),
        )


class DispatchPlan(NamedTuple):
    """One frame per worker that has anything to do, ascending; `token_ids` are those of all
    frames, one after the other."""

    frames: Sequence[PlannedFrame]
    token_ids: NDArray[np.int64]

    def select(self, rows: NDArray[Any]) -> Sequence[NDArray[Any]]:
        """[T, ...] -> the rows [t, ...] of each frame, C-contiguous."""
        if len(self.frames) == 1 and len(self.token_ids) == len(rows):
            return [rows]  # token ids ascend, so these are all tokens in order
        if len(rows) == 1:
            return [rows] * len(self.frames)
        selected = rows.take(self.token_ids, axis=0)
        parts, start = [], 0
        for frame in self.frames:
            stop = start + len(frame.token_ids)
            parts.append(selected[start:stop])
            start = stop
        return parts


def group_by_expert(
    topk_ids: Tensor, topk_weights: Tensor, num_experts: int, *, may_combine: bool = True
) -> GatedTokens:
    """From the gate's int64 [T, K] and float32 [T, K], on the CPU.

    Rows come back one by one where K is too large for workers to sum, or not `may_combine`.
    """
    num_tokens, top_k = topk_ids.shape
    ids: NDArray[np.int64] = topk_ids.numpy()
    flat_ids = ids.reshape(-1)
    order = np.argsort(flat_ids, kind="stable")
    token_rows = order // top_k
    places = None
    if top_k > MAX_COMBINED_TOP_K or not may_combine:
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


def plan_dispatch(
    gated: GatedTokens, worker_of_expert: NDArray[np.int64], shares: Sequence[Share] = ()
) -> DispatchPlan:
    """Send every assignment to the worker of its expert, every token once to each worker.

    `worker_of_expert` [E]; assignments of an expert whose worker is negative are left out. The
    rows of experts in `shares` go to several workers.
    """
    workers = worker_of_expert.tolist()
    counts = gated.rows_per_expert.tolist()
    worker_of_assignment = worker_of_expert[gated.expert_ids]
    if shares:
        _share_rows(worker_of_assignment, gated.rows_per_expert, shares)
    experts_of = _experts_by_worker(workers, counts, shares)
    tokens, weights, places = gated.token_rows, gated.topk_weights, gated.places
    if shares or not _ascends(workers):
        # Assignments sorted by worker, then by expert.
        order = np.argsort(worker_of_assignment, kind="stable")
        order = order[np.count_nonzero(worker_of_assignment < 0) :]
        worker_of_assignment, tokens, weights = (
            worker_of_assignment[order],
            tokens[order],
            weights[order],
        )
        places = None if places is None else places[order]
    # Index work is done for all workers at once, over (worker, token) pairs in one axis.
    num_tokens = gated.num_tokens
    num_workers = max(experts_of, default=-1) + 1
    pairs = worker_of_assignment * num_tokens + tokens
    is_sent = np.zeros(num_workers * num_tokens, dtype=np.bool_)
    is_sent[pairs] = True
    rows_until = is_sent.cumsum()
    token_ids = is_sent.nonzero()[0] % num_tokens
    row_stops = rows_until[num_tokens - 1 :: num_tokens]
    first_rows = np.zeros(num_workers, dtype=np.int64)
    first_rows[1:] = row_stops[:-1]
    token_rows = (rows_until[pairs] - first_rows[worker_of_assignment] - 1).astype(np.int32)
    row_bytes, weight_bytes = token_rows.tobytes(), weights.tobytes()

    frames = []
    first = first_token = 0
    for worker, stop_token in enumerate(row_stops.tolist()):
        if stop_token == first_token:
            continue
        expert_ids, rows_per_expert = experts_of[worker]
        stop = first + sum(rows_per_expert)
        frames.append(
            PlannedFrame(
                worker,
                token_ids[first_token:stop_token],
                tuple(expert_ids),
                tuple(rows_per_expert),
                row_bytes[4 * first : 4 * stop],
                weight_bytes[4 * first : 4 * stop],
                None if places is None else places[first:stop],
            )
        )
        first, first_token = stop, stop_token
    return DispatchPlan(frames, token_ids)


def gated_of_frame(frame: PlannedFrame, gated: GatedTokens) -> GatedTokens:
    """A frame's assignments as a layer call of their own, over the frame's rows; `gated` is the
    call they were planned from."""
    expert_ids = np.repeat(np.array(frame.expert_ids, dtype=np.int64), frame.rows_per_expert)
    return GatedTokens(
        num_tokens=len(frame.token_ids),
        top_k=gated.top_k,
        rows_per_expert=np.bincount(expert_ids, minlength=len(gated.rows_per_expert)),
        expert_ids=expert_ids,
        token_rows=np.frombuffer(frame.token_rows, dtype=np.int32).astype(np.int64),
        topk_weights=np.frombuffer(frame.topk_weights, dtype=np.float32),
        places=frame.places,
    )


def frame_bytes(num_tokens: int, *, top_k: int, row_bytes: int) -> int:
    """A bound on a frame of so many tokens, and on its answer. `row_bytes` is H x itemsize."""
    rows_per_token = 1 if top_k <= MAX_COMBINED_TOP_K else top_k
    return num_tokens * (rows_per_token * row_bytes + 8 * top_k) + _FRAME_OVERHEAD_BYTES


def rows_that_fit(max_frame_bytes: int, *, top_k: int, row_bytes: int) -> int:
    """The inverse of `frame_bytes`; at least 1."""
    per_token = frame_bytes(1, top_k=top_k, row_bytes=row_bytes) - _FRAME_OVERHEAD_BYTES
    return max(1, (max_frame_bytes - _FRAME_OVERHEAD_BYTES) // per_token)


def split_frame(frame: PlannedFrame, max_rows: int) -> Iterator[PlannedFrame]:
    """The frame in pieces of consecutive rows, at most `max_rows` each."""
    expert_of = np.repeat(frame.expert_ids, frame.rows_per_expert)
    token_rows = np.frombuffer(frame.token_rows, dtype=np.int32)
    topk_weights = np.frombuffer(frame.topk_weights, dtype=np.float32)
    for start in range(0, len(frame.token_ids), max_rows):
        own = np.flatnonzero((token_rows >= start) & (token_rows < start + max_rows))
        expert_ids, counts = np.unique(expert_of[own], return_counts=True)
        yield PlannedFrame(
            worker=frame.worker,
            token_ids=frame.token_ids[start : start + max_rows],
            expert_ids=tuple(expert_ids.tolist()),
            rows_per_expert=tuple(counts.tolist()),
            token_rows=(token_rows[own] - start).astype(np.int32).tobytes(),
            topk_weights=topk_weights[own].tobytes(),
            places=None if frame.places is None else frame.places[own],
        )


def combine_frames(gated: GatedTokens, frames: Sequence[PlannedFrame], rows: Tensor) -> Tensor:
    """The layer's output [T, H] from frames that cover all assignments, in any order.

    `rows` are the frames' answers, one after the other: [t, H] of each where `gated.combine`, else
    [a, H]. Assignments that no frame covers count as zeros; whoever left them out must see to it
    that the output of their tokens is not used.
    """
    num_tokens, hidden_size = gated.num_tokens, rows.shape[1]
    if gated.combine:
        if len(frames) == 1 and len(rows) == num_tokens:
            return rows
        output = rows.new_zeros((num_tokens, hidden_size))
        return output.index_add_(0, _joined([frame.token_ids for frame in frames]), rows)
    places = _joined([frame.places for frame in frames if frame.places is not None])
    num_places = num_tokens * gated.top_k
    is_whole = len(rows) == num_places
    by_place = torch.empty_like(rows) if is_whole else rows.new_zeros((num_places, hidden_size))
    by_place.index_copy_(0, places, rows)
    by_rank = by_place.view(num_tokens, gated.top_k, hidden_size)
    output = rows.new_zeros((num_tokens, hidden_size))
    for rank in range(gated.top_k):
        output.add_(by_rank[:, rank])
    return output


def _joined(parts: Sequence[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))


def _ascends(workers: list[int]) -> bool:
    """Whether experts in order are already in order of their workers, and all have one."""
    return workers[0] >= 0 and workers == sorted(workers)


def _share_rows(
    worker_of_assignment: NDArray[np.int64],
    rows_per_expert: NDArray[np.int64],
    shares: Sequence[Share],
) -> None:
    """Write the workers of shared experts' assignments, which stand in ascending expert id."""
    stops = rows_per_expert.cumsum().tolist()
    for share in shares:
        start = stops[share.expert] - sum(share.rows)
        worker_of_assignment[start : stops[share.expert]] = np.repeat(share.workers, share.rows)


def _experts_by_worker(
    worker_of_expert: list[int], rows_per_expert: list[int], shares: Sequence[Share]
) -> dict[int, tuple[list[int], list[int]]]:
    """By worker: its experts, ascending, and the rows it computes of each."""
    shared = {share.expert: share for share in shares}
    experts: dict[int, tuple[list[int], list[int]]] = {}
    pairs = zip(worker_of_expert, rows_per_expert, strict=True)
    for expert, (worker, num_rows) in enumerate(pairs):
        if not num_rows or worker < 0:
            continue
        if shared and (share := shared.get(expert)) is not None:
            parts: Sequence[tuple[int, int]] = list(zip(share.workers, share.rows, strict=True))
        else:
            parts = ((worker, num_rows),)
        for part_worker, part_rows in parts:
            if part_rows:
                expert_ids, counts = experts.setdefault(part_worker, ([], []))
                expert_ids.append(expert)
                counts.append(part_rows)
    return experts
