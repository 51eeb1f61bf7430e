from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router_service.dispatch.dispatch_plan import group_by_expert, plan_dispatch
from router_service.dispatch.replica_choice import (
    MIN_SPLIT_ROWS,
    REMOTE_HANDICAP,
    Assigned,
    LayerReplicas,
    assign_rows,
)
from services.core.routing_table import NO_WORKER


class Cost(NamedTuple):
    start_s: float = 0.0
    unit_s: float = 1e-4


def assign(
    rows: Sequence[int],
    replicas: Sequence[Sequence[int]],
    costs: Sequence[Cost] | None = None,
    handicaps: Sequence[float] | None = None,
    *,
    expert_rows: float = 16.0,
    seed: int = 0,
    may_split: bool = True,
) -> Assigned:
    num_workers = max((max(held) for held in replicas if held), default=0) + 1
    return assign_rows(
        rows,
        LayerReplicas.of(replicas),
        costs or [Cost()] * num_workers,
        handicaps or [1.0] * num_workers,
        expert_rows=expert_rows,
        seed=seed,
        may_split=may_split,
    )


def test_experts_without_a_choice_stay_where_they_are() -> None:
    assert assign([5, 5, 5], [[1], [0], []]).workers == [1, 0, NO_WORKER]


def test_activated_experts_are_spread_over_equal_replicas() -> None:
    chosen = assign([1] * 8, [[0, 1]] * 8).workers
    assert np.bincount(chosen).tolist() == [4, 4]


def test_a_worker_with_work_outstanding_gets_less() -> None:
    chosen = assign([1] * 8, [[0, 1]] * 8, [Cost(start_s=1.0), Cost()]).workers
    assert chosen == [1] * 8


def test_a_replica_leaves_alone_the_worker_that_must_compute_something_else() -> None:
    assert assign([8, 8], [[0, 1], [0]]).workers == [1, 0]
    assert assign([8, 0], [[0, 1], [0]]).workers == [0, 0]


def test_the_same_host_wins_a_tie_and_loses_to_a_clearly_sooner_finish() -> None:
    remote = [REMOTE_HANDICAP, 1.0]
    assert assign([8], [[0, 1]], None, remote).workers == [1]
    assert assign([8], [[0, 1]], [Cost(), Cost(start_s=1.0)], remote).workers == [0]


def test_a_hot_expert_is_shared_so_that_its_replicas_end_together() -> None:
    (share,) = assign([400, 20], [[0, 1], [2]]).shares
    assert share.expert == 0
    assert sorted(share.workers) == [0, 1]
    assert sum(share.rows) == 400
    assert max(share.rows) <= 210


def test_a_slower_replica_gets_fewer_rows_of_a_hot_expert() -> None:
    (share,) = assign([400], [[0, 1]], [Cost(unit_s=1e-4), Cost(unit_s=3e-4)]).shares
    rows = dict(zip(share.workers, share.rows, strict=True))
    assert 2.5 * rows[1] < rows[0] < 5 * rows[1]


def test_few_rows_are_never_shared_and_sharing_must_gain() -> None:
    assert not assign([MIN_SPLIT_ROWS - 1], [[0, 1]]).shares
    # Reading the weights twice costs more than half of the rows.
    assert not assign([64], [[0, 1]], expert_rows=512.0).shares
    assert not assign([400], [[0, 1]], may_split=False).shares
    assert not assign([400], [[0, 1]], [Cost(), Cost(start_s=1e6)]).shares


def test_many_replicas_are_drawn_from_by_the_seed_and_all_get_something() -> None:
    chosen = [assign([8], [range(12)], seed=seed).workers[0] for seed in range(200)]
    assert chosen == [assign([8], [range(12)], seed=seed).workers[0] for seed in range(200)]
    assert set(chosen) == set(range(12))


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[list[int]], list[Cost], list[list[int]]]:
    """topk ids [T, K], costs [W], replicas [E]."""
    num_experts = draw(st.integers(2, 8))
    num_workers = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, min(3, num_experts)))
    hot = draw(st.booleans())
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    odds = np.ones(num_experts)
    if hot:
        odds[0] = 50.0
    num_tokens = draw(st.sampled_from([1, 3, 40, 150]))
    ids = [
        rng.choice(num_experts, size=top_k, replace=False, p=odds / odds.sum()).tolist()
        for _ in range(num_tokens)
    ]
    workers = st.lists(st.integers(0, num_workers - 1), unique=True, max_size=num_workers)
    replicas = draw(st.lists(workers, min_size=num_experts, max_size=num_experts))
    cost = st.builds(
        Cost,
        start_s=st.sampled_from([0.0, 1e-4, 5e-3, 1e6]),
        unit_s=st.sampled_from([1e-6, 1e-5, 1e-4]),
    )
    costs = draw(st.lists(cost, min_size=num_workers, max_size=num_workers))
    return ids, costs, replicas


@settings(max_examples=150, deadline=None)
@given(calls())
def test_every_assignment_goes_to_exactly_one_replica_of_its_expert(
    call: tuple[list[list[int]], list[Cost], list[list[int]]],
) -> None:
    ids, costs, replicas = call
    topk_ids = torch.tensor(ids)
    weights = torch.rand(topk_ids.shape)
    gated = group_by_expert(topk_ids, weights, len(replicas), may_combine=False)
    assigned = assign(gated.rows_per_expert.tolist(), replicas, costs)
    plan = plan_dispatch(gated, np.array(assigned.workers), assigned.shares)
    seen: dict[int, tuple[int, int, float]] = {}
    for frame in plan.frames:
        experts = np.repeat(frame.expert_ids, frame.rows_per_expert)
        tokens = frame.token_ids[np.frombuffer(frame.token_rows, dtype=np.int32)]
        frame_weights = np.frombuffer(frame.topk_weights, dtype=np.float32)
        assert frame.places is not None
        for expert, token, weight, place in zip(
            experts, tokens, frame_weights, frame.places, strict=True
        ):
            assert frame.worker in replicas[expert]
            assert place not in seen
            seen[place] = (int(expert), int(token), float(weight))
    expected = {
        int(place): (int(expert), int(token), float(weight))
        for place, expert, token, weight in zip(
            gated.places if gated.places is not None else (),
            gated.expert_ids,
            gated.token_rows,
            gated.topk_weights,
            strict=True,
        )
        if replicas[expert]
    }
    assert seen == expected


@settings(max_examples=100, deadline=None)
@given(calls())
def test_a_worker_to_be_avoided_is_used_only_where_there_is_no_other(
    call: tuple[list[list[int]], list[Cost], list[list[int]]],
) -> None:
    ids, costs, replicas = call
    rows = np.bincount(np.array(ids).ravel(), minlength=len(replicas)).tolist()
    assigned = assign(rows, replicas, costs)
    used = {share.expert: set(share.workers) for share in assigned.shares}
    for expert, worker in enumerate(assigned.workers):
        if rows[expert] and worker != NO_WORKER and len(replicas[expert]) <= 4:
            sick = {w for w in replicas[expert] if costs[w].start_s >= 1e6}
            if sick != set(replicas[expert]):
                assert not (used.get(expert, {worker}) & sick)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_plan_never_takes_longer_than_the_tables_own_choice(top_k: int) -> None:
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    for _ in range(50):
        rows = rng.integers(0, 60, size=8).tolist()
        replicas = [rng.choice(4, size=rng.integers(1, 4), replace=False).tolist() for _ in rows]
        expected = _longest(rows, [held[0] for held in replicas])
        assert _longest(rows, assign(rows, replicas, may_split=False).workers) <= 1.5 * expected


def _longest(rows: Sequence[int], workers: Sequence[int]) -> float:
    ends = np.zeros(4)
    for expert, worker in enumerate(workers):
        if rows[expert]:
            ends[worker] += 16.0 + rows[expert]
    return float(ends.max())
