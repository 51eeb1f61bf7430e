"""Which worker is to take, or to give up, a replica of one expert. Pure: no clock, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from services.core.errors import (
    InvalidRequestError,
    NotFoundError,
    WorkerMemoryError,
    WorkerRefusedError,
)
from services.core.registry import Slot, WorkerRecord

Action = Literal["load", "unload"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStep:
    """One worker loads or unloads the slot."""

    action: Action
    worker: WorkerRecord


def holders_of(workers: Sequence[WorkerRecord], slot: Slot) -> list[WorkerRecord]:
    return [worker for worker in workers if worker.state == "ready" and slot in worker.slots]


def find_worker(workers: Sequence[WorkerRecord], worker_id: str) -> WorkerRecord:
    """Raises `NotFoundError`."""
    for worker in workers:
        if worker.worker_id == worker_id:
            return worker
    known = ", ".join(worker.worker_id for worker in workers) or "none"
    raise NotFoundError(
        f"There is no worker {worker_id!r}; workers with a lease: {known}", param="worker_id"
    )


def plan_steps(
    workers: Sequence[WorkerRecord], slot: Slot, num_replicas: int, worker_id: str | None
) -> list[ReplicaStep]:
    """The steps that make `num_replicas` ready replicas; none where there are that many.

    With `worker_id` it is that worker that loads or unloads, so one step must do. Raises
    `NotFoundError`, `InvalidRequestError`, `WorkerMemoryError` where no memory is left for as many,
    and `WorkerRefusedError` where workers have nothing else to hold.
    """
    holders = holders_of(workers, slot)
    difference = num_replicas - len(holders)
    if worker_id is not None:
        find_worker(workers, worker_id)
        if abs(difference) > 1:
            raise InvalidRequestError(
                f"{_name(slot)} has {len(holders)} ready replicas; one worker cannot make them "
                f"{num_replicas}: leave worker_id out",
                param="replicas",
            )
    if difference > 0:
        return _loads(workers, slot, difference, worker_id)
    return _unloads(holders, slot, -difference, worker_id) if difference else []


def _loads(
    workers: Sequence[WorkerRecord], slot: Slot, count: int, worker_id: str | None
) -> list[ReplicaStep]:
    """To the workers with most memory, first those on hosts without a replica."""
    hosts = {worker.host for worker in holders_of(workers, slot)}
    others = [
        worker
        for worker in workers
        if worker.state == "ready"
        and slot not in worker.slots
        and worker_id in (None, worker.worker_id)
    ]
    if len(others) < count:
        who = "there is no further" if worker_id is None else f"{worker_id} is not a"
        raise WorkerRefusedError(
            f"{count} more of {_name(slot)} cannot be had: {who} ready worker without it"
        )
    fitting = [worker for worker in others if worker.memory_free_bytes >= slot_bytes(worker)]
    if len(fitting) < count:
        wanted = max(slot_bytes(worker) for worker in others)
        left = max(worker.memory_free_bytes for worker in others)
        raise WorkerMemoryError(
            f"{count} more of {_name(slot)} cannot be had: it takes {wanted} bytes in a worker, "
            f"and at most {left} are left in one that does not hold it"
        )
    fitting.sort(key=lambda w: (w.host in hosts, -w.memory_free_bytes, w.worker_id))
    return [ReplicaStep(action="load", worker=worker) for worker in fitting[:count]]


def _unloads(
    holders: list[WorkerRecord], slot: Slot, count: int, worker_id: str | None
) -> list[ReplicaStep]:
    """From the workers with least memory; never a worker's only slot."""
    if count >= len(holders):
        raise InvalidRequestError(
            f"The last replica of {_name(slot)} stays: replicas must be 1 or more", param="replicas"
        )
    named = [worker for worker in holders if worker_id in (None, worker.worker_id)]
    if not named:
        raise InvalidRequestError(
            f"{worker_id} holds no replica of {_name(slot)}", param="worker_id"
        )
    able = [worker for worker in named if len(worker.slots) > 1]
    if len(able) < count:
        raise WorkerRefusedError(
            f"{_name(slot)} is all that its holders hold: drain a worker instead"
        )
    able.sort(key=lambda w: (w.memory_free_bytes, w.worker_id))
    return [ReplicaStep(action="unload", worker=worker) for worker in able[:count]]


def slot_bytes(worker: WorkerRecord) -> int:
    """Of one slot in this worker's memory."""
    if worker.slot_bytes or not worker.slots:
        return worker.slot_bytes
    return -(-worker.weight_bytes // len(worker.slots))


def _name(slot: Slot) -> str:
    return f"expert {slot[1]} of layer {slot[0]}"
