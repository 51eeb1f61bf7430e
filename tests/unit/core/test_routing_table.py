from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from services.core.placement import plan_placement
from services.core.registry import FleetSnapshot, Slot, WorkerRecord
from services.core.routing_table import NO_WORKER, RoutingTable
from tests.support.records import worker_record

ALL: frozenset[Slot] = frozenset((layer, expert) for layer in range(3) for expert in range(4))


def build(*workers: WorkerRecord, **options: Any) -> RoutingTable:
    return RoutingTable.build(
        FleetSnapshot(workers=workers), num_layers=3, num_experts=4, **options
    )


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 7, 12])
def test_every_expert_resolves_to_the_worker_that_holds_it(num_workers: int) -> None:
    plan = plan_placement(3, 4, num_workers)
    table = build(*(worker_record(f"w{i}", w.slots()) for i, w in enumerate(plan)))
    assert table.missing_slots() == ()
    for layer in range(3):
        resolved = table.resolve(layer)
        assert resolved.shape == (4,)
        for expert, index in enumerate(resolved):
            assert (layer, expert) in table.workers[index].slots


@pytest.mark.parametrize("state", ["loading", "draining"])
def test_a_worker_that_is_not_ready_gets_nothing(state: str) -> None:
    table = build(worker_record("a", ALL, state=state), worker_record("b", {(0, 1)}))
    assert table.resolve(0).tolist() == [NO_WORKER, 0, NO_WORKER, NO_WORKER]
    assert len(table.missing_slots()) == 11
    assert table.missing_slots()[:2] == ((0, 0), (0, 2))


def test_the_experts_of_a_layer_are_spread_over_equal_replicas() -> None:
    table = build(worker_record("a", ALL), worker_record("b", ALL))
    for layer in range(3):
        assert np.bincount(table.resolve(layer)).tolist() == [2, 2]
    assert table.replicas((1, 2)) == ("a", "b")


def test_an_expert_with_a_choice_leaves_the_only_holder_of_another_alone() -> None:
    table = build(worker_record("a", ALL), worker_record("b", {(0, 0), (0, 1)}))
    assert table.resolve(0).tolist() == [1, 1, 0, 0]


def test_a_replica_on_the_same_host_is_preferred() -> None:
    far, near = worker_record("a", ALL, host="far"), worker_record("b", ALL, host="near")
    assert build(far, near, local_host="near").resolve(1).tolist() == [1, 1, 1, 1]


def test_without_a_worker_its_replicas_take_over_in_a_new_version() -> None:
    table = build(worker_record("a", ALL), worker_record("b", {(0, 0), (0, 1)}), version=5)
    after = table.without("a")
    assert after.version == 6
    assert after.resolve(0).tolist() == [1, 1, NO_WORKER, NO_WORKER]
    assert set(after.missing_slots()) == ALL - {(0, 0), (0, 1)}
    assert table.missing_slots() == ()


def test_without_some_slots_of_a_worker_the_others_stay() -> None:
    after = build(worker_record("a", ALL)).without("a", [(1, 2)])
    assert after.missing_slots() == ((1, 2),)


def test_the_table_says_per_layer_whether_there_is_a_choice_and_whether_it_is_whole() -> None:
    table = build(worker_record("a", ALL - {(2, 3)}), worker_record("b", {(0, 0)}))
    assert table.has_choice == (True, False, False)
    assert table.is_whole == (True, True, False)


def test_slots_outside_the_model_are_ignored() -> None:
    table = build(worker_record("a", ALL | {(3, 0), (0, 4), (99, 99)}))
    assert table.missing_slots() == ()


def test_a_table_without_workers_misses_every_slot() -> None:
    table = build()
    assert set(table.missing_slots()) == ALL
    assert table.resolve(0).tolist() == [NO_WORKER] * 4


def test_a_table_cannot_be_written_to() -> None:
    table = build(worker_record("a", ALL))
    with pytest.raises(ValueError, match="read-only"):
        table.resolve(0)[0] = 7
