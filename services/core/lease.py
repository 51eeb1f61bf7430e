"""Keeps a worker's or a shard's lease in the registry."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable

from services.core.errors import UnavailableError
from services.core.registry import Registry, ShardRecord, WorkerRecord

_logger = logging.getLogger(__name__)


class Lease:
    """Publishes `make_record()` at once, then each heartbeat, and at every `publish`.

    A store that is away is logged once and tried again at the next heartbeat: the process goes on,
    and shards go on with what they last saw.
    """

    def __init__(
        self,
        registry: Registry,
        make_record: Callable[[], WorkerRecord | ShardRecord],
        *,
        heartbeat_s: float,
        lease_s: float,
    ) -> None:
        self._registry = registry
        self._make_record = make_record
        self._heartbeat_s = heartbeat_s
        self._lease_s = lease_s
        self._is_away = False
        self._publishing = asyncio.Lock()
        self._heart: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.publish()
        self._heart = asyncio.create_task(self._beat(), name="heartbeat")

    async def publish(self) -> None:
        """Write the lease as things are now; a store that is away is not an error."""
        async with self._publishing:
            try:
                record = dataclasses.replace(self._make_record(), written_at=time.time())
                await self._registry.publish(record, self._lease_s)
            except UnavailableError as error:
                if not self._is_away:
                    _logger.warning("the lease could not be written, trying on: %s", error.message)
                self._is_away = True
                return
        if self._is_away:
            _logger.info("the lease is written again")
        self._is_away = False

    async def end(self, record_id: str) -> None:
        """Drop the lease and stop beating."""
        if self._heart is not None:
            self._heart.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._heart
        try:
            await self._registry.remove(record_id)
        except UnavailableError as error:
            _logger.warning(
                "the lease could not be removed and will run out in %.0f s: %s",
                self._lease_s,
                error.message,
            )

    async def _beat(self) -> None:
        """Never ends by itself: without its lease a process is lost to the fleet."""
        while True:
            await asyncio.sleep(self._heartbeat_s)
            try:
                await self.publish()
            except Exception as error:
                _logger.error("a heartbeat failed, trying on", exc_info=error)
