"""Who holds which slots, and the memory left, while a plan is drawn up."""

from __future__ import annotations

from collections import defaultdict

from services.autoscaler.view import FleetView
from services.core.registry import Slot


class Holdings:
    """Begins as the ready workers are seen and follows what is planned.

    Workers on the same device share its memory and then each report the same bytes, so the bytes of
    a device are counted as well as those of a worker.
    """

    def __init__(self, view: FleetView) -> None:
        self._workers = view.ready
        self._held = {name: set(worker.slots) for name, worker in view.ready.items()}
        self._holders: defaultdict[Slot, set[str]] = defaultdict(set)
        self._free = {name: worker.free_bytes for name, worker in view.ready.items()}
        self._pool_free: dict[tuple[str, str], int] = {}
        for worker in view.ready.values():
            pool = worker.memory_pool
            self._pool_free[pool] = max(self._pool_free.get(pool, 0), worker.free_bytes)
            for slot in worker.slots:
                self._holders[slot].add(worker.worker_id)

    def __contains__(self, worker_id: str) -> bool:
        """Whether the worker is ready, and is to stay."""
        return worker_id in self._held

    def of(self, worker_id: str) -> frozenset[Slot]:
        return frozenset(self._held.get(worker_id, ()))

    def holders(self, slot: Slot) -> frozenset[str]:
        """Ready workers that hold it, or will when the plan is done."""
        return frozenset(self._holders.get(slot, ()))

    def num_elsewhere(self, worker_id: str, slot: Slot) -> int:
        """Other workers that hold it already and keep it: a load under way may still fail."""
        others = self._holders[slot] - {worker_id}
        return sum(slot in self._workers[name].slots for name in others)

    def is_held_now(self, worker_id: str, slot: Slot) -> bool:
        """Whether the worker holds it already, and is to keep it."""
        return slot in self.of(worker_id) and slot in self._workers[worker_id].slots

    def num_held_now(self, worker_id: str) -> int:
        return len(self.of(worker_id) & self._workers[worker_id].slots)

    def free_bytes(self, worker_id: str) -> int:
        pool = self._workers[worker_id].memory_pool
        return min(self._free[worker_id], self._pool_free[pool])

    def has_room(self, worker_id: str) -> bool:
        """For one slot more; never where a slot's bytes are unknown."""
        slot_bytes = self._workers[worker_id].slot_bytes
        return 0 < slot_bytes <= self.free_bytes(worker_id)

    def hold(self, worker_id: str, slot: Slot) -> None:
        self._held[worker_id].add(slot)
        self._holders[slot].add(worker_id)
        self._take(worker_id, self._workers[worker_id].slot_bytes)

    def drop(self, worker_id: str, slot: Slot, *, frees_memory: bool = True) -> None:
        self._held[worker_id].discard(slot)
        self._holders[slot].discard(worker_id)
        if frees_memory:
            self._take(worker_id, -self._workers[worker_id].slot_bytes)

    def leave(self, worker_id: str) -> None:
        """The worker ends; its memory is not counted on."""
        for slot in self._held.pop(worker_id, ()):
            self._holders[slot].discard(worker_id)

    def _take(self, worker_id: str, num_bytes: int) -> None:
        self._free[worker_id] -= num_bytes
        self._pool_free[self._workers[worker_id].memory_pool] -= num_bytes
