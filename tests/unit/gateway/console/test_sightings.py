from __future__ import annotations

from typing import Any

from services.core.registry import ShardRecord, WorkerRecord
from services.gateway.console.sightings import Sighting, Sightings
from tests.support.records import shard_record, worker_record


def new_sightings() -> Sightings[WorkerRecord]:
    return Sightings(overdue_s=3.0, kept_s=60.0)


def lease(written_at: float, **changes: Any) -> tuple[WorkerRecord]:
    return (worker_record(written_at=written_at, **changes),)


def only(sightings: Sightings[WorkerRecord]) -> Sighting[WorkerRecord]:
    (sighting,) = sightings.all()
    return sighting


def test_a_renewed_lease_is_seen_and_an_old_one_ages() -> None:
    sightings = new_sightings()
    sightings.add(lease(10.0), 10.4)
    sightings.add(lease(10.0), 11.4)
    assert (only(sightings).seen_at, only(sightings).is_lost) == (10.4, False)
    sightings.add(lease(11.5), 11.9)
    assert only(sightings).seen_at == 11.9


def test_a_killed_worker_is_lost_while_its_lease_still_runs_and_a_minute_after() -> None:
    sightings = new_sightings()
    sightings.add(lease(10.0), 10.0)
    sightings.add(lease(10.0), 13.5)
    assert (only(sightings).is_lost, only(sightings).lost_at) == (True, 13.5)
    sightings.add((), 15.0)
    sightings.add((), 73.0)
    assert only(sightings).is_lost
    sightings.add((), 74.0)
    assert sightings.all() == []


def test_a_lease_that_ran_out_between_two_readings_is_lost() -> None:
    sightings = new_sightings()
    sightings.add(lease(10.0), 10.0)
    sightings.add((), 16.0)
    assert only(sightings).is_lost


def test_a_lost_worker_that_comes_back_is_not_lost_but_its_loss_is_remembered() -> None:
    sightings = new_sightings()
    sightings.add(lease(10.0), 10.0)
    sightings.add(lease(10.0), 14.0)
    sightings.add(lease(20.0, started_at=19.0), 20.0)
    assert (only(sightings).is_lost, only(sightings).lost_at) == (False, 14.0)
    sightings.add(lease(80.0, started_at=19.0), 80.0)
    assert only(sightings).lost_at is None


def test_a_process_replaced_before_its_lease_was_overdue_was_lost() -> None:
    sightings = new_sightings()
    sightings.add(lease(10.0, started_at=1.0), 10.0)
    sightings.add(lease(11.5, started_at=11.0), 12.0)
    assert (only(sightings).is_lost, only(sightings).lost_at) == (False, 12.0)


def test_who_drains_or_takes_its_lease_back_is_not_lost() -> None:
    sightings = new_sightings()
    sightings.add(lease(10.0, state="draining"), 10.0)
    sightings.add((), 20.0)
    assert sightings.all() == []
    sightings.add(lease(30.0), 30.0)
    sightings.add((), 30.5)
    assert sightings.all() == []


def test_leases_without_a_time_are_seen_whenever_they_are_there() -> None:
    sightings: Sightings[ShardRecord] = Sightings(overdue_s=3.0)
    for now in (1.0, 100.0):
        sightings.add((shard_record(),), now)
        assert not sightings.all()[0].is_lost
    assert sightings.all()[0].seen_at == 100.0
