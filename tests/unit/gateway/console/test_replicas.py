from __future__ import annotations

from typing import Any

import pytest

from services.core.errors import (
    InvalidRequestError,
    NotFoundError,
    WorkerMemoryError,
    WorkerRefusedError,
)
from services.core.registry import WorkerRecord
from services.gateway.console.replicas import plan_steps
from tests.support.records import worker_record

SLOT, OTHER = (1, 3), (0, 0)
ROOM = {"slot_bytes": 100, "memory_free_bytes": 250}
FULL = {"slot_bytes": 100, "memory_free_bytes": 99}


def holder(name: str, **changes: Any) -> WorkerRecord:
    return worker_record(name, [SLOT, OTHER], **ROOM | changes)


def without(name: str, **changes: Any) -> WorkerRecord:
    return worker_record(name, [OTHER], **ROOM | changes)


def planned(
    *workers: WorkerRecord, replicas: int, worker_id: str | None = None
) -> list[tuple[str, str]]:
    steps = plan_steps(workers, SLOT, replicas, worker_id)
    return [(step.action, step.worker.worker_id) for step in steps]


def test_nothing_is_done_where_the_number_is_right() -> None:
    assert planned(holder("a"), without("b"), replicas=1) == []


def test_replicas_go_to_other_hosts_first_and_then_to_most_memory() -> None:
    fleet = (
        holder("a", host="one"),
        without("b", host="one", memory_free_bytes=900),
        without("c", host="two", memory_free_bytes=200),
        without("d", host="one", memory_free_bytes=300),
    )
    assert planned(*fleet, replicas=4) == [("load", "c"), ("load", "b"), ("load", "d")]


def test_a_named_worker_loads_or_unloads() -> None:
    fleet = (holder("a"), holder("b"), without("c"), without("d", memory_free_bytes=900))
    assert planned(*fleet, replicas=3, worker_id="c") == [("load", "c")]
    assert planned(*fleet, replicas=1, worker_id="b") == [("unload", "b")]
    with pytest.raises(InvalidRequestError, match="c holds no replica"):
        planned(*fleet, replicas=1, worker_id="c")
    with pytest.raises(InvalidRequestError, match="leave worker_id out"):
        planned(*fleet, replicas=4, worker_id="c")
    with pytest.raises(NotFoundError, match="a, b, c, d"):
        planned(*fleet, replicas=3, worker_id="e")
    with pytest.raises(WorkerRefusedError, match="a is not a ready worker without it"):
        planned(*fleet, replicas=3, worker_id="a")


def test_the_fullest_worker_gives_its_replica_up_and_the_last_one_stays() -> None:
    fleet = (holder("a"), holder("b", memory_free_bytes=0), holder("c", state="draining"))
    assert planned(*fleet, replicas=1) == [("unload", "b")]
    with pytest.raises(InvalidRequestError, match="last replica of expert 3 of layer 1"):
        planned(*fleet, replicas=0)


def test_a_worker_that_holds_nothing_else_is_left_alone() -> None:
    only = worker_record("b", [SLOT], **ROOM)
    assert planned(holder("a"), only, replicas=1) == [("unload", "a")]
    with pytest.raises(WorkerRefusedError, match="drain a worker"):
        planned(worker_record("a", [SLOT], **ROOM), only, replicas=1)


def test_without_memory_or_workers_it_says_what_is_missing() -> None:
    with pytest.raises(WorkerMemoryError, match=r"takes 100 bytes.* at most 99 are left"):
        planned(holder("a"), without("b", **FULL), replicas=2)
    with pytest.raises(WorkerRefusedError, match="no further ready worker"):
        planned(holder("a"), without("b", state="loading"), replicas=2)


def test_where_a_worker_does_not_tell_a_slots_size_its_weights_do() -> None:
    untold = without("b", slot_bytes=0, weight_bytes=300, memory_free_bytes=299)
    with pytest.raises(WorkerMemoryError, match="takes 300 bytes"):
        planned(holder("a"), untold, replicas=2)
