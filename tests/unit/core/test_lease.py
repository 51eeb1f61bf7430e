from __future__ import annotations

import logging

import pytest

from services.core.errors import UnavailableError
from services.core.lease import Lease
from services.core.registry import FleetSnapshot, ShardRecord, WorkerRecord
from tests.support.eventually import eventually


class FlakyRegistry:
    """Keeps what was published; is away while `is_away`."""

    def __init__(self) -> None:
        self.is_away = False
        self.published: list[WorkerRecord | ShardRecord] = []
        self.removed: list[str] = []
        self.num_calls = 0
        self.fails_at_call = 0

    async def publish(self, record: WorkerRecord | ShardRecord, lease_s: float) -> None:
        self.num_calls += 1
        if self.num_calls == self.fails_at_call:
            raise KeyError("unforeseen")
        if self.is_away:
            raise UnavailableError("no store")
        assert lease_s == 5.0
        self.published.append(record)

    async def remove(self, record_id: str) -> None:
        if self.is_away:
            raise UnavailableError("no store")
        self.removed.append(record_id)

    async def snapshot(self) -> FleetSnapshot:
        return FleetSnapshot.of(self.published)

    async def close(self) -> None: ...


def make_lease(registry: FlakyRegistry, heartbeat_s: float = 0.01) -> Lease:
    def record() -> WorkerRecord:
        return WorkerRecord(
            worker_id="w",
            endpoint="127.0.0.1:1",
            state="ready",
            slots=frozenset({(0, 0)}),
            device="cpu",
            pid=1,
            host="h",
            started_at=0.0,
            weight_bytes=1,
            memory_free_bytes=1,
            num_frames=registry.num_calls,
        )

    return Lease(registry, record, heartbeat_s=heartbeat_s, lease_s=5.0)


async def test_a_fresh_record_is_written_at_start_and_each_heartbeat() -> None:
    registry = FlakyRegistry()
    lease = make_lease(registry)
    await lease.start()
    assert len(registry.published) == 1
    await eventually(lambda: len(registry.published) >= 3)
    frames = [r.num_frames for r in registry.published if isinstance(r, WorkerRecord)]
    assert frames == sorted(set(frames))
    await lease.end("w")


async def test_the_end_removes_the_lease_and_stops_the_heart() -> None:
    registry = FlakyRegistry()
    lease = make_lease(registry)
    await lease.start()
    await lease.end("w")
    assert registry.removed == ["w"]
    published = len(registry.published)
    with pytest.raises(TimeoutError):
        await eventually(lambda: len(registry.published) > published, timeout_s=0.1)


async def test_an_outage_is_logged_once_and_the_heart_beats_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    registry = FlakyRegistry()
    registry.is_away = True
    lease = make_lease(registry)
    await lease.start()
    await eventually(lambda: registry.num_calls >= 4)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    registry.is_away = False
    await eventually(lambda: bool(registry.published))
    await eventually(lambda: [r.levelname for r in caplog.records] == ["WARNING", "INFO"])
    await lease.end("w")


async def test_no_error_stops_the_heart(caplog: pytest.LogCaptureFixture) -> None:
    registry = FlakyRegistry()
    registry.fails_at_call = 2
    lease = make_lease(registry)
    await lease.start()
    await eventually(lambda: len(registry.published) >= 3)
    (record,) = caplog.records
    assert (record.levelname, record.exc_info is not None) == ("ERROR", True)
    await lease.end("w")


async def test_a_store_that_is_away_at_the_end_is_no_error() -> None:
    registry = FlakyRegistry()
    lease = make_lease(registry)
    await lease.start()
    registry.is_away = True
    await lease.end("w")
    assert registry.removed == []
