"""Between the engine and the session store: what is fetched before, and written after.

The tier has an event loop in a thread of its own, so that the store's I/O overlaps the engine's
steps and its deadlines mean the store, not a long step. It only ever makes the engine faster: a
store that is slow, empty, broken or full of foreign blocks means that tokens are computed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from router_service.loop_thread import LoopThread
from router_service.session_tier.restore_policy import RestorePolicy
from router_service.session_tier.write_behind import CheckpointWrite, SessionWrite, WriteBehind
from services.core.errors import ExpertfleetError
from services.core.generation import SessionInfo
from services.core.settings import CheckpointKV
from services.sessions.store import BlockLayout, SessionStore, StoredPrefix

FETCH_BYTES: Final = 8 << 20
"""Blocks are fetched in pieces of about this size, so that a deadline keeps what came before."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreRequest:
    """`hashes` of the prompt's blocks, of which the first `num_local` need not be fetched.

    At most `max_blocks` are fetched: the engine's bound on host memory.
    """

    hashes: Sequence[bytes]
    num_local: int
    max_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreResult:
    """`payloads` continue the local blocks. `num_stored` leading blocks need not be written for a
    session, `num_restorable` ones not as checkpoints; both 0 when the store gave no answer.

    Times are Unix nanoseconds.
    """

    num_stored: int
    num_restorable: int
    payloads: tuple[bytes | memoryview, ...]
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTierStats:
    """Counts of blocks since start. `refused` by reason: torn, foreign, layout and so on."""

    num_stored: int
    num_dropped: int
    num_failed: int
    queued_bytes: int
    refused: dict[str, int]


class SessionTier:
    """The engine's access to stored sessions. Made, started and stopped by the engine's owner.

    `queue_bytes` bounds the write-behind queue, and, separately, payloads that were fetched and
    are not yet imported. The store is used from this tier's loop only, and closed with it.
    `checkpoint_kv` says whose blocks are written as they fill; those of no session are kept for
    `checkpoint_ttl_s` after their shard's death.
    """

    def __init__(
        self,
        store: SessionStore,
        *,
        layout: BlockLayout,
        queue_bytes: int,
        default_ttl_s: float,
        policy: RestorePolicy | None = None,
        checkpoint_kv: CheckpointKV = "sessions",
        checkpoint_ttl_s: float = 3600.0,
    ) -> None:
        self.checkpoint_kv: CheckpointKV = checkpoint_kv
        self.checkpoint_ttl_s = checkpoint_ttl_s
        self.block_bytes = layout.payload_bytes
        self.layout = layout
        self.default_ttl_s = default_ttl_s
        self._max_fetched_bytes = queue_bytes
        self._store = store
        self._policy = policy or RestorePolicy(
            block_size=layout.block_size, block_bytes=layout.payload_bytes
        )
        self._thread = LoopThread("session-tier")
        self._writer = WriteBehind(store, max_bytes=queue_bytes)
        self._writing: asyncio.Task[None] | None = None
        self._restores: set[asyncio.Task[None]] = set()
        self._bytes_begun = 0  # written by the engine's thread
        self._bytes_ended = 0  # written by this tier's thread
        self._refused: Counter[str] = Counter()
        self._is_failing = False

    def start(self) -> None:
        self._thread.start()
        self._thread.call_soon(self._start_writing)

    async def stop(self, timeout_s: float) -> None:
        """Write what is queued for at most `timeout_s`, then close the store and the thread."""
        if not self._thread.is_alive:
            return
        if not await self._thread.run(self._writer.drain(timeout_s)):
            _logger.warning(
                "%d bytes of session blocks were not stored in time", self._writer.queued_bytes
            )
        await self._thread.run(self._store.close())
        await self._thread.stop()

    def max_blocks_to_fetch(self, held_bytes: int) -> int:
        """How many blocks may be fetched now, with `held_bytes` of payloads in the scheduler."""
        in_flight = self._bytes_begun - self._bytes_ended
        room = self._max_fetched_bytes - held_bytes - in_flight
        return max(0, room // self.block_bytes)

    def restore(self, request: RestoreRequest, done: Callable[[RestoreResult], object]) -> None:
        """Look the blocks up and fetch them where that pays; `done` is called on the tier's thread.

        It is called within a bounded time, whatever the store does. From the engine's thread.
        """
        self._bytes_begun += request.max_blocks * self.block_bytes
        if not self._thread.call_soon(self._start_restore, request, done):
            now = time.time_ns()
            done(
                RestoreResult(num_stored=0, num_restorable=0, payloads=(), start_ns=now, end_ns=now)
            )

    def save(self, write: SessionWrite) -> None:
        """Queue blocks for the store; never waits. Payloads must not change afterwards."""
        self._writer.enqueue(write)

    @property
    def takes_checkpoints(self) -> bool:
        """Whether copying blocks of running sequences out makes sense now. From any thread."""
        return self._writer.takes_checkpoints

    def save_checkpoint(self, write: CheckpointWrite) -> None:
        """As `save`, behind all that sessions wait for."""
        self._writer.enqueue_checkpoint(write)

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """Tell how long it takes to compute what could be fetched."""
        self._policy.observe_prefill(num_tokens, seconds)

    async def get_session(self, tenant: str, session_id: str) -> SessionInfo | None:
        """From any loop. Raises `UnavailableError`."""
        return await self._thread.run(self._store.get_session(tenant, session_id))

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        """From any loop. Raises `UnavailableError`."""
        return await self._thread.run(self._store.delete_session(tenant, session_id))

    async def flush(self, timeout_s: float) -> bool:
        """Wait until all that was saved before is in the store. False on time-out."""
        return await self._thread.run(self._writer.drain(timeout_s))

    def stats(self) -> SessionTierStats:
        refused = Counter(self._refused)
        refused.update({str(reason): count for reason, count in self._store.refusals().items()})
        return SessionTierStats(
            num_stored=self._writer.num_stored,
            num_dropped=self._writer.num_dropped,
            num_failed=self._writer.num_failed,
            queued_bytes=self._writer.queued_bytes,
            refused=dict(refused),
        )

    def _start_writing(self) -> None:
        self._writing = self._thread.loop.create_task(self._writer.run())

    def _start_restore(
        self, request: RestoreRequest, done: Callable[[RestoreResult], object]
    ) -> None:
        task = self._thread.loop.create_task(self._restore(request, done))
        self._restores.add(task)
        task.add_done_callback(self._restores.discard)

    async def _restore(
        self, request: RestoreRequest, done: Callable[[RestoreResult], object]
    ) -> None:
        start_ns = time.time_ns()
        num_stored = num_restorable = 0
        payloads: list[bytes | memoryview] = []
        try:
            missing = len(request.hashes) - request.num_local
            found = await self._count(request, self._policy.patience_s(missing))
            num_stored, num_restorable = found.num_stored, found.num_restorable
            wanted = request.hashes[request.num_local : num_restorable][: request.max_blocks]
            decision = self._policy.decide(len(wanted), time.monotonic())
            if decision.fetch:
                is_whole = await self._fetch(wanted, decision.deadline_s, payloads)
                if not is_whole:
                    num_restorable = request.num_local + len(payloads)
                    num_stored = min(num_stored, num_restorable)
            self._recovered()
        except (ExpertfleetError, OSError, TimeoutError) as error:
            self._failed(error)
        finally:
            self._bytes_ended += request.max_blocks * self.block_bytes
            done(
                RestoreResult(
                    num_stored=num_stored,
                    num_restorable=num_restorable,
                    payloads=tuple(payloads),
                    start_ns=start_ns,
                    end_ns=time.time_ns(),
                )
            )

    async def _count(self, request: RestoreRequest, patience_s: float) -> StoredPrefix:
        async with asyncio.timeout(patience_s):
            return await self._store.count_prefix(request.hashes)

    async def _fetch(
        self, wanted: Sequence[bytes], deadline_s: float, payloads: list[bytes | memoryview]
    ) -> bool:
        """Append payloads until the deadline. False when a block was absent or refused."""
        start = time.monotonic()
        piece = max(1, FETCH_BYTES // self.block_bytes)
        try:
            async with asyncio.timeout(deadline_s):
                for first in range(0, len(wanted), piece):
                    for payload in await self._store.fetch(wanted[first : first + piece]):
                        if payload is None or not self._is_sound(payload):
                            return False
                        payloads.append(payload)
        except TimeoutError:
            _logger.debug("fetching session blocks took longer than %.3f s", deadline_s)
        finally:
            now = time.monotonic()
            self._policy.observe_fetch(len(payloads) * self.block_bytes, now - start, now)
        return True

    def _is_sound(self, payload: bytes | memoryview) -> bool:
        if len(payload) == self.block_bytes:
            return True
        self._refused["layout"] += 1
        _logger.warning(
            "refused a stored block of %d bytes: the layout says %d", len(payload), self.block_bytes
        )
        return False

    def _failed(self, error: Exception) -> None:
        if not self._is_failing:
            _logger.warning("sessions are not restored, their tokens are recomputed: %s", error)
        self._is_failing = True

    def _recovered(self) -> None:
        if self._is_failing:
            _logger.info("sessions are restored again")
        self._is_failing = False
