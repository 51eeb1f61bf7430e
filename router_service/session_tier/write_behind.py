"""The bounded queue between the engine, which never waits, and the session store, which may."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

from services.core.errors import ExpertfleetError
from services.sessions.store import SessionRef, SessionStore, StoredBlock

PUT_BYTES: Final = 16 << 20
"""Blocks of one session that are queued together are put together, up to about this many bytes."""
PUT_TIMEOUT_S: Final = 30.0
_WRITE_OVERHEAD_BYTES: Final = 512

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionWrite:
    """Blocks for a session that is now `num_tokens` long, and stored ones that it uses too."""

    session: SessionRef
    num_tokens: int
    ttl_s: float
    blocks: tuple[StoredBlock, ...] = ()
    stored_hashes: tuple[bytes, ...] = ()

    @property
    def num_bytes(self) -> int:
        """What it counts for in the queue: its payloads and a little for itself."""
        payloads = sum(len(block.payload) for block in self.blocks)
        return payloads + _WRITE_OVERHEAD_BYTES + sum(map(len, self.stored_hashes))


class WriteBehind:
    """Takes writes from any thread and puts them one after another on the loop of `run`.

    When more than `max_bytes` wait (what is being put included), new writes are dropped and
    counted: their blocks are recomputed one day. A store that fails loses the writes at hand, is
    logged once, and never disturbs who wrote. Counts are of blocks, since start.
    """

    def __init__(self, store: SessionStore, *, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._queue: deque[SessionWrite] = deque()
        self._lock = threading.Lock()
        self._queued_bytes = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work = asyncio.Event()
        self._progress = asyncio.Event()
        self._is_failing = False
        self.num_stored = 0
        self.num_dropped = 0
        self.num_failed = 0

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    def enqueue(self, write: SessionWrite) -> bool:
        """Queue a write. False when it did not fit and was dropped."""
        num_bytes = write.num_bytes
        with self._lock:
            if self._queued_bytes + num_bytes > self._max_bytes:
                self.num_dropped += len(write.blocks)
                return False
            self._queue.append(write)
            self._queued_bytes += num_bytes
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._work.set)
        return True

    async def run(self) -> None:
        """Write until cancelled."""
        self._loop = asyncio.get_running_loop()
        while True:
            self._work.clear()
            while group := self._next_group():
                await self._put(group)
                with self._lock:
                    self._queued_bytes -= sum(write.num_bytes for write in group)
                self._progress.set()
            await self._work.wait()

    async def drain(self, timeout_s: float) -> bool:
        """Wait, on the loop of `run`, until all that was queued is written. False on time-out."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._queued_bytes:
                    self._progress.clear()
                    await self._progress.wait()
        except TimeoutError:
            return False
        return True

    def _next_group(self) -> list[SessionWrite]:
        """The oldest write and those right behind it of the same session."""
        group: list[SessionWrite] = []
        num_bytes = 0
        with self._lock:
            while self._queue and num_bytes < PUT_BYTES:
                if group and self._queue[0].session != group[0].session:
                    break
                group.append(self._queue.popleft())
                num_bytes += group[-1].num_bytes
        return group

    async def _put(self, group: list[SessionWrite]) -> None:
        last = group[-1]
        blocks = [block for write in group for block in write.blocks]
        hashes = [block_hash for write in group for block_hash in write.stored_hashes]
        try:
            async with asyncio.timeout(PUT_TIMEOUT_S):
                if hashes:
                    await self._store.touch(
                        last.session, hashes, num_tokens=last.num_tokens, ttl_s=last.ttl_s
                    )
                if blocks or not hashes:
                    await self._store.put(
                        last.session, blocks, num_tokens=last.num_tokens, ttl_s=last.ttl_s
                    )
        except (ExpertfleetError, OSError, TimeoutError) as error:
            self.num_failed += len(blocks)
            if not self._is_failing:
                _logger.warning(
                    "session blocks cannot be stored, they will be recomputed: %s", error
                )
            self._is_failing = True
            return
        self.num_stored += len(blocks)
        if self._is_failing:
            _logger.info("session blocks are stored again; %d were lost", self.num_failed)
        self._is_failing = False
