"""What telemetry records once nobody waits for it. Engine's thread only."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

_logger = logging.getLogger(__name__)


class LateRecords:
    """Keeps calls that record something whose times are known, until tokens are out.

    A span takes some 50 us to make, and more where a processor's caches hold weights.
    """

    def __init__(self) -> None:
        self._pending: deque[Callable[[], object]] = deque()

    def add(self, record: Callable[[], object]) -> None:
        self._pending.append(record)

    def settle(self) -> None:
        """Make the calls, in their order. What one of them raises is logged."""
        while self._pending:
            record = self._pending.popleft()
            try:
                record()
            except Exception:  # telemetry must not end the engine
                _logger.exception("something could not be recorded")
