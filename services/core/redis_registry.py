"""Leases in Redis or Valkey: one JSON value per record with a time to live, and an index set.

A store that hangs never hangs a caller: every call is over within `timeout_s`. The store may lose
anything at any time; each heartbeat writes record and index again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

from redis.exceptions import RedisError, ResponseError

from services.core.errors import UnavailableError
from services.core.redis_client import unbounded_redis
from services.core.registry import FleetSnapshot, ShardRecord, WorkerRecord, lease_id
from services.core.registry_json import RecordError, decode_record, encode_record

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class RedisRegistry:
    """A `Registry` in the namespace of one fleet. Used from one event loop."""

    def __init__(self, redis_url: str, *, fleet: str, timeout_s: float = 1.0) -> None:
        self._timeout_s = timeout_s
        self._index_key = f"expertfleet:{fleet}:leases"
        self._lease_prefix = f"expertfleet:{fleet}:lease:"
        self._logged: set[bytes] = set()
        self._redis = unbounded_redis(redis_url, connect_timeout_s=timeout_s)

    async def publish(self, record: WorkerRecord | ShardRecord, lease_s: float) -> None:
        await self._bounded(self._publish(record, lease_s))

    async def remove(self, record_id: str) -> None:
        await self._bounded(self._remove(record_id))

    async def snapshot(self) -> FleetSnapshot:
        """Alive leases. Values that are not records are skipped, and logged once."""
        return await self._bounded(self._snapshot())

    async def close(self) -> None:
        await self._redis.aclose()

    async def _publish(self, record: WorkerRecord | ShardRecord, lease_s: float) -> None:
        record_id = lease_id(record)
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.set(
                self._lease_prefix + record_id, encode_record(record), px=round(lease_s * 1000)
            )
            pipeline.sadd(self._index_key, record_id)
            written, added = await pipeline.execute(raise_on_error=False)
        if isinstance(added, ResponseError) and "WRONGTYPE" in str(added):
            # Something overwrote the index; as every process writes its own entry, it can go.
            logger.warning("registry: the index %s was no set and is made anew", self._index_key)
            await self._redis.delete(self._index_key)
            added = await self._redis.sadd(self._index_key, record_id)
        for reply in (written, added):
            if isinstance(reply, RedisError):
                raise reply

    async def _remove(self, record_id: str) -> None:
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.delete(self._lease_prefix + record_id)
            pipeline.srem(self._index_key, record_id)
            await pipeline.execute()

    async def _snapshot(self) -> FleetSnapshot:
        # The client answers in bytes, being built without decode_responses.
        names = sorted(cast("set[bytes]", await self._redis.smembers(self._index_key)))
        if not names:
            return FleetSnapshot()
        prefix = self._lease_prefix.encode()
        values = await self._redis.mget([prefix + name for name in names])
        payloads = cast("list[bytes | None]", values)
        ended = [name for name, payload in zip(names, payloads, strict=True) if payload is None]
        if ended:
            await self._redis.srem(self._index_key, *ended)
        records = [self._decode(payload) for payload in payloads if payload is not None]
        return FleetSnapshot.of(record for record in records if record is not None)

    def _decode(self, payload: bytes) -> WorkerRecord | ShardRecord | None:
        try:
            return decode_record(payload)
        except RecordError as error:
            if payload not in self._logged and len(self._logged) < 1000:
                self._logged.add(payload)
                logger.warning("registry: skipped %s", error.message)
            return None

    async def _bounded(self, call: Coroutine[Any, Any, _T]) -> _T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call
        except (RedisError, OSError, TimeoutError) as error:
            raise UnavailableError(
                f"the registry's store could not be used ({type(error).__name__}: {error}); "
                "check that the server of REDIS_URL is up"
            ) from error
