"""Which replica computes which rows of one layer call, so that the last worker ends soonest. Pure.

A worker's finish is expected at `start_s` (its overhead and what this shard has sent before) plus
`unit_s` for every unit of work. An expert's weights are read once however few rows it has, so an
activated expert costs as much as `expert_rows` rows more. In decode that makes the choice spread
activated experts, in prefill rows. Experts with one replica are fixed; the others follow, the one
with the most rows first, each to the replica that would end it soonest (Graham's LPT rule). Where
sharing the rows of one expert among its replicas ends it clearly sooner, they are shared.

Among many replicas two are looked at (the power of two choices, Mitzenmacher 2001): several shards
that see the same figures then do not all run to the same worker.

Shapes: E experts, W workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from services.core.routing_table import NO_WORKER

FRAME_S = 1e-4
"""What one more frame costs: packing, sending and taking in the answer, mostly on the shard."""
REMOTE_HANDICAP = 1.1
"""A replica on another host must be expected to end this much sooner than one on the same."""
MIN_SPLIT_ROWS = 16
"""Fewer rows of an expert are never shared."""
_MIN_SHARE_ROWS = 8
_SPLIT_GAIN = 0.9
_MAX_LOOKED_AT = 4


class WorkerCost(Protocol):
    """What a worker's next frame is expected to take, in seconds."""

    @property
    def start_s(self) -> float: ...
    @property
    def unit_s(self) -> float: ...


class Share(NamedTuple):
    """Rows of one expert in ascending token, the first `rows[0]` of them for `workers[0]`, ..."""

    expert: int
    workers: tuple[int, ...]
    rows: tuple[int, ...]


class Assigned(NamedTuple):
    """`workers` [E]: who computes an expert, `NO_WORKER` where it has no replica. An expert in
    `shares` is computed by several, the first of whom is in `workers`."""

    workers: list[int]
    shares: list[Share]


class LayerReplicas(NamedTuple):
    """Who may compute the experts of a layer, sorted by what is to be decided."""

    preferred: tuple[int, ...]
    """[E]: a worker of each expert, `NO_WORKER` where there is none."""
    free: tuple[tuple[int, tuple[int, ...]], ...]
    """(expert, workers) of experts with a choice."""
    contested: tuple[tuple[int, int], ...]
    """(expert, worker) of experts without one whose worker is a choice of others."""

    @staticmethod
    def of(replicas: Sequence[Sequence[int]]) -> LayerReplicas:
        """`replicas` [E]: the workers that hold each expert, the preferred one first."""
        free = tuple((e, tuple(held)) for e, held in enumerate(replicas) if len(held) > 1)
        choices = {worker for _, held in free for worker in held}
        return LayerReplicas(
            preferred=tuple(held[0] if held else NO_WORKER for held in replicas),
            free=free,
            contested=tuple(
                (e, held[0])
                for e, held in enumerate(replicas)
                if len(held) == 1 and held[0] in choices
            ),
        )


def assign_rows(
    rows_per_expert: Sequence[int],
    replicas: LayerReplicas,
    costs: Sequence[WorkerCost],
    handicaps: Sequence[float],
    *,
    expert_rows: float,
    seed: int = 0,
    may_split: bool = True,
) -> Assigned:
    """`costs` and `handicaps` by worker: what its finish counts as, times itself. The same input
    gives the same answer."""
    workers = list(replicas.preferred)
    ends: dict[int, float] = {}
    for expert, worker in replicas.contested:
        rows = rows_per_expert[expert]
        if rows:
            cost = costs[worker]
            ends[worker] = ends.get(worker, cost.start_s) + cost.unit_s * (expert_rows + rows)
    shares: list[Share] = []
    todo = [(-rows_per_expert[expert], expert, held) for expert, held in replicas.free]
    todo.sort()
    for negative_rows, expert, held in todo:
        if not negative_rows:
            break
        work = expert_rows - negative_rows
        best_end, best_score, best = 0.0, math.inf, NO_WORKER
        for worker in held if len(held) <= _MAX_LOOKED_AT else _two_of(held, seed + expert):
            cost = costs[worker]
            if worker in ends:
                end = ends[worker] + cost.unit_s * work
            else:
                end = cost.start_s + FRAME_S + cost.unit_s * work
            score = end * handicaps[worker]
            if score < best_score:
                best_end, best_score, best = end, score, worker
        if may_split and -negative_rows >= MIN_SPLIT_ROWS:
            share = _share(expert, -negative_rows, held, costs, ends, expert_rows, best_end)
            if share is not None:
                shares.append(share)
                workers[expert] = share.workers[0]
                continue
        workers[expert] = best
        ends[best] = best_end
    return Assigned(workers, shares)


def _share(
    expert: int,
    rows: int,
    held: Sequence[int],
    costs: Sequence[WorkerCost],
    ends: dict[int, float],
    expert_rows: float,
    end_alone: float,
) -> Share | None:
    """Rows shared so that all end together; None where that gains too little. Updates `ends`."""
    starts = []
    for worker in held:
        cost = costs[worker]
        start = ends.get(worker)
        if start is None:
            start = cost.start_s + FRAME_S
        starts.append((start + cost.unit_s * expert_rows, worker, cost.unit_s))
    starts.sort()
    # With the first k workers: the level L where the sum of (L - start) / unit is all rows.
    level, count, start_units, speed = 0.0, 0, 0.0, 0.0
    for start, _, unit_s in starts:
        if count and (level - start) / unit_s < _MIN_SHARE_ROWS:
            break
        speed += 1 / unit_s
        start_units += start / unit_s
        level = (rows + start_units) / speed
        count += 1
    if count < 2 or level > _SPLIT_GAIN * end_alone:
        return None
    shared = [max(0, int((level - start) / unit_s)) for start, _, unit_s in starts[:count]]
    shared[0] += rows - sum(shared)
    for _, worker, _ in starts[:count]:
        ends[worker] = level
    return Share(expert, tuple([worker for _, worker, _ in starts[:count]]), tuple(shared))


def _two_of(held: Sequence[int], seed: int) -> tuple[int, int]:
    """Two different replicas by a linear congruential draw."""
    drawn = (seed * 6364136223846793005 + 1442695040888963407) & (2**64 - 1)
    first = (drawn >> 33) % len(held)
    second = (first + 1 + (drawn >> 17) % (len(held) - 1)) % len(held)
    return held[first], held[second]
