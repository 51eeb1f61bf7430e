"""The control loop: read the leases, decide, act, tell."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from opentelemetry import trace

from services.autoscaler.actions import (
    AddWorker,
    LoadSlots,
    Planned,
    RemoveWorker,
    UnloadSlots,
    describe,
    slots_of,
    target,
)
from services.autoscaler.actuators import SlotControl, WorkerScaler
from services.autoscaler.leader import Leadership
from services.autoscaler.metrics import AutoscalerMetrics
from services.autoscaler.options import PolicyOptions
from services.autoscaler.policy import decide
from services.autoscaler.state import PolicyState
from services.autoscaler.window import LoadWindow
from services.core import telemetry
from services.core.errors import ExpertfleetError, InvalidRequestError, UnavailableError
from services.core.registry import FleetSnapshot, Registry, Slot
from services.core.tracing import span_carrier

FIRST_BACK_OFF_S = 5.0
MAX_BACK_OFF_S = 60.0
_logger = logging.getLogger(__name__)


class Autoscaler:
    """One `round` reads, decides and starts what was decided; `run` does that for ever.

    A worker's actions follow one another, those of different workers go side by side. An action
    that fails is told and its worker left alone for a while, longer each time. Only the leader
    acts; the others decide too, so that one of them can take over knowing what it needs. Without
    a `scaler` workers are neither added nor removed.
    """

    def __init__(
        self,
        registry: Registry,
        options: PolicyOptions,
        *,
        slot_control: SlotControl,
        scaler: WorkerScaler | None,
        leadership: Leadership,
        tracer: trace.Tracer,
        metrics: AutoscalerMetrics,
        window_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._options = options if scaler is not None else replace(options, scale_workers=False)
        self._slot_control = slot_control
        self._scaler = scaler
        self._leadership = leadership
        self._tracer = tracer
        self._metrics = metrics
        self._clock = clock
        self._window = LoadWindow(window_s)
        self._state = PolicyState()
        self._snapshot = FleetSnapshot()
        self._in_flight: list[Planned] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures: dict[str, tuple[int, float]] = {}
        self._refused: set[Slot] = set()
        self._is_away = False
        self._was_leader = False

    @property
    def is_acting(self) -> bool:
        """Whether an action is under way."""
        return bool(self._tasks)

    async def run(self, interval_s: float) -> None:
        """Until cancelled; then actions under way are given up and the lead is handed on."""
        try:
            while True:
                await self.round()
                await asyncio.sleep(interval_s)
        finally:
            await self.close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._leadership.release()

    async def round(self) -> tuple[Planned, ...]:
        """What was decided; nothing while the store is away, or another autoscaler leads."""
        try:
            self._snapshot = await self._registry.snapshot()
        except UnavailableError as error:
            if not self._is_away:
                _logger.warning("nothing is decided: %s", error.message)
            self._is_away = True
            return ()
        self._is_away = False
        is_leader = await self._lead()
        now = self._clock()
        self._window.add(self._snapshot, now)
        view = self._window.view()
        planned, self._state = decide(
            self._options,
            self._state,
            view,
            now,
            in_flight=[one.action for one in self._in_flight],
            untouchable=frozenset(name for name, (_, at) in self._failures.items() if now < at),
            refused=frozenset(self._refused),
        )
        self._metrics.show(view, self._state, is_leader=is_leader)
        if not is_leader:
            return ()
        self._start(planned)
        return planned

    async def _lead(self) -> bool:
        is_leader = await self._leadership.holds()
        if is_leader != self._was_leader:
            _logger.info("this autoscaler %s", "leads" if is_leader else "stands by")
        self._was_leader = is_leader
        return is_leader

    def _start(self, planned: Sequence[Planned]) -> None:
        chains: dict[str, list[Planned]] = {}
        for one in planned:
            _logger.info("%s: %s, because %s", one.purpose, describe(one.action), one.reason)
            chains.setdefault(target(one.action), []).append(one)
        self._in_flight += planned
        for chain in chains.values():
            task = asyncio.create_task(self._carry_out(chain), name="autoscaler-actions")
            self._tasks.add(task)
            task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("an action ended in an unforeseen error", exc_info=error)

    async def _carry_out(self, chain: Sequence[Planned]) -> None:
        try:
            for one in chain:
                if not await self._carry_out_one(one):
                    return
        finally:
            # By identity: the same may have been planned twice.
            done = {id(one) for one in chain}
            self._in_flight = [one for one in self._in_flight if id(one) not in done]

    async def _carry_out_one(self, planned: Planned) -> bool:
        action = planned.action
        attributes: dict[str, str | int] = {
            telemetry.ATTR_AUTOSCALER_ACTION: describe(action),
            telemetry.ATTR_AUTOSCALER_PURPOSE: planned.purpose,
            telemetry.ATTR_AUTOSCALER_REASON: planned.reason,
            telemetry.ATTR_WORKER_ID: target(action),
            telemetry.ATTR_SLOTS: len(slots_of(action)),
        }
        started = self._clock()
        # record_exception: ours are recorded below, as a status with their message.
        with self._tracer.start_as_current_span(
            telemetry.SPAN_AUTOSCALER_DECISION, attributes=attributes, record_exception=False
        ) as span:
            try:
                await self._do(planned, span)
            except ExpertfleetError as error:
                span.set_status(trace.StatusCode.ERROR, error.message)
                self._metrics.count(planned.purpose, "failed")
                self._note_failure(planned, error)
                return False
        self._failures.pop(target(action), None)
        self._metrics.count(planned.purpose, "done")
        _logger.info("done in %.1f s: %s", self._clock() - started, describe(action))
        return True

    async def _do(self, planned: Planned, span: trace.Span) -> None:
        match planned.action:
            case LoadSlots(worker_id=name, slots=slots):
                await self._slot_control.load(self._endpoint(name), slots, span_carrier(span))
            case UnloadSlots(worker_id=name, slots=slots):
                await self._slot_control.unload(self._endpoint(name), slots, span_carrier(span))
            case AddWorker(slots=slots):
                assert self._scaler is not None
                _logger.info("started %s", await self._scaler.add_worker(slots))
            case RemoveWorker(worker_id=name):
                assert self._scaler is not None
                await self._scaler.remove_worker(name)

    def _endpoint(self, worker_id: str) -> str:
        for record in self._snapshot.workers:
            if record.worker_id == worker_id:
                return record.endpoint
        raise UnavailableError(f"{worker_id} has gone")

    def _note_failure(self, planned: Planned, error: ExpertfleetError) -> None:
        action = planned.action
        name = target(action)
        if isinstance(action, LoadSlots) and isinstance(error, InvalidRequestError):
            self._refused |= set(action.slots)
        # Nothing was changed: others may be asked for these slots at once.
        changed_at = {
            slot: at for slot, at in self._state.changed_at.items() if slot not in slots_of(action)
        }
        self._state = replace(self._state, changed_at=changed_at)
        if isinstance(action, AddWorker):
            self._state = replace(self._state, awaited_since=None)
        if isinstance(action, RemoveWorker):
            still = {key: at for key, at in self._state.leaving_since.items() if key != name}
            self._state = replace(self._state, leaving_since=still)
        count = self._failures.get(name, (0, 0.0))[0] + 1
        back_off_s = min(MAX_BACK_OFF_S, FIRST_BACK_OFF_S * 2 ** (count - 1))
        self._failures[name] = (count, self._clock() + back_off_s)
        _logger.warning(
            "failed: %s: %s; %s is left alone for %.0f s",
            describe(action),
            error.message,
            name or "the scaler",
            back_off_s,
        )
