"""A small fleet as a console sees it, and the console's parts over it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from services.core.errors import ExpertfleetError
from services.core.model_config import load_model_config
from services.core.registry import FleetSnapshot, ShardRecord, WorkerRecord
from services.gateway.console.activity import Activity
from services.gateway.console.feed import ConsoleFeed, nobody_counts
from services.gateway.console.fleet_state import FleetState
from services.gateway.console.view import ViewBuilder
from services.gateway.intake import Intake


class FixedRegistry:
    """A registry whose snapshot the test sets; counts how often it is read."""

    def __init__(self, *records: WorkerRecord | ShardRecord) -> None:
        self.error: ExpertfleetError | None = None
        self.num_reads = 0
        self.set(records)

    def set(self, records: Iterable[WorkerRecord | ShardRecord]) -> None:
        self.current = FleetSnapshot.of(records)

    async def publish(self, record: WorkerRecord | ShardRecord, lease_s: float) -> None:
        raise NotImplementedError

    async def remove(self, record_id: str) -> None:
        raise NotImplementedError

    async def snapshot(self) -> FleetSnapshot:
        self.num_reads += 1
        if self.error is not None:
            raise self.error
        return self.current

    async def close(self) -> None:
        return


def fleet_state(*, has_store: bool = True, overdue_s: float = 3.0) -> FleetState:
    return FleetState(overdue_s=overdue_s, long_s=30.0, has_store=has_store)


def builder(model_folder: Path) -> ViewBuilder:
    return ViewBuilder(
        model_name="tiny",
        config=load_model_config(model_folder),
        gateway="here/1",
        has_admin=False,
        trace_url=None,
    )


def feed_of(
    registry: FixedRegistry | None,
    model_folder: Path,
    *,
    activity: Activity | None = None,
    max_listeners: int = 4,
    interval_s: float = 0.02,
) -> ConsoleFeed:
    return ConsoleFeed(
        registry,
        fleet_state(has_store=registry is not None, overdue_s=1e9),
        activity or Activity(),
        Intake(max_requests=9, max_bytes=9),
        builder(model_folder),
        count_sessions=nobody_counts,
        max_listeners=max_listeners,
        interval_s=interval_s,
        idle_interval_s=60.0,
    )
