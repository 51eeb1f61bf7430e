"""A fleet given as a list of addresses: workers are found by asking each to describe itself.

There are no leases: a worker that does not answer is not in the snapshot. Records published by
this process (its own shard) are kept in memory, so that they show in its own snapshots.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import grpc.aio

from protos import experts_pb2
from services.core.describe import describe_worker
from services.core.errors import ConfigurationError
from services.core.memory_registry import MemoryRegistry
from services.core.registry import FleetSnapshot, ShardRecord, WorkerRecord, WorkerStateName
from services.core.tls import PeerTls, open_channel
from services.core.tls_diagnosis import why_refused

_logger = logging.getLogger(__name__)

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

    def __init__(
        self, endpoints: Sequence[str], *, timeout_s: float = 1.0, tls: PeerTls | None = None
    ) -> None:
        self._tls = tls
        self._refusals: dict[str, str] = {}
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
            channel = self._channels[endpoint] = open_channel(
                endpoint, self._tls, [("grpc.max_reconnect_backoff_ms", 1000)]
            )
        try:
            description = await describe_worker(channel, timeout_s=self._timeout_s)
        except grpc.aio.AioRpcError:
            await self._log_refusal(endpoint)
            if self._tls is not None and self._channels.get(endpoint) is channel:
                # Its certificate may be an old one. Others may wait for their answers on it.
                await self._channels.pop(endpoint).close(self._timeout_s)
            return None
        self._refusals.pop(endpoint, None)
        return record_from_description(description, endpoint)

    async def _log_refusal(self, endpoint: str) -> None:
        """Once for each reason; nobody else asks a worker that is not in a snapshot."""
        why = await why_refused(endpoint, self._tls, timeout_s=self._timeout_s)
        if why is not None and why != self._refusals.get(endpoint):
            self._refusals[endpoint] = why
            _logger.error("worker at %s %s", endpoint, why)
