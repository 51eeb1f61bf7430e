"""Leases inside one process: for tests, and for a fleet that runs without a store."""

from __future__ import annotations

import time
from collections.abc import Callable

from services.core.registry import FleetSnapshot, ShardRecord, WorkerRecord, lease_id


class MemoryRegistry:
    """A `Registry` over a dictionary. `clock` gives seconds and never goes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._leases: dict[str, tuple[float, WorkerRecord | ShardRecord]] = {}

    async def publish(self, record: WorkerRecord | ShardRecord, lease_s: float) -> None:
        self._leases[lease_id(record)] = (self._clock() + lease_s, record)

    async def remove(self, record_id: str) -> None:
        self._leases.pop(record_id, None)

    async def snapshot(self) -> FleetSnapshot:
        now = self._clock()
        for key, (expires_at, _) in list(self._leases.items()):
            if expires_at <= now:
                self._leases.pop(key, None)
        return FleetSnapshot.of(record for _, record in list(self._leases.values()))

    async def close(self) -> None:
        self._leases.clear()
