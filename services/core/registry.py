"""Who is alive: leases of expert workers and attention shards.

A worker writes its record at start and again each heartbeat; a record whose lease ran out is gone.
The registry is never needed for correctness: a reader goes on with what it last saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

WorkerStateName = Literal["loading", "ready", "draining"]
Slot = tuple[int, int]
"""(layer, expert): one logical expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """One expert worker's lease. `endpoint` is host:port of its gRPC server.

    `tokens` counts assignments computed per slot since start; `queue_ms` and `compute_ms` are
    means over the last heartbeat interval. `started_at` is Unix seconds. `memory_free_bytes` is
    what further slots may take: the limit less what is held, and no more than the device has free.
    `slot_bytes` are the weights of one slot in memory. `busy_s` are seconds of computing since
    start, of one frame or several together, on `num_threads` threads. `written_at` is the Unix time
    at which the lease was written, by the writer's clock; 0 if unknown.
    """

    worker_id: str
    endpoint: str
    state: WorkerStateName
    slots: frozenset[Slot]
    device: str
    pid: int
    host: str
    started_at: float
    weight_bytes: int
    memory_free_bytes: int
    metrics_endpoint: str | None = None
    tokens: Mapping[Slot, int] = field(default_factory=dict)
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    num_frames: int = 0
    slot_bytes: int = 0
    memory_limit_bytes: int = 0
    busy_s: float = 0.0
    num_threads: int = 0
    written_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """One attention shard's lease: its engine's load, and the tokens its gate sent per slot.

    `endpoint` is host:port of its gRPC server, which gateways send requests to. `max_num_seqs` is
    how many sequences it runs at most; 0 if unknown. `step_s` are the seconds that its steps took
    since it started, `full_s` the same with each step weighted by how full it was (1: as many
    tokens as gain anything by being computed together), and `experts_s` what of `step_s` it waited
    for its experts.
    """

    shard_id: str
    pid: int
    host: str
    started_at: float
    num_running: int
    num_waiting: int
    waiting_tokens: int
    kv_blocks_used: int
    kv_blocks_total: int
    num_generated_tokens: int
    num_prefilled_tokens: int
    metrics_endpoint: str | None = None
    endpoint: str | None = None
    expert_load: Mapping[Slot, int] = field(default_factory=dict)
    max_num_seqs: int = 0
    step_s: float = 0.0
    full_s: float = 0.0
    experts_s: float = 0.0
    written_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSnapshot:
    """All leases that were alive when it was read."""

    workers: tuple[WorkerRecord, ...] = ()
    shards: tuple[ShardRecord, ...] = ()

    @staticmethod
    def of(records: Iterable[WorkerRecord | ShardRecord]) -> FleetSnapshot:
        """A snapshot with the records in the order of their ids."""
        ordered = sorted(records, key=lease_id)
        return FleetSnapshot(
            workers=tuple(record for record in ordered if isinstance(record, WorkerRecord)),
            shards=tuple(record for record in ordered if isinstance(record, ShardRecord)),
        )


def lease_id(record: WorkerRecord | ShardRecord) -> str:
    """The id a lease is kept and removed under."""
    return record.worker_id if isinstance(record, WorkerRecord) else record.shard_id


class Registry(Protocol):
    """Where leases are kept. Methods raise `UnavailableError` when the store cannot be reached."""

    async def publish(self, record: WorkerRecord | ShardRecord, lease_s: float) -> None: ...

    async def remove(self, record_id: str) -> None:
        """Drop a worker's or a shard's lease at once; nothing happens if there is none."""
        ...

    async def snapshot(self) -> FleetSnapshot: ...

    async def close(self) -> None: ...
