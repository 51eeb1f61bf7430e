"""Acts on workers that a person asks the gateway for: drain one, set an expert's replicas.

Each is logged, and a span. An autoscaler that runs beside goes on with its own view of things.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from opentelemetry import trace

from services.core import telemetry
from services.core.errors import ExpertfleetError, UnavailableError
from services.core.registry import Registry, Slot, WorkerRecord
from services.core.tracing import span_carrier
from services.gateway.console.replicas import (
    Action,
    find_worker,
    holders_of,
    plan_steps,
)

if TYPE_CHECKING:
    from services.core.worker_control import SlotsHeld

LOAD_TIMEOUT_S: Final = 120.0
DRAIN_TIMEOUT_S: Final = 10.0
_logger = logging.getLogger(__name__)


class WorkerControl(Protocol):
    """How workers are told; raises as `services.core.worker_control` does."""

    async def load(
        self, endpoint: str, slots: Iterable[Slot], carrier: Mapping[str, str]
    ) -> SlotsHeld: ...

    async def unload(
        self, endpoint: str, slots: Iterable[Slot], carrier: Mapping[str, str]
    ) -> SlotsHeld: ...

    async def drain(self, endpoint: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHeld:
    """What a worker holds after it was told to load or unload; `action` None: it was not told."""

    worker_id: str
    action: Action | None
    slots: frozenset[Slot]
    memory_free_bytes: int


class Administration:
    """One act at a time in this gateway, so that two do not take an expert's last two replicas."""

    def __init__(
        self, registry: Registry | None, control: WorkerControl, tracer: trace.Tracer
    ) -> None:
        self._registry = registry
        self._control = control
        self._tracer = tracer
        self._acting = asyncio.Lock()

    async def drain(self, worker_id: str) -> list[Slot]:
        """Have the worker finish and end; returns the slots that no other ready worker holds.

        Raises `NotFoundError`, and `UnavailableError` when the worker or the store is away.
        """
        async with self._acting:
            workers = await self._workers()
            worker = find_worker(workers, worker_id)
            with self._told("drain", worker_id, None):
                await self._control.drain(worker.endpoint)
            others = [other for other in workers if other.worker_id != worker_id]
            return sorted(slot for slot in worker.slots if not holders_of(others, slot))

    async def set_replicas(
        self, slot: Slot, num_replicas: int, worker_id: str | None
    ) -> list[WorkerHeld]:
        """Load or unload until so many ready workers hold the slot; returns those, and those that
        gave it up. Raises as `plan_steps` and `WorkerControl`; what was done until then stays."""
        async with self._acting:
            workers = await self._workers()
            held = {
                worker.worker_id: WorkerHeld(
                    worker_id=worker.worker_id,
                    action=None,
                    slots=worker.slots,
                    memory_free_bytes=worker.memory_free_bytes,
                )
                for worker in holders_of(workers, slot)
            }
            for step in plan_steps(workers, slot, num_replicas, worker_id):
                name = step.worker.worker_id
                act = self._control.load if step.action == "load" else self._control.unload
                with self._told(step.action, name, slot) as span:
                    after = await act(step.worker.endpoint, [slot], span_carrier(span))
                held[name] = WorkerHeld(
                    worker_id=name,
                    action=step.action,
                    slots=after.slots,
                    memory_free_bytes=after.memory_free_bytes,
                )
            return [held[name] for name in sorted(held)]

    async def _workers(self) -> tuple[WorkerRecord, ...]:
        if self._registry is None:
            raise UnavailableError(
                "This gateway has no registry to find workers in: set REDIS_URL for the fleet"
            )
        return (await self._registry.snapshot()).workers

    @contextmanager
    def _told(self, action: str, worker_id: str, slot: Slot | None) -> Iterator[trace.Span]:
        """A span and a line in the log, with what came of it."""
        attributes = {
            telemetry.ATTR_ADMIN_ACTION: action,
            telemetry.ATTR_WORKER_ID: worker_id,
        }
        what = f"{action} {worker_id}"
        if slot is not None:
            attributes[telemetry.ATTR_SLOTS] = f"{slot[0]}:{slot[1]}"
            what = f"{action} expert {slot[1]} of layer {slot[0]}, {worker_id}"
        with self._tracer.start_as_current_span(
            telemetry.SPAN_ADMIN, attributes=attributes, record_exception=False
        ) as span:
            try:
                yield span
            except ExpertfleetError as error:
                _logger.warning("administration: %s: refused: %s", what, error.message)
                raise
            _logger.info("administration: %s: done", what)
