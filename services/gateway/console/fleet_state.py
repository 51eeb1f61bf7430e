"""What the gateway knows of the fleet for its console: readings of the registry, put together."""

from __future__ import annotations

from typing import Literal

from services.core.registry import FleetSnapshot, ShardRecord, WorkerRecord
from services.gateway.console.sightings import Sightings
from services.gateway.console.windows import FleetWindows

Store = Literal["ok", "away", "none"]


class FleetState:
    """Takes in readings with `add`; `miss` where the store was away, which changes nothing else.

    `read_at` is the Unix time of the last reading, at which all below stands; 0 before it.
    """

    def __init__(self, *, overdue_s: float, long_s: float, has_store: bool) -> None:
        self.windows = FleetWindows(long_s=long_s, silent_s=overdue_s)
        self.workers = Sightings[WorkerRecord](overdue_s=overdue_s)
        self.shards = Sightings[ShardRecord](overdue_s=overdue_s)
        self.snapshot = FleetSnapshot()
        self.store: Store = "away" if has_store else "none"
        self.read_at = 0.0

    def add(self, snapshot: FleetSnapshot, now: float) -> None:
        self.store, self.snapshot, self.read_at = "ok", snapshot, now
        self.windows.add(snapshot, now)
        self.workers.add(snapshot.workers, now)
        self.shards.add(snapshot.shards, now)

    def miss(self) -> None:
        self.store = "away"
