"""The bounded queue between the engine, which never waits, and the session store, which may."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from services.core.errors import ExpertfleetError
from services.sessions.store import SessionRef, SessionStore, StoredBlock

PUT_BYTES: Final = 16 << 20
"""Blocks of one session that are queued together are put together, up to about this many bytes."""
CHECKPOINT_BYTES: Final = 4 << 20
"""Of checkpoints so many bytes are put together: what a session's blocks may have to wait for."""
CHECKPOINT_PAUSE_S: Final = 0.2
"""Checkpoints are gathered for so long: what a short request begins and ends meanwhile is not put,
and what is put is put in fewer round trips."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWrite:
    """Blocks of running sequences, and hashes of blocks that no running sequence needs any more."""

    ttl_s: float
    blocks: tuple[StoredBlock, ...] = ()
    forgotten_hashes: tuple[bytes, ...] = ()

    @property
    def num_bytes(self) -> int:
        payloads = sum(len(block.payload) for block in self.blocks)
        return payloads + _WRITE_OVERHEAD_BYTES + sum(map(len, self.forgotten_hashes))


class WriteBehind:
    """Takes writes from any thread and puts them one after another on the loop of `run`.

    When more than `max_bytes` wait (what is being put included), new writes are dropped and
    counted: their blocks are recomputed one day. Checkpoints have half of that room, are put when
    no session's blocks wait, and make way for these. A store that fails loses the writes at hand,
    is logged once, and never disturbs who wrote. Counts are of blocks, since start.
    """

    def __init__(self, store: SessionStore, *, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._queue: deque[SessionWrite] = deque()
        self._checkpoints: deque[CheckpointWrite] = deque()
        self._lock = threading.Lock()
        self._queued_bytes = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work = asyncio.Event()
        self._progress = asyncio.Event()
        self._checkpoints_put_at = float("-inf")
        self._num_draining = 0
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
            while self._checkpoints and self._queued_bytes + num_bytes > self._max_bytes:
                self._drop_checkpoint(self._checkpoints.popleft())
            if self._queued_bytes + num_bytes > self._max_bytes:
                self.num_dropped += len(write.blocks)
                return False
            self._queue.append(write)
            self._queued_bytes += num_bytes
        self._wake()
        return True

    @property
    def takes_checkpoints(self) -> bool:
        """Whether there is room for more of them."""
        return self._queued_bytes < self._max_bytes // 2

    def enqueue_checkpoint(self, write: CheckpointWrite) -> None:
        """Queue it behind everything else. Callers ask `takes_checkpoints` before they copy."""
        with self._lock:
            is_first = not self._checkpoints
            self._checkpoints.append(write)
            self._queued_bytes += write.num_bytes
            while self._queued_bytes > self._max_bytes and len(self._checkpoints) > 1:
                self._drop_checkpoint(self._checkpoints.popleft())
        if is_first:
            self._wake()

    async def run(self) -> None:
        """Write until cancelled."""
        self._loop = asyncio.get_running_loop()
        while True:
            self._work.clear()
            while await self._put_next():
                self._progress.set()
            await self._wait_for_work()

    async def drain(self, timeout_s: float) -> bool:
        """Wait, on the loop of `run`, until all that was queued is written. False on time-out."""
        self._num_draining += 1
        self._work.set()
        try:
            async with asyncio.timeout(timeout_s):
                while self._queued_bytes:
                    self._progress.clear()
                    await self._progress.wait()
        except TimeoutError:
            return False
        finally:
            self._num_draining -= 1
        return True

    async def _put_next(self) -> bool:
        """Put what comes next; False when nothing waits."""
        if group := self._next_group():
            await self._put(group)
            num_bytes = sum(write.num_bytes for write in group)
        elif self._checkpoint_pause_s() == 0 and (checkpoints := self._next_checkpoints()):
            await self._put_checkpoints(checkpoints)
            self._checkpoints_put_at = time.monotonic()
            num_bytes = sum(write.num_bytes for write in checkpoints)
        else:
            return False
        with self._lock:
            self._queued_bytes -= num_bytes
        return True

    async def _wait_for_work(self) -> None:
        if not self._checkpoints:
            await self._work.wait()
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(self._checkpoint_pause_s()):
                await self._work.wait()

    def _checkpoint_pause_s(self) -> float:
        if self._num_draining:
            return 0.0
        return max(0.0, self._checkpoints_put_at + CHECKPOINT_PAUSE_S - time.monotonic())

    def _wake(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._work.set)

    def _drop_checkpoint(self, write: CheckpointWrite) -> None:
        self._queued_bytes -= write.num_bytes
        self.num_dropped += len(write.blocks)

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

    def _next_checkpoints(self) -> list[CheckpointWrite]:
        """The oldest; what is forgotten behind blocks is so behind their being put."""
        group: list[CheckpointWrite] = []
        num_bytes = 0
        with self._lock:
            while self._checkpoints and num_bytes < CHECKPOINT_BYTES:
                if group and self._checkpoints[0].ttl_s != group[0].ttl_s:
                    break
                group.append(self._checkpoints.popleft())
                num_bytes += group[-1].num_bytes
        return group

    async def _put(self, group: list[SessionWrite]) -> None:
        last = group[-1]
        blocks = [block for write in group for block in write.blocks]
        hashes = [block_hash for write in group for block_hash in write.stored_hashes]
        with self._counting(blocks):
            async with asyncio.timeout(PUT_TIMEOUT_S):
                if hashes:
                    await self._store.touch(
                        last.session, hashes, num_tokens=last.num_tokens, ttl_s=last.ttl_s
                    )
                if blocks or not hashes:
                    await self._store.put(
                        last.session, blocks, num_tokens=last.num_tokens, ttl_s=last.ttl_s
                    )

    async def _put_checkpoints(self, group: list[CheckpointWrite]) -> None:
        """A block that is put and forgotten in one group is not put; one that was forgotten and is
        wanted again stays."""
        wanted: dict[bytes, StoredBlock] = {}
        forgotten: dict[bytes, None] = {}
        for write in group:
            for block in write.blocks:
                wanted[block.hash] = block
                forgotten.pop(block.hash, None)
            for block_hash in write.forgotten_hashes:
                wanted.pop(block_hash, None)
                forgotten[block_hash] = None
        ttl_s, blocks = group[0].ttl_s, list(wanted.values())
        with self._counting(blocks):
            async with asyncio.timeout(PUT_TIMEOUT_S):
                if blocks:
                    await self._store.put_checkpoint(blocks, ttl_s=ttl_s)
                if forgotten:
                    await self._store.forget_checkpoint(list(forgotten))

    @contextmanager
    def _counting(self, blocks: list[StoredBlock]) -> Iterator[None]:
        """Whether they were stored; a store that fails disturbs nobody."""
        try:
            yield
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
