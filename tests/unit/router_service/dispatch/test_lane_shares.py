"""Experts that several workers share in one call, over lanes: rows are cut where the chooser says,
and whatever the cut, the bits are those of the same call in process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from router_service.dispatch import replica_chooser
from router_service.dispatch.replica_choice import Share
from router_service.dispatch.replica_chooser import Choice, ReplicaChooser
from tests.support.fake_workers import Fault
from tests.support.lane_workers import LaneWorker, lane_workers, remote
from tests.unit.router_service.dispatch.test_lane_dispatch import (
    CONTEXT,
    check_call,
    random_call,
)

FIRST_ROUND_CALL_ID = 1 << 40


@pytest.fixture
def cut_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of every expert with several replicas go to all of them, in parts of any size."""
    plan = ReplicaChooser.plan
    generator = np.random.default_rng(int(torch.randint(2**31, ())))

    def drawn_plan(
        self: ReplicaChooser,
        layer: int,
        rows_per_expert: NDArray[np.int64],
        *,
        avoid: Collection[str] = (),
        exclude: Collection[str] = (),
        **options: Any,
    ) -> Choice:
        choice = plan(self, layer, rows_per_expert, avoid=avoid, exclude=exclude, **options)
        if avoid or exclude:
            return choice
        assert self._table is not None
        workers, shares = choice.workers.copy(), []
        for expert, num_rows in enumerate(rows_per_expert.tolist()):
            held = np.flatnonzero(self._table.holds[:, layer, expert])
            if num_rows and len(held) > 1:
                generator.shuffle(held)
                cuts = np.sort(generator.integers(0, num_rows + 1, size=len(held) - 1))
                rows = np.diff([0, *cuts, num_rows])
                shares.append(Share(expert, tuple(held.tolist()), tuple(rows.tolist())))
                workers[expert] = held[0]
        generator.shuffle(shares)
        return Choice(workers, tuple(shares))

    monkeypatch.setattr(replica_chooser.ReplicaChooser, "plan", drawn_plan)


def num_pieces(workers: list[LaneWorker]) -> Counter[int]:
    """By expert, how many frames asked for it."""
    return Counter(
        expert
        for worker in workers
        for request in worker.requests
        for expert in request.assignments.expert_ids
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("parts", "replicas"), [(1, 2), (1, 3), (2, 2), (3, 3)])
async def test_shared_rows_have_the_bits_of_the_same_call_in_process(
    parts: int, replicas: int, top_k: int, dtype: torch.dtype, cut_at_random: None
) -> None:
    with lane_workers(parts, replicas=replicas, top_k=top_k, dtype=dtype) as workers:
        async with remote(workers) as experts:
            num_whole = 0  # pieces at most, were none cut
            for num_tokens in (1, 2, 7, 40, 64):
                await check_call(experts, workers[0], num_tokens=num_tokens)
                num_whole += min(num_tokens * top_k, workers[0].config.num_local_experts)
            requests = [request for worker in workers for request in worker.requests]
            assert all(request.call_id >= FIRST_ROUND_CALL_ID for request in requests)
            assert num_pieces(workers).total() > num_whole
            lanes, experts._lane_calls = experts._lane_calls, None
            assert lanes is not None
            for num_tokens in (7, 64):
                await check_call(experts, workers[0], num_tokens=num_tokens)


async def test_a_shared_expert_may_have_replicas_that_other_experts_have_not(
    cut_at_random: None,
) -> None:
    with lane_workers(2, replicas=1) as workers:
        everything = workers[0].slots | workers[1].slots
        workers[1].slots |= {slot for slot in everything if slot[1] == 0}
        async with remote(workers) as experts:
            for _ in range(5):
                await check_call(experts, workers[0], num_tokens=40)
            pieces = num_pieces(workers)
            assert pieces[0] > 5
            assert {pieces[expert] for expert in (1, 2, 3)} == {5}


@pytest.mark.parametrize("fault", ["break", "draining", "internal", "unknown", "short", "silent"])
async def test_a_shared_frame_that_fails_is_sent_again_and_the_answer_is_exact(
    fault: Fault, cut_at_random: None
) -> None:
    with lane_workers(2, replicas=2) as workers:
        async with remote(workers, call_timeout_s=0.3) as experts:
            for worker in workers[1:]:
                worker.faults.append(fault)
            for _ in range(4):
                await check_call(experts, workers[0], num_tokens=30)
            assert sum(bool(worker.faults) for worker in workers) == 0


async def test_a_worker_that_takes_fewer_rows_than_its_share_gets_them_in_pieces(
    cut_at_random: None,
) -> None:
    with lane_workers(1, replicas=2) as workers:
        workers[0].max_frame_bytes = 8192
        async with remote(workers) as experts:
            for _ in range(3):
                await check_call(experts, workers[0], num_tokens=200)


@pytest.mark.parametrize(
    "shares",
    [
        (Share(0, (0, 1), (1, 1)),),  # fewer rows than there are
        (Share(0, (0, 1), (1000, -960)),),
        (Share(9, (0, 1), (0, 0)),),  # no such expert
    ],
)
async def test_shares_that_do_not_add_up_are_not_sent(
    shares: tuple[Share, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with lane_workers(1, replicas=2) as workers:
        async with remote(workers) as experts:
            assert experts._lane_calls is not None
            monkeypatch.setattr(
                ReplicaChooser, "plan", lambda *_, **__: Choice(np.zeros(4, int), shares)
            )
            call = random_call(workers[0], 40)
            call[1].copy_(torch.tensor([0, 1]).expand(40, 2))
            assert experts._lane_calls.begin(0, *call, CONTEXT) is None
            assert not any(worker.requests for worker in workers)
