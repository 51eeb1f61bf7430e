"""Tokens are handed to their callers while the engine waits for experts, not before.

Callers run Python on other threads; woken between two steps they take the interpreter lock from
the engine just when it prepares the next step. So the tokens of a step are emitted once the first
frames of the next one are on their way. With experts that never wait (in process) there is no such
moment, and tokens go out at the end of their own step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class DeferredEmission:
    """Calls `emit` at the right time, on the engine's loop. Engine's thread only."""

    def __init__(self, emit: Callable[[], None]) -> None:
        self._emit = emit
        self._handle: asyncio.Handle | None = None
        self._has_waited = False

    def dispatching(self) -> None:
        """A micro-batch is about to hand rows to experts; what counts is the first of a step."""
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_soon(self._waiting)

    def end_step(self) -> None:
        """The step's tokens are known. They go out now unless a next step will wait."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if not self._has_waited:
            self._emit()
        self._has_waited = False

    def _waiting(self) -> None:
        """The loop runs during the step. What sends the frames was queued after this callback, so
        let it go first."""
        self._has_waited = True
        self._handle = asyncio.get_running_loop().call_soon(self._emit)
