"""The console's view, kept up to date by one reader for all who listen.

The reader looks at the registry now and then, so that rates and lost workers are known at once when
somebody opens the page, and each half second while somebody listens. One view is built and written
as JSON once, whoever and however many listen.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Final

from services.core.errors import OverloadedError, UnavailableError
from services.core.registry import Registry
from services.gateway.console.activity import Activity
from services.gateway.console.contract import FleetView
from services.gateway.console.fleet_state import FleetState
from services.gateway.console.view import ViewBuilder, is_news
from services.gateway.intake import Intake

INTERVAL_S: Final = 0.5
IDLE_INTERVAL_S: Final = 2.0
CountSessions = Callable[[], Awaitable[int | None]]
"""How many sessions are stored; None where that cannot be known."""
_logger = logging.getLogger(__name__)


class ConsoleFeed:
    """Used on one event loop. Does not own the registry; None: there is no fleet to read.

    `count_sessions` is asked now and then while somebody listens; None: that cannot be known.
    """

    def __init__(
        self,
        registry: Registry | None,
        fleet: FleetState,
        activity: Activity,
        intake: Intake,
        builder: ViewBuilder,
        *,
        count_sessions: CountSessions,
        max_listeners: int = 64,
        interval_s: float = INTERVAL_S,
        idle_interval_s: float = IDLE_INTERVAL_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._registry = registry
        self._fleet = fleet
        self._activity = activity
        self._intake = intake
        self._builder = builder
        self._count_sessions = count_sessions
        self._max_listeners = max_listeners
        self._interval_s = interval_s
        self._idle_interval_s = idle_interval_s
        self._clock = clock
        self._reader: asyncio.Task[None] | None = None
        self._reading = asyncio.Lock()
        self._is_wanted = asyncio.Event()
        self._changed = asyncio.Event()
        self._num_listeners = 0
        self._view: FleetView | None = None
        self._json = b""
        self._version = 0
        self._tried_at = self._built_at = self._counted_at = 0.0
        self._num_sessions: int | None = None

    @property
    def num_listeners(self) -> int:
        return self._num_listeners

    def start(self) -> None:
        """Begin to read now and then; again is harmless, and begins anew what a bug has ended."""
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read_on(), name="console")
            self._reader.add_done_callback(_tell_failure)

    async def close(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def view(self) -> bytes:
        """The view as JSON, about as old as the interval at most."""
        await self._refresh()
        self._build()
        return self._json

    async def listen(self, *, keep_alive_s: float) -> AsyncGenerator[bytes | None, None]:
        """The newest view at once, and whenever it has changed; None where it has not for
        `keep_alive_s`. Who takes long misses what came in between.

        Raises `OverloadedError` where too many listen.
        """
        if self._num_listeners >= self._max_listeners:
            raise OverloadedError(
                f"{self._num_listeners} pages listen to this gateway already, which is the limit",
                retry_after_s=10.0,
            )
        self._num_listeners += 1
        try:
            view, seen = await self.view(), self._version
            yield view
            while True:
                self.start()
                self._is_wanted.set()
                if self._version == seen:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(keep_alive_s):
                            await self._changed.wait()
                is_new, seen = self._version != seen, self._version
                yield self._json if is_new else None
        finally:
            self._num_listeners -= 1

    async def _read_on(self) -> None:
        while True:
            if self._num_listeners:
                await self._refresh()
                self._build()
                await asyncio.sleep(self._interval_s)
                continue
            if self._registry is not None:
                await self._refresh()
            self._is_wanted.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._idle_interval_s):
                    await self._is_wanted.wait()

    async def _refresh(self) -> None:
        """Read the registry, unless that was just done. One caller at a time reads."""
        async with self._reading:
            now = self._clock()
            if self._registry is None or 0 <= now - self._tried_at < self._interval_s * 0.9:
                return
            self._tried_at = now
            was_away = self._fleet.store == "away"
            try:
                self._fleet.add(await self._registry.snapshot(), self._clock())
            except UnavailableError as error:
                if not was_away:
                    _logger.warning("the console shows the fleet as last seen: %s", error.message)
                self._fleet.miss()
                return
            if self._num_listeners and now - self._counted_at >= self._idle_interval_s:
                self._counted_at = now
                self._num_sessions = await self._count_sessions()

    def _build(self) -> None:
        """Put the view together, unless that was just done, and tell the listeners of news."""
        now = self._clock()
        if self._view is not None and 0 <= now - self._built_at < self._interval_s * 0.9:
            return
        before, self._built_at = self._view, now
        self._view = self._builder.build(
            self._fleet, self._activity, self._intake, num_sessions=self._num_sessions, now=now
        )
        self._json = json.dumps(self._view, ensure_ascii=False, separators=(",", ":")).encode()
        if before is None or is_news(self._view, before):
            self._version += 1
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()


def _tell_failure(reader: asyncio.Task[None]) -> None:
    if not reader.cancelled() and (error := reader.exception()) is not None:
        _logger.error("the console's reader ended: %r", error, exc_info=error)


async def nobody_counts() -> int | None:
    """For a gateway that cannot know how many sessions are stored."""
    return None
