"""What telemetry records once nobody waits for it. Engine's thread only."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

_logger = logging.getLogger(__name__)

_PAUSE_S = 0.005
"""Tokens that were emitted go out on other threads, which need the interpreter lock for it."""


class LateRecords:
    """Keeps calls that record something whose times are known, until tokens are out.

    A span takes some 50 us to make, and more where a processor's caches hold weights.
    """

    def __init__(self) -> None:
        self._pending: deque[Callable[[], object]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, record: Callable[[], object]) -> None:
        self._pending.append(record)

    def settle_soon(self) -> None:
        """`settle` on the running loop, when tokens that were just emitted are on their way."""
        if self._pending and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_PAUSE_S, self.settle)

    def settle(self) -> None:
        """Make the calls, in their order. What one of them raises is logged."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._pending:
            record = self._pending.popleft()
            try:
                record()
            except Exception:  # telemetry must not end the engine
                _logger.exception("something could not be recorded")
