"""Lease records for tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from services.core.registry import ShardRecord, Slot, WorkerRecord


def worker_record(
    worker_id: str = "worker-0",
    slots: Iterable[Slot] = ((0, 0),),
    **changes: Any,
) -> WorkerRecord:
    values: dict[str, Any] = {
        "worker_id": worker_id,
        "endpoint": "127.0.0.1:50051",
        "state": "ready",
        "slots": frozenset(slots),
        "device": "cpu",
        "pid": 1234,
        "host": "node-a",
        "started_at": 1700000000.5,
        "weight_bytes": 1 << 33,
        "memory_free_bytes": 1 << 34,
    }
    return WorkerRecord(**values | changes)


def shard_record(shard_id: str = "shard-0", **changes: Any) -> ShardRecord:
    values: dict[str, Any] = {
        "shard_id": shard_id,
        "pid": 4321,
        "host": "node-a",
        "started_at": 1700000001.0,
        "num_running": 3,
        "num_waiting": 2,
        "waiting_tokens": 100,
        "kv_blocks_used": 10,
        "kv_blocks_total": 64,
        "num_generated_tokens": 5,
        "num_prefilled_tokens": 7,
    }
    return ShardRecord(**values | changes)
