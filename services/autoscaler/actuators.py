"""What carries actions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from services.core.registry import Slot
from services.core.tls import PeerTls
from services.core.worker_control import load_slots, unload_slots


class SlotControl(Protocol):
    """Tells a worker at host:port what to hold; returns once it is done and announced.

    Raises `ExpertfleetError`; the worker then holds what it held. `carrier` is the trace context.
    """

    async def load(
        self, endpoint: str, slots: Sequence[Slot], carrier: Mapping[str, str]
    ) -> None: ...

    async def unload(
        self, endpoint: str, slots: Sequence[Slot], carrier: Mapping[str, str]
    ) -> None: ...


class WorkerScaler(Protocol):
    """Starts and ends whole workers. Both return when it is under way and raise
    `ExpertfleetError` where it cannot be; bounds of their own are theirs to keep."""

    async def add_worker(self, slots: Sequence[Slot]) -> str:
        """A worker that holds at least `slots`; returns its id, or the name of what was scaled."""
        ...

    async def remove_worker(self, worker_id: str) -> None:
        """Drain the worker, then end it."""
        ...


class GrpcSlotControl:
    """`SlotControl` over the workers' own endpoints."""

    def __init__(self, *, timeout_s: float = 120.0, tls: PeerTls | None = None) -> None:
        self._timeout_s = timeout_s
        self._tls = tls

    async def load(self, endpoint: str, slots: Sequence[Slot], carrier: Mapping[str, str]) -> None:
        await load_slots(endpoint, slots, timeout_s=self._timeout_s, carrier=carrier, tls=self._tls)

    async def unload(
        self, endpoint: str, slots: Sequence[Slot], carrier: Mapping[str, str]
    ) -> None:
        await unload_slots(
            endpoint, slots, timeout_s=self._timeout_s, carrier=carrier, tls=self._tls
        )
