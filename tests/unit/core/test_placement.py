from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import ConfigurationError
from services.core.placement import plan_placement


@given(st.data(), st.integers(1, 56), st.integers(1, 64))
def test_every_slot_is_placed_exactly_once_and_every_worker_has_some(
    data: st.DataObject, num_layers: int, num_experts: int
) -> None:
    num_workers = data.draw(st.integers(1, min(num_layers * num_experts, 200)))
    plan = plan_placement(num_layers, num_experts, num_workers)
    assert len(plan) == num_workers
    counts = Counter(slot for worker in plan for slot in worker.slots())
    assert set(counts.values()) == {1}
    assert len(counts) == num_layers * num_experts
    assert all(worker.slots() for worker in plan)


@given(st.integers(1, 8), st.integers(1, 16), st.data())
def test_up_to_as_many_workers_as_experts_have_whole_runs_of_experts(
    num_layers: int, num_experts: int, data: st.DataObject
) -> None:
    num_workers = data.draw(st.integers(1, num_experts))
    plan = plan_placement(num_layers, num_experts, num_workers)
    sizes = [len(worker.experts) for worker in plan]
    assert max(sizes) - min(sizes) <= 1
    assert all(worker.layers == range(num_layers) for worker in plan)
    for worker in plan:
        first = worker.experts[0]
        assert worker.experts == tuple(range(first, first + len(worker.experts)))


def test_eight_workers_of_four_experts_take_half_the_layers_each() -> None:
    plan = plan_placement(32, 4, 8)
    assert [(w.experts, w.layers) for w in plan[:3]] == [
        ((0,), range(16)),
        ((0,), range(16, 32)),
        ((1,), range(16)),
    ]


def test_one_worker_takes_everything() -> None:
    (worker,) = plan_placement(2, 3, 1)
    assert worker.slots() == {(layer, expert) for layer in range(2) for expert in range(3)}


@pytest.mark.parametrize("num_workers", [0, -1, 9])
def test_a_number_of_workers_that_leaves_some_without_a_slot_is_refused(num_workers: int) -> None:
    with pytest.raises(ConfigurationError, match="choose 1 to 8 workers"):
        plan_placement(2, 4, num_workers)
