"""Whatever happens to workers and their frames, every expert with a replica has a worker."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router_service.dispatch.replica_chooser import ReplicaChooser
from services.core.registry import FleetSnapshot, Slot
from services.core.routing_table import NO_WORKER, RoutingTable
from tests.support.records import worker_record

LAYERS, EXPERTS = 2, 4
IDS = ("a", "b", "c", "d", "e", "f")
SLOTS = st.frozensets(
    st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)), min_size=1
)
ROWS = st.lists(st.sampled_from([0, 1, 8, 300]), min_size=EXPERTS, max_size=EXPERTS)


def table_of(held: dict[str, frozenset[Slot]], version: int = 1) -> RoutingTable:
    return RoutingTable.build(
        FleetSnapshot(workers=tuple(worker_record(w, s) for w, s in sorted(held.items()))),
        num_layers=LAYERS,
        num_experts=EXPERTS,
        version=version,
    )


class Chooser(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.chooser = ReplicaChooser(call_timeout_s=30.0)
        self.held: dict[str, frozenset[Slot]] = {}
        self.in_flight: list[tuple[str, int, float, bool]] = []
        self.now = 0.0
        self.version = 0
        self.follow()

    def follow(self) -> None:
        self.version += 1
        self.chooser.follow(table_of(self.held, self.version))

    @rule(worker=st.sampled_from(IDS), slots=SLOTS)
    def join_or_change(self, worker: str, slots: frozenset[Slot]) -> None:
        self.held[worker] = slots
        if self.chooser.is_ejected(worker):
            self.chooser.returned(worker)
        self.follow()

    @rule(worker=st.sampled_from(IDS), for_good=st.booleans())
    def leave(self, worker: str, for_good: bool) -> None:
        if self.held.pop(worker, None) is not None:
            self.chooser.left(worker)
            self.follow()
            for frame in [frame for frame in self.in_flight if frame[0] == worker]:
                self.in_flight.remove(frame)
                self.chooser.dropped(worker, frame[1], was_overdue=frame[3])
            if for_good:
                self.chooser.forget(worker)

    @rule(layer=st.integers(0, LAYERS - 1), rows=ROWS)
    def send(self, layer: int, rows: list[int]) -> None:
        choice = self.chooser.plan(layer, np.array(rows))
        self.check(layer, rows, choice.workers.tolist())
        table = table_of(self.held)
        shared = {share.expert: share for share in choice.shares}
        for expert, num_rows in enumerate(rows):
            parts = [(int(choice.workers[expert]), num_rows)]
            if expert in shared:
                parts = list(zip(shared[expert].workers, shared[expert].rows, strict=True))
            assert sum(part for _, part in parts) == num_rows
            for worker, part in parts:
                if part and worker != NO_WORKER:
                    worker_id = table.workers[worker].worker_id
                    assert (layer, expert) in self.held[worker_id]
                    expected_s = self.chooser.sent(worker_id, part)
                    assert 0 < self.chooser.deadline_s(worker_id, part, 1, expected_s) <= 30.0
                    self.in_flight.append((worker_id, part, expected_s, False))

    @rule(
        index=st.integers(0, 100),
        outcome=st.sampled_from(["good", "slow", "failed", "dropped", "overdue"]),
    )
    def end_frame(self, index: int, outcome: str) -> None:
        if not self.in_flight:
            return
        worker, rows, expected_s, late = self.in_flight.pop(index % len(self.in_flight))
        if outcome == "overdue" and not late:
            self.chooser.overdue(worker, self.now)
            self.in_flight.append((worker, rows, expected_s, True))
        elif outcome == "failed":
            self.chooser.failed(worker, rows, self.now, was_overdue=late)
        elif outcome == "dropped":
            self.chooser.dropped(worker, rows, was_overdue=late)
        else:
            elapsed_s = 1.0 if outcome == "slow" else 0.002
            self.chooser.answered(
                worker, rows, elapsed_s, expected_s=expected_s, compute_s=1e-3, was_overdue=late
            )

    @rule(worker=st.sampled_from(IDS))
    def get_stuck(self, worker: str) -> None:
        if any(frame[0] == worker and frame[3] for frame in self.in_flight):
            self.chooser.stuck(worker)

    @rule(seconds=st.sampled_from([0.1, 1.0, 40.0]), answers=st.booleans())
    def pass_time(self, seconds: float, answers: bool) -> None:
        self.now += seconds
        for worker in self.chooser.tick(self.now):
            if answers:
                self.chooser.returned(worker)
            else:
                self.chooser.probe_failed(worker, self.now)

    @invariant()
    def no_expert_is_without_a_worker_while_it_has_a_replica(self) -> None:
        for layer in range(LAYERS):
            self.check(layer, [1] * EXPERTS, self.chooser.choose(layer, np.ones(4, int)).tolist())

    @invariant()
    def outstanding_rows_are_those_in_flight(self) -> None:
        for figures in self.chooser.figures():
            rows = sum(frame[1] for frame in self.in_flight if frame[0] == figures.worker_id)
            assert figures.outstanding_rows == rows

    @invariant()
    def only_workers_with_an_overdue_frame_are_stuck(self) -> None:
        late = {frame[0] for frame in self.in_flight if frame[3]}
        stuck = {w for w, health in self.chooser._health.items() if health.is_stuck}
        assert stuck <= late
        assert self.chooser.num_stuck == len(stuck)

    def check(self, layer: int, rows: list[int], workers: list[int]) -> None:
        ids = sorted(self.held)
        for expert, worker in enumerate(workers):
            if not rows[expert]:
                continue
            holders = {w for w, slots in self.held.items() if (layer, expert) in slots}
            assert (ids[worker] in holders) if holders else worker == NO_WORKER


TestChooser = Chooser.TestCase
TestChooser.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_layer_without_a_choice_costs_no_copy() -> None:
    chooser = ReplicaChooser(call_timeout_s=30.0)
    table = table_of({"a": frozenset((layer, e) for layer in range(2) for e in range(4))})
    chooser.follow(table)
    choice = chooser.plan(1, np.ones(4, int))
    assert choice.workers.base is table.resolve(1).base
    assert choice.shares == ()


def test_workers_that_failed_a_call_are_avoided_and_excluded_ones_never_used() -> None:
    everything = frozenset((layer, e) for layer in range(2) for e in range(4))
    chooser = ReplicaChooser(call_timeout_s=30.0)
    chooser.follow(table_of({"a": everything, "b": frozenset({(0, 0), (0, 1)})}))
    rows = np.ones(4, int)
    assert chooser.plan(0, rows, avoid={"b"}).workers.tolist() == [0, 0, 0, 0]
    assert chooser.plan(0, rows, avoid={"a"}).workers.tolist() == [1, 1, 0, 0]
    assert chooser.plan(0, rows, exclude={"a"}).workers.tolist() == [1, 1, NO_WORKER, NO_WORKER]
    chooser.sent("a", 1)
    chooser.overdue("a", 0.0)
    assert chooser.plan(0, rows).workers.tolist() == [1, 1, 0, 0]
    chooser.stuck("a")
    assert chooser.plan(0, rows, skip_stuck=True).workers.tolist()[2:] == [NO_WORKER, NO_WORKER]
    assert not chooser.is_available([(0, 0), (0, 2)])
    chooser.answered("a", 1, 2.0, was_overdue=True)
    assert chooser.is_available([(0, 0), (0, 2)])
