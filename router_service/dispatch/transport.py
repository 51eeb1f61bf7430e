"""What the dispatcher needs of a wire, so that a native client can take gRPC's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from protos import experts_pb2
from services.core.wire import ResponseFrame

OnAnswer = Callable[[ResponseFrame | None], None]
"""Called on the loop, once: with the response, or None when the link broke before it came."""


class WorkerLink(Protocol):
    """One connection to one worker, used on one event loop. Once broken it stays broken."""

    @property
    def broken(self) -> str | None:
        """Why the link can no longer be used; None while it can."""
        ...

    async def describe(self, timeout_s: float) -> experts_pb2.DescribeResponse:
        """Connect if need be and ask what the worker holds. Raises `UnavailableError`."""
        ...

    def send(self, stream: int, call_id: int, frame: bytes, on_answer: OnAnswer) -> None:
        """Send an encoded request; streams do not wait for each other.

        `on_answer` gets the response with that call_id, whatever its status, or None as soon as
        the link is broken, which may be before this returns. `call_id` is never used again.
        """
        ...

    def forget(self, call_id: int) -> None:
        """Nobody waits any more: a late answer is dropped."""
        ...

    async def close(self) -> None:
        """Break the link: calls in flight get None."""
        ...


class ExpertTransport(Protocol):
    """Makes links."""

    def open(self, endpoint: str, on_broken: Callable[[str], None]) -> WorkerLink:
        """A link to host:port, not yet connected.

        `on_broken(reason)` is called on the loop, once, before those whose calls were in flight
        run again; closing the link counts.
        """
        ...
