"""A simulated fleet for the autoscaler: leases, load and time on paper, nothing measured.

Workers compute what is demanded of their slots, replicas of a slot share it equally, and leases
with counters come out as the real ones do. What the policy asks for takes time to be done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from services.autoscaler.actions import Action, AddWorker, LoadSlots, RemoveWorker, UnloadSlots
from services.autoscaler.options import PolicyOptions
from services.autoscaler.policy import decide
from services.autoscaler.state import PolicyState
from services.autoscaler.window import LoadWindow
from services.core.registry import FleetSnapshot, ShardRecord, Slot, WorkerRecord

SLOT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds: of a row's arithmetic, of reading a slot's weights, of loading one slot, and until a
    new worker is ready."""

    row_s: float = 20e-6
    read_s: float = 200e-6
    load_s: float = 0.05
    start_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What the shards ask for: steps per second, rows per step and slot."""

    steps_per_s: float
    rows: Mapping[Slot, float]
    is_prefill: bool = False


@dataclass(kw_only=True)
class SimulatedWorker:
    worker_id: str
    host: str
    slots: set[Slot]
    capacity: int
    started_at: float
    ready_at: float
    phase_s: float = 0.0
    tokens: dict[Slot, float] = field(default_factory=dict)
    frames: float = 0.0
    busy_s: float = 0.0
    utilization: float = 0.0
    offered: float = 0.0


class SimulatedFleet:
    """Advance with `tick`, read with `snapshot`, change with `apply`."""

    def __init__(self, costs: Costs | None = None, *, tick_s: float = 0.1) -> None:
        self.costs = costs or Costs()
        self.tick_s = tick_s
        self.now = 0.0
        self.workers: dict[str, SimulatedWorker] = {}
        self.worker_seconds = 0.0
        self.in_flight: list[tuple[float, Action]] = []
        self.lost_rows = 0.0
        self._generated = 0.0
        self._prefilled = 0.0
        self._steps_s = 0.0
        self._leases: dict[str, WorkerRecord] = {}
        self._num_added = 0

    def add(
        self, worker_id: str, slots: set[Slot], *, capacity: int, host: str = "host-0"
    ) -> SimulatedWorker:
        worker = SimulatedWorker(
            worker_id=worker_id,
            host=host,
            slots=set(slots),
            capacity=capacity,
            started_at=self.now,
            ready_at=self.now,
            phase_s=(len(self.workers) * 0.37) % 1.0,
        )
        self.workers[worker_id] = worker
        return worker

    def kill(self, worker_id: str) -> None:
        """Gone at once, lease and all."""
        del self.workers[worker_id]
        self._leases.pop(worker_id, None)

    def tick(self, demand: Demand) -> None:
        self.now += self.tick_s
        self._finish_actions()
        self._compute(demand)
        self.worker_seconds += len(self.workers) * self.tick_s
        self._beat()

    def snapshot(self) -> FleetSnapshot:
        shard = ShardRecord(
            shard_id="shard-0",
            pid=1,
            host="host-0",
            started_at=0.0,
            num_running=32,
            num_waiting=0,
            waiting_tokens=0,
            kv_blocks_used=0,
            kv_blocks_total=1,
            num_generated_tokens=int(self._generated),
            num_prefilled_tokens=int(self._prefilled),
            step_s=self._steps_s,
            full_s=self._steps_s,
            experts_s=self._steps_s,
            written_at=self.now,
        )
        return FleetSnapshot.of([*self._leases.values(), shard])

    def holders(self, slot: Slot) -> list[SimulatedWorker]:
        return [w for w in self.workers.values() if slot in w.slots and w.ready_at <= self.now]

    def start(self, action: Action) -> None:
        """Begin what will be done a while later, as a real worker's answer would come."""
        costs = self.costs
        delay_s = costs.load_s * len(action.slots) if isinstance(action, LoadSlots) else 0.0
        self.in_flight.append((self.now + delay_s, action))

    def _finish_actions(self) -> None:
        due = [action for at, action in self.in_flight if at <= self.now]
        self.in_flight = [item for item in self.in_flight if item[0] > self.now]
        for action in due:
            self._finish(action)

    def _finish(self, action: Action) -> None:
        match action:
            case LoadSlots() if action.worker_id in self.workers:
                worker = self.workers[action.worker_id]
                worker.slots |= set(action.slots)
                assert len(worker.slots) <= worker.capacity, "memory exceeded"
            case UnloadSlots() if action.worker_id in self.workers:
                worker = self.workers[action.worker_id]
                for slot in action.slots:
                    assert len(self.holders(slot)) > 1, "the last replica was unloaded"
                worker.slots -= set(action.slots)
            case AddWorker():
                self._num_added += 1
                largest = max(worker.capacity for worker in self.workers.values())
                added = self.add(f"added-{self._num_added}", set(action.slots), capacity=largest)
                added.ready_at = self.now + self.costs.start_s
            case RemoveWorker() if action.worker_id in self.workers:
                self.kill(action.worker_id)
            case _:
                pass

    def _compute(self, demand: Demand) -> None:
        offered = dict.fromkeys(self.workers, 0.0)
        rows_s = sum(demand.rows.values()) * demand.steps_per_s
        layers_of = {
            name: {layer for layer, _ in worker.slots} for name, worker in self.workers.items()
        }
        for slot, rows in demand.rows.items():
            holders = self.holders(slot)
            if not holders:
                self.lost_rows += rows * demand.steps_per_s * self.tick_s
                continue
            calls = demand.steps_per_s * -math.expm1(-rows) / len(holders)
            row_rate = rows * demand.steps_per_s / len(holders)
            for worker in holders:
                offered[worker.worker_id] += row_rate * self.costs.row_s + calls * self.costs.read_s
                before = worker.tokens.get(slot, 0.0)
                worker.tokens[slot] = before + row_rate * self.tick_s
        for name, worker in self.workers.items():
            worker.offered = offered[name]
            worker.utilization = min(1.0, offered[name])
            worker.busy_s += worker.utilization * self.tick_s
            if worker.ready_at <= self.now:
                worker.frames += len(layers_of[name]) * demand.steps_per_s * self.tick_s
        # Full steps that wait for nothing but the busiest worker.
        self._steps_s += min(1.0, max(offered.values(), default=0.0)) * self.tick_s
        num_layers = len({layer for layer, _ in demand.rows}) or 1
        tokens = rows_s / num_layers * self.tick_s
        if demand.is_prefill:
            self._prefilled += tokens
        else:
            self._generated += tokens

    def _beat(self) -> None:
        for worker in self.workers.values():
            last = self._leases.get(worker.worker_id)
            age_s = (self.now - worker.phase_s) % 1.0
            if last is None or age_s < self.tick_s or last.slots != worker.slots:
                self._leases[worker.worker_id] = self._record(worker)

    def _record(self, worker: SimulatedWorker) -> WorkerRecord:
        wait = worker.utilization / max(1e-3, 2 * (1 - worker.utilization))
        is_ready = worker.ready_at <= self.now
        return WorkerRecord(
            worker_id=worker.worker_id,
            endpoint="sim:1",
            state="ready" if is_ready else "loading",
            slots=frozenset(worker.slots) if is_ready else frozenset(),
            device="cpu",
            pid=1,
            host=worker.host,
            started_at=worker.started_at,
            weight_bytes=len(worker.slots) * SLOT_BYTES,
            memory_free_bytes=(worker.capacity - len(worker.slots)) * SLOT_BYTES,
            slot_bytes=SLOT_BYTES,
            tokens={slot: int(count) for slot, count in worker.tokens.items()},
            queue_ms=wait,
            compute_ms=1.0,
            num_frames=int(worker.frames),
            busy_s=worker.busy_s,
            written_at=self.now,
        )


class SimulatedAutoscaler:
    """The policy on a simulated fleet, once a second."""

    def __init__(
        self, fleet: SimulatedFleet, options: PolicyOptions, *, interval_s: float = 1.0
    ) -> None:
        self.fleet = fleet
        self.options = options
        self.state = PolicyState()
        self.actions: list[tuple[float, Action, str]] = []
        self._window = LoadWindow()
        self._interval_s = interval_s
        self._next_at = 0.0

    def step(self) -> None:
        """Call after every tick."""
        fleet = self.fleet
        if fleet.now < self._next_at:
            return
        self._next_at = fleet.now + self._interval_s
        self._window.add(fleet.snapshot(), fleet.now)
        in_flight = [action for _, action in fleet.in_flight]
        planned, self.state = decide(
            self.options, self.state, self._window.view(), fleet.now, in_flight=in_flight
        )
        for one in planned:
            self.actions.append((fleet.now, one.action, one.reason))
            fleet.start(one.action)

    def run(self, seconds: float, demand: Demand | Callable[[float], Demand]) -> None:
        end = self.fleet.now + seconds
        while self.fleet.now < end:
            self.fleet.tick(demand(self.fleet.now) if callable(demand) else demand)
            self.step()


def skewed(
    *, num_layers: int, num_experts: int, rows: float, hot_share: float, steps_per_s: float
) -> Demand:
    """`rows` per layer and step, of which expert 0 gets `hot_share` and the others equal parts."""
    rest = rows * (1 - hot_share) / (num_experts - 1)
    return Demand(
        steps_per_s=steps_per_s,
        rows={
            (layer, expert): rows * hot_share if expert == 0 else rest
            for layer in range(num_layers)
            for expert in range(num_experts)
        },
    )


def even(*, num_layers: int, num_experts: int, rows: float, steps_per_s: float) -> Demand:
    return skewed(
        num_layers=num_layers,
        num_experts=num_experts,
        rows=rows,
        hot_share=1 / num_experts,
        steps_per_s=steps_per_s,
    )


def scaled(demand: Demand, factor: float) -> Demand:
    """More or fewer steps of the same rows."""
    return replace(demand, steps_per_s=demand.steps_per_s * factor)
