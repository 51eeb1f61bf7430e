"""How much may wait in one gateway: requests without a first token, and the bytes of their bodies.

Shards refuse what they cannot serve soon. This is for what no shard sees: bodies that are still
coming in, and requests that wait for a lost shard. What is held of a request after its body was
parsed, prompt and all, is in proportion to the body, so its bytes count until the first token;
from then on the shards bound how many there are.
"""

from __future__ import annotations

import asyncio

from services.core.errors import OverloadedError


class Intake:
    """Counts of one gateway; used on its event loop. Pure but for the lock."""

    def __init__(self, *, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self.num_requests = 0
        self.num_bytes = 0
        self.num_running = 0
        """Requests past their first token; they are not bounded here."""
        self.parsing = asyncio.Lock()
        """Held while a large body is parsed in a thread: one at a time, so that the event loop
        shares the interpreter with one other thread at most."""

    def enter(self) -> Place:
        """Raises `OverloadedError` where too many wait. The caller must `leave` in the end."""
        if self.num_requests >= self._max_requests:
            raise OverloadedError(
                f"{self.num_requests} requests wait at this gateway already, which is the limit; "
                "try again later",
                retry_after_s=1.0,
            )
        self.num_requests += 1
        return Place(self)

    def check_bytes(self, num_more: int) -> None:
        if self.num_bytes + num_more > self._max_bytes and self.num_bytes:
            raise OverloadedError(
                f"the requests that wait at this gateway hold {self.num_bytes} bytes already, and "
                f"the limit is {self._max_bytes}; try again later",
                retry_after_s=1.0,
            )


class Place:
    """One request's part of an `Intake`."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake
        self._num_bytes = 0
        self._has_left = self._is_over = False

    def hold(self, num_bytes: int) -> None:
        """Of its body so many bytes more have come. Raises `OverloadedError`."""
        self.intake.check_bytes(num_bytes)
        self._num_bytes += num_bytes
        self.intake.num_bytes += num_bytes

    def leave(self) -> None:
        """It waits no longer; calling this again does nothing."""
        if not self._has_left:
            self._has_left = True
            self.intake.num_requests -= 1
            self.intake.num_bytes -= self._num_bytes
            self.intake.num_running += 1

    def end(self) -> None:
        """The request is over; calling this again does nothing."""
        self.leave()
        if not self._is_over:
            self._is_over = True
            self.intake.num_running -= 1
