"""How much of each worker's time each slot takes, and what that would be with other replicas.

A layer is over when its slowest worker has answered, so workers are compared layer by layer. Loads
are shares of a worker's time: what a worker was seen to be busy, divided among its slots by their
costs. So a slow device weighs more for the same rows.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from services.autoscaler.view import FleetView, WorkerView
from services.core.registry import Slot

SIGNIFICANCE = 3.0
"""Standard deviations of a count (its square root) by which an excess must exceed chance."""
STEP_SIGNIFICANCE = 1.5
"""The same of steps: in prefill rows come by whole prompts, of which a window has few, and how long
each takes varies. Five steps let pass what is three times the others' load."""


class SlotLoads:
    """Loads of the ready workers; `replicate` and `withdraw` change them as the plan goes on."""

    def __init__(self, view: FleetView) -> None:
        self._workers = view.ready
        self._costs = [worker.costs(view.phase) for worker in view.ready.values()]
        self._of_slot: defaultdict[Slot, dict[str, float]] = defaultdict(dict)
        self._of_layer: defaultdict[int, dict[str, float]] = defaultdict(dict)
        self._is_prefill = view.phase == "prefill"
        self._counts: defaultdict[int, dict[str, float]] = defaultdict(dict)
        self._seconds_per_cost: dict[str, float] = {}
        self.utilization = {name: worker.utilization for name, worker in self._workers.items()}
        for worker, costs in zip(self._workers.values(), self._costs, strict=True):
            self._divide(worker, costs)
        speeds = self._seconds_per_cost.values()
        self._mean_seconds_per_cost = math.fsum(speeds) / len(speeds) if speeds else 0.0

    @property
    def busiest(self) -> str:
        """The ready worker with the highest utilisation."""
        return max(self.utilization, key=lambda name: (self.utilization[name], name))

    @property
    def layers(self) -> list[int]:
        return sorted(self._of_layer)

    def of_slot(self, slot: Slot) -> Mapping[str, float]:
        return self._of_slot[slot]

    def total(self, slot: Slot) -> float:
        return math.fsum(self._of_slot[slot].values())

    def spared_by_one_more(self, slot: Slot) -> float:
        """What each replica of the slot would have less to do if there were one more. In units of
        cost, which unlike shares of time do not shrink where a worker is saturated."""
        num_replicas = max(1, len(self._of_slot[slot]))
        return self._cost(slot) / (num_replicas * (num_replicas + 1))

    def added_by_one_less(self, slot: Slot) -> float:
        """What each other replica would have more to do if there were one less, in such units."""
        num_replicas = len(self._of_slot[slot])
        if num_replicas < 2:
            return math.inf
        return self._cost(slot) / (num_replicas * (num_replicas - 1))

    def rows(self, slot: Slot) -> float:
        """Rows per second over all replicas."""
        return math.fsum(worker.rows.get(slot, 0.0) for worker in self._workers.values())

    def in_layer(self, layer: int) -> Mapping[str, float]:
        """Load by worker, of those that hold a slot of this layer."""
        return self._of_layer[layer]

    def ratio(self, layer: int, worker_id: str) -> float:
        """This worker's load in the layer over the mean of the others that hold part of it."""
        loads = self._of_layer[layer]
        others = [load for name, load in loads.items() if name != worker_id]
        mine = loads.get(worker_id, 0.0)
        if not others or mine == 0:
            return 1.0
        mean = math.fsum(others) / len(others)
        return mine / mean if mean > 0 else math.inf

    def is_significant(self, layer: int, worker_id: str) -> bool:
        """Whether the excess over the other workers is more than chance would give."""
        count = self._counts[layer].get(worker_id, 0.0)
        excess = 1 - 1 / max(1.0, self.ratio(layer, worker_id))
        is_common = excess * count >= SIGNIFICANCE * math.sqrt(count)
        return is_common and self._is_beyond_steps(excess, worker_id)

    def are_uneven(self, busy: str, idle: str) -> bool:
        """Whether one worker is busier than another by more than chance would give."""
        excess = 1 - self.utilization[idle] / self.utilization[busy]
        return self._is_beyond_steps(excess, busy)

    def with_replica(self, slot: Slot, worker_id: str) -> dict[str, float]:
        """Loads in the slot's layer of all workers concerned, once this one shares the slot."""
        shares = self._of_slot[slot]
        num_replicas = len(shares) + 1
        layer = self._of_layer[slot[0]]
        changed = {
            name: layer[name] - load + load * len(shares) / num_replicas
            for name, load in shares.items()
        }
        changed[worker_id] = layer.get(worker_id, 0.0) + self.new_share(slot, worker_id)
        return changed

    def new_share(self, slot: Slot, worker_id: str) -> float:
        """What this worker would get of the slot's load as one replica more."""
        shares = self._of_slot[slot]
        mine = self._seconds_per_cost.get(worker_id, self._mean_seconds_per_cost)
        cost = math.fsum(
            load / speed
            for name, load in shares.items()
            if (speed := self._seconds_per_cost.get(name, 0.0)) > 0
        )
        return cost * mine / (len(shares) + 1)

    def replicate(self, slot: Slot, worker_id: str) -> None:
        shares = self._of_slot[slot]
        if worker_id in shares:
            return
        new_share = self.new_share(slot, worker_id)
        num_before = len(shares)
        for name, load in list(shares.items()):
            self._change(slot, name, load * num_before / (num_before + 1) - load)
        self._of_slot[slot][worker_id] = 0.0
        self._of_layer[slot[0]].setdefault(worker_id, 0.0)
        self._change(slot, worker_id, new_share)

    def withdraw(self, slot: Slot, worker_id: str) -> None:
        """Take one replica away; the others share its load."""
        shares = self._of_slot[slot]
        load = shares.get(worker_id, 0.0)
        others = [name for name in shares if name != worker_id]
        if worker_id not in shares or not others:
            return
        self._change(slot, worker_id, -load)
        del shares[worker_id]
        for name in others:
            self._change(slot, name, load / len(others))

    def without(self, copies: Iterable[tuple[str, Slot]]) -> SlotLoads:
        """These loads with replicas (worker id, slot) taken away; nothing changes here."""
        copies = list(copies)
        twin = self._twin({slot for _, slot in copies})
        for worker_id, slot in copies:
            twin.withdraw(slot, worker_id)
        return twin

    def with_newcomer(self, worker_id: str) -> SlotLoads:
        """These loads with one worker more, of average speed and without slots; nothing changes
        here."""
        twin = self._twin(self._of_slot.keys())
        twin.utilization[worker_id] = 0.0
        return twin

    def _twin(self, changing: Iterable[Slot]) -> SlotLoads:
        """A copy in which the loads of these slots may be changed."""
        twin = copy.copy(self)
        twin._of_slot = defaultdict(dict, self._of_slot)
        twin._of_layer = defaultdict(dict, self._of_layer)
        twin.utilization = dict(self.utilization)
        for slot in changing:
            twin._of_slot[slot] = dict(self._of_slot[slot])
            twin._of_layer[slot[0]] = dict(self._of_layer[slot[0]])
        return twin

    def _is_beyond_steps(self, excess: float, worker_id: str) -> bool:
        num_steps = self._workers[worker_id].num_steps
        return not self._is_prefill or excess * math.sqrt(num_steps) >= STEP_SIGNIFICANCE

    def _cost(self, slot: Slot) -> float:
        return math.fsum(costs.get(slot, 0.0) for costs in self._costs)

    def _divide(self, worker: WorkerView, costs: Mapping[Slot, float]) -> None:
        name = worker.worker_id
        total = math.fsum(costs.get(slot, 0.0) for slot in worker.slots)
        scale = worker.utilization / total if total > 0 else 0.0
        if scale > 0:
            self._seconds_per_cost[name] = scale
        for slot in worker.slots:
            cost = costs.get(slot, 0.0)
            self._of_slot[slot][name] = cost * scale
            layer = self._of_layer[slot[0]]
            layer[name] = layer.get(name, 0.0) + cost * scale
            counts = self._counts[slot[0]]
            counts[name] = counts.get(name, 0.0) + cost * worker.sampled_s

    def _change(self, slot: Slot, worker_id: str, by: float) -> None:
        self._of_slot[slot][worker_id] += by
        self._of_layer[slot[0]][worker_id] += by
        self.utilization[worker_id] += by
