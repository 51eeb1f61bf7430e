"""The plan of one round: what every part of the policy reads, and adds its actions to."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace

from services.autoscaler.actions import (
    Action,
    AddWorker,
    LoadSlots,
    Planned,
    Purpose,
    RemoveWorker,
    UnloadSlots,
)
from services.autoscaler.holdings import Holdings
from services.autoscaler.loads import SlotLoads
from services.autoscaler.options import PolicyOptions
from services.autoscaler.state import PolicyState
from services.autoscaler.view import FleetView
from services.core.registry import Slot


class Plan:
    """Starts from what is seen, remembered and under way. `load`, `unload`, `add_worker` and
    `remove_worker` add actions; `holdings` and `loads` follow, so that the parts of the policy
    plan on top of one another and together keep to memory and to the last replica.

    Workers in `untouchable` (busy with an action, or failing) are neither loaded nor unloaded; an
    empty name in it stands for workers yet to come.
    """

    def __init__(
        self,
        options: PolicyOptions,
        state: PolicyState,
        view: FleetView,
        now: float,
        *,
        in_flight: Iterable[Action] = (),
        untouchable: frozenset[str] = frozenset(),
    ) -> None:
        self.options = options
        self.state = state
        self.view = view
        self.now = now
        self.loads = SlotLoads(view)
        self.holdings = Holdings(view)
        self.lacks_memory = False
        """Set where a hot slot found no memory."""
        self.loading: set[str] = set()
        """Workers that load replicas now, which makes them slower than their share of the work."""
        self._untouchable = set(untouchable)
        self._changed_at = dict(state.changed_at)
        self._since: dict[tuple[Hashable, ...], float] = {}
        self._loads: dict[tuple[str, Purpose], list[tuple[Slot, str]]] = {}
        self._unloads: dict[tuple[str, Purpose], list[tuple[Slot, str]]] = {}
        self._scaling: list[Planned] = []
        for action in in_flight:
            self._account(action)

    # What holds.

    def held_for(self, *condition: Hashable) -> float:
        """Tell that something is the case; for how many seconds it has been, round by round."""
        started = self._since[condition] = self.state.since.get(condition, self.now)
        return self.now - started

    def is_cooling(self, slot: Slot) -> bool:
        """Whether the number of its replicas has just been changed."""
        changed = self._changed_at.get(slot)
        return changed is not None and self.now - changed < self.options.cool_down_s

    @property
    def is_settling(self) -> bool:
        """Whether a worker has just come: what its replicas take from whom is still being learnt,
        and a fleet that needed one has no time to spare for loading."""
        joined = self.state.joined_at
        return joined is not None and self.now - joined < self.options.cool_down_s

    def is_extra(self, worker_id: str, slot: Slot) -> bool:
        """Loaded at run time, not what the worker came with."""
        base = self.state.base.get(worker_id)
        return base is None or slot not in base.slots

    def num_extras(self, worker_id: str) -> int:
        return sum(self.is_extra(worker_id, slot) for slot in self.holdings.of(worker_id))

    def hosts(self, worker_ids: Iterable[str]) -> set[str]:
        return {self.view.workers[name].host for name in worker_ids}

    # What may be done.

    def may_touch(self, worker_id: str) -> bool:
        return worker_id in self.holdings and worker_id not in self._untouchable

    def may_ask_for_worker(self) -> bool:
        """Whether asking for a further worker has not just failed."""
        return "" not in self._untouchable

    def can_load(self, worker_id: str, slot: Slot) -> bool:
        """Whether this worker could be told to load the slot, if it had the memory."""
        return (
            self.may_touch(worker_id)
            and slot not in self.holdings.of(worker_id)
            and self.view.ready[worker_id].slot_bytes > 0
            and slot not in _slots_on(self._unloads, worker_id)
            and len(_slots_on(self._loads, worker_id)) < self.options.max_slots_per_action
        )

    def can_unload(self, worker_id: str, slot: Slot) -> bool:
        """Whether another replica is left then, and another slot to this worker."""
        return (
            self.may_touch(worker_id)
            and self.holdings.is_held_now(worker_id, slot)
            and self.holdings.num_elsewhere(worker_id, slot) >= 1
            and self.holdings.num_held_now(worker_id) > 1
            and len(_slots_on(self._unloads, worker_id)) < self.options.max_slots_per_action
        )

    # What is to be done.

    def load(self, worker_id: str, slot: Slot, purpose: Purpose, reason: str) -> None:
        assert self.can_load(worker_id, slot) and self.holdings.has_room(worker_id)
        self._loads.setdefault((worker_id, purpose), []).append((slot, reason))
        self.holdings.hold(worker_id, slot)
        self.loads.replicate(slot, worker_id)
        self._changed_at[slot] = self.now

    def unload(self, worker_id: str, slot: Slot, purpose: Purpose, reason: str) -> None:
        assert self.can_unload(worker_id, slot)
        self._unloads.setdefault((worker_id, purpose), []).append((slot, reason))
        self.holdings.drop(worker_id, slot)
        self.loads.withdraw(slot, worker_id)
        self._changed_at[slot] = self.now

    def make_room(
        self, worker_id: str, cost: Callable[[str, Slot], tuple[float, ...] | None], why: str
    ) -> bool:
        """Room for one slot, if need be by unloading the one of least `cost` (None: it must stay).
        False, and nothing planned, where there is none."""
        holdings = self.holdings
        if holdings.has_room(worker_id):
            return True
        candidates = [
            (worth, slot)
            for slot in sorted(holdings.of(worker_id))
            if self.can_unload(worker_id, slot) and (worth := cost(worker_id, slot)) is not None
        ]
        if not candidates or holdings.free_bytes(worker_id) < 0:
            return False
        self.unload(worker_id, min(candidates)[1], "evict", why)
        return True

    def add_worker(self, slots: tuple[Slot, ...], reason: str) -> None:
        self._scaling.append(
            Planned(action=AddWorker(slots=slots), purpose="scale_out", reason=reason)
        )
        self.state = replace(self.state, scaled_at=self.now, awaited_since=self.now)

    def remove_worker(self, worker_id: str, reason: str) -> None:
        self._scaling.append(
            Planned(action=RemoveWorker(worker_id=worker_id), purpose="scale_in", reason=reason)
        )
        self.holdings.leave(worker_id)
        leaving_since = {**self.state.leaving_since, worker_id: self.now}
        self.state = replace(self.state, scaled_at=self.now, leaving_since=leaving_since)

    def has_purpose(self, *purposes: Purpose) -> bool:
        planned = {purpose for _, purpose in (*self._loads, *self._unloads)}
        return not planned.isdisjoint(purposes)

    # The outcome.

    def actions(self) -> tuple[Planned, ...]:
        """All of it; a worker's unloads come before its loads."""
        unloads = [
            _together(UnloadSlots(worker_id=name, slots=_sorted(items)), purpose, items)
            for (name, purpose), items in self._unloads.items()
        ]
        loads = [
            _together(LoadSlots(worker_id=name, slots=_sorted(items)), purpose, items)
            for (name, purpose), items in self._loads.items()
        ]
        return (*unloads, *loads, *self._scaling)

    def next_state(self) -> PolicyState:
        return replace(self.state, changed_at=self._changed_at, since=self._since)

    def _account(self, action: Action) -> None:
        """An action under way: its worker is busy, its loads count as held and as memory taken."""
        match action:
            case LoadSlots() if action.worker_id in self.holdings:
                self.loading.add(action.worker_id)
                self._untouchable.add(action.worker_id)
                for slot in set(action.slots) - self.holdings.of(action.worker_id):
                    self.holdings.hold(action.worker_id, slot)
            case UnloadSlots() if action.worker_id in self.holdings:
                self._untouchable.add(action.worker_id)
                for slot in set(action.slots) & self.holdings.of(action.worker_id):
                    self.holdings.drop(action.worker_id, slot, frees_memory=False)
            case RemoveWorker():
                self.holdings.leave(action.worker_id)
            case _:
                pass


_Items = list[tuple[Slot, str]]


def _slots_on(plans: dict[tuple[str, Purpose], _Items], worker_id: str) -> set[Slot]:
    return {slot for (name, _), items in plans.items() if name == worker_id for slot, _ in items}


def _sorted(items: _Items) -> tuple[Slot, ...]:
    return tuple(sorted(slot for slot, _ in items))


def _together(action: Action, purpose: Purpose, items: _Items) -> Planned:
    reason = items[0][1]
    if len(items) > 1:
        reason += f" (and {len(items) - 1} more such)"
    return Planned(action=action, purpose=purpose, reason=reason)
