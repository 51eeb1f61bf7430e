"""A fleet given as a list of addresses: workers are found by asking each to describe itself.

There are no leases: a worker that does not answer is not in the snapshot. Records published by
this process (its own shard) are kept in memory, so that they show in its own snapshots.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc.aio

from protos import experts_pb2
from services.core.describe import describe_worker
from services.core.errors import ConfigurationError
from services.core.memory_registry import MemoryRegistry
from services.core.registry import FleetSnapshot, ShardRecord, WorkerRecord, WorkerStateName

_STATES: dict[int, WorkerStateName] = {
    experts_pb2.WORKER_STATE_LOADING: "loading",
    experts_pb2.WORKER_STATE_READY: "ready",
    experts_pb2.WORKER_STATE_DRAINING: "draining",
}


def parse_endpoints(text: str) -> tuple[str, ...]:
    """ "host:port,host:port" -> its parts. Raises `ConfigurationError` naming the bad one."""
    endpoints = tuple(part.strip() for part in text.split(",") if part.strip())
    for endpoint in endpoints:
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise ConfigurationError(
                f"EXPERTFLEET_WORKERS holds {endpoint!r}, which is not host:port", setting="workers"
            )
    if len(set(endpoints)) < len(endpoints):
        raise ConfigurationError(
            f"EXPERTFLEET_WORKERS={text!r} names an address twice", setting="workers"
        )
    return endpoints


def record_from_description(
    description: experts_pb2.DescribeResponse, endpoint: str
) -> WorkerRecord:
    """What a worker says of itself, as a record; what only a lease knows is 0."""
    return WorkerRecord(
        worker_id=description.worker_id,
        endpoint=endpoint,
        state=_STATES.get(description.state, "loading"),
        slots=frozenset((slot.layer, slot.expert) for slot in description.slots),
        device=description.device,
        pid=0,
        host=endpoint.rpartition(":")[0],
        started_at=0.0,
        weight_bytes=description.weight_bytes,
        memory_free_bytes=description.memory_free_bytes,
        slot_bytes=description.slot_bytes,
        memory_limit_bytes=description.memory_limit_bytes,
    )


class StaticRegistry:
    """A `Registry` over fixed addresses. Used from one event loop."""

    def __init__(self, endpoints: Sequence[str], *, timeout_s: float = 1.0) -> None:
        self._endpoints = tuple(endpoints)
        self._timeout_s = timeout_s
        self._own = MemoryRegistry()
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def publish(self, record: WorkerRecord | ShardRecord, lease_s: float) -> None:
        await self._own.publish(record, lease_s)

    async def remove(self, record_id: str) -> None:
        await self._own.remove(record_id)

    async def snapshot(self) -> FleetSnapshot:
        described = await asyncio.gather(*map(self._describe, self._endpoints))
        own = await self._own.snapshot()
        return FleetSnapshot.of(
            [record for record in described if record is not None] + list(own.shards)
        )

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close(None)
        self._channels.clear()

    async def _describe(self, endpoint: str) -> WorkerRecord | None:
        channel = self._channels.get(endpoint)
        if channel is None:
            channel = self._channels[endpoint] = grpc.aio.insecure_channel(
                endpoint, options=[("grpc.max_reconnect_backoff_ms", 1000)]
            )
        try:
            description = await describe_worker(channel, timeout_s=self._timeout_s)
        except grpc.aio.AioRpcError:
            return None
        return record_from_description(description, endpoint)
