"""One layer's dispatch: send each worker its rows, wait, send again what failed.

A frame that fails or is late goes to another replica where there is one: workers keep nothing, so
that is safe. An expert is never skipped. With no replica left the call waits for one to appear.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from opentelemetry.trace import Span
from torch import Tensor

from protos import experts_pb2
from router_service.dispatch.dispatch_plan import (
    GatedTokens,
    PlannedFrame,
    plan_dispatch,
    rows_that_fit,
    split_frame,
)
from router_service.dispatch.dispatch_telemetry import DispatchSpan, DispatchTelemetry
from router_service.dispatch.transport import Answer
from router_service.dispatch.worker_pool import PoolView, WorkerPool
from services.core.errors import ExpertUnavailableError, MalformedFrameError
from services.core.routing_table import NO_WORKER
from services.core.wire import ResponseFrame, encode_request

_FIRST_RESEND_DELAY_S = 0.02
_MAX_RESEND_DELAY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchLimits:
    """`call_timeout_s` is one frame's, `expert_wait_s` a call's from its first failure on."""

    expert_wait_s: float
    call_timeout_s: float
    max_frame_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCall:
    """What is computed: `rows` [T, H] on the CPU. `span` is the layer's if the step is sampled."""

    layer: int
    micro_batch: int
    rows: Tensor
    gated: GatedTokens
    span: Span | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    """A frame that was sent, or a piece of one that was too large."""

    frame: PlannedFrame
    num_tokens: int
    worker_id: str
    future: asyncio.Future[Answer | None]
    sent_at: float
    span: DispatchSpan | None


@dataclass(frozen=True, slots=True)
class _Fault:
    """Why a frame must be sent again. `reason` labels the metric."""

    reason: str
    text: str


class LayerDispatch:
    """Runs one `LayerCall`; used once. `call_ids` are those of the links' process."""

    def __init__(
        self,
        call: LayerCall,
        pool: WorkerPool,
        limits: DispatchLimits,
        telemetry: DispatchTelemetry,
        call_ids: Iterator[int],
    ) -> None:
        self._call = call
        self._pool = pool
        self._limits = limits
        self._telemetry = telemetry
        self._call_ids = call_ids
        self._avoided: set[str] = set()
        self._num_retries = 0
        self._give_up_at: float | None = None
        self._last_fault = ""

    async def run(self) -> list[tuple[PlannedFrame, Tensor]]:
        """Frames with their answers; together they cover every assignment.

        Raises `ExpertUnavailableError`, or `MalformedFrameError` where a worker refused a frame
        for what it is: every other would.
        """
        answers: list[tuple[PlannedFrame, Tensor]] = []
        needed = self._call.gated.rows_per_expert > 0
        while True:
            sent = self._send(needed)
            await self._wait_answered(sent)
            for whole, pieces in sent:
                rows = [self._take(piece) for piece in pieces]
                answered = [
                    (piece.frame, row)
                    for piece, row in zip(pieces, rows, strict=True)
                    if row is not None
                ]
                # All pieces of a frame or none: its experts are sent again as a whole.
                if len(answered) == len(pieces):
                    answers.extend(answered)
                    needed[list(whole.assignments.expert_ids)] = False
            if not needed.any():
                return answers
            await self._pause(needed)
            self._num_retries += 1

    def _send(self, needed: NDArray[np.bool_]) -> list[tuple[PlannedFrame, list[_Sent]]]:
        """Send what is needed of experts that have a worker, a frame to each worker."""
        view = self._pool.view
        workers = view.table.resolve_avoiding(self._call.layer, self._avoided)
        plan = plan_dispatch(self._call.gated, np.where(needed, workers, NO_WORKER))
        selected = plan.select(self._call.rows)
        return [
            (frame, [self._send_piece(*piece, view) for piece in self._fit(frame, rows, view)])
            for frame, rows in zip(plan.frames, selected, strict=True)
        ]

    def _fit(
        self, frame: PlannedFrame, rows: Tensor, view: PoolView
    ) -> Iterable[tuple[PlannedFrame, Tensor]]:
        """The frame in pieces that this process and the worker accept."""
        max_rows = rows_that_fit(
            min(self._limits.max_frame_bytes, view.max_frame_bytes[frame.worker]),
            top_k=self._call.gated.top_k,
            row_bytes=rows.shape[1] * rows.itemsize,
        )
        return [(frame, rows)] if len(rows) <= max_rows else split_frame(frame, rows, max_rows)

    def _send_piece(self, frame: PlannedFrame, rows: Tensor, view: PoolView) -> _Sent:
        worker_id = view.table.workers[frame.worker].worker_id
        span = self._start_span(frame, worker_id, len(rows))
        call_id = next(self._call_ids)
        encoded = encode_request(
            call_id=call_id,
            layer=self._call.layer,
            hidden_states=rows,
            assignments=frame.assignments,
            combine=self._call.gated.combine,
            traceparent="" if span is None else span.traceparent,
        )
        sent_at = time.monotonic()
        return _Sent(
            frame=frame,
            num_tokens=len(rows),
            worker_id=worker_id,
            future=view.links[frame.worker].send(self._call.micro_batch, call_id, encoded),
            sent_at=sent_at,
            span=span,
        )

    def _start_span(
        self, frame: PlannedFrame, worker_id: str, num_tokens: int
    ) -> DispatchSpan | None:
        if self._call.span is None:
            return None
        return self._telemetry.start_dispatch(
            self._call.span,
            layer=self._call.layer,
            worker_id=worker_id,
            frame=frame,
            num_tokens=num_tokens,
            num_retries=self._num_retries,
        )

    async def _wait_answered(self, sent: list[tuple[PlannedFrame, list[_Sent]]]) -> None:
        """Return when every future is done; those that are not in time are cancelled."""
        futures = [piece.future for _, pieces in sent for piece in pieces]
        try:
            async with asyncio.timeout(self._limits.call_timeout_s):
                for future in futures:
                    await future
        except TimeoutError:
            pass
        finally:
            for future in futures:
                future.cancel()

    def _take(self, sent: _Sent) -> Tensor | None:
        """An answer's rows; None, with what went wrong noted, if the frame must be sent again."""
        outcome = self._judge(sent)
        if isinstance(outcome, Tensor):
            return outcome
        self._telemetry.count_retry(outcome.reason)
        if sent.span is not None:
            sent.span.failed(outcome.text)
        self._last_fault = f"{sent.worker_id}: {outcome.text}"
        if outcome.reason != "broken":
            self._avoided.add(sent.worker_id)
        return None

    def _judge(self, sent: _Sent) -> Tensor | _Fault:
        if sent.future.cancelled():
            return _Fault("late", f"no answer within {self._limits.call_timeout_s:g} s")
        answer = sent.future.result()
        if answer is None:
            return _Fault("broken", "the connection broke")
        response = answer.response
        if response.status == experts_pb2.DISPATCH_STATUS_OK:
            if (fault := self._check_rows(sent, response.hidden_states)) is not None:
                return fault
            assert response.hidden_states is not None
            self._telemetry.observe(sent.worker_id, answer.received_at - sent.sent_at)
            if sent.span is not None:
                sent.span.answered(response)
            return response.hidden_states
        return self._judge_refusal(sent, response)

    def _judge_refusal(self, sent: _Sent, response: ResponseFrame) -> _Fault:
        if response.status in (
            experts_pb2.DISPATCH_STATUS_INVALID_FRAME,
            experts_pb2.DISPATCH_STATUS_TOO_LARGE,
        ):
            if sent.span is not None:
                sent.span.failed(response.error)
            raise MalformedFrameError(
                f"worker {sent.worker_id} refused a frame of layer {self._call.layer} with "
                f"{sent.num_tokens} tokens: {response.error}",
                layer=self._call.layer,
                worker_id=sent.worker_id,
            )
        if response.status == experts_pb2.DISPATCH_STATUS_UNKNOWN_EXPERT:
            slots = [(self._call.layer, expert) for expert in sent.frame.assignments.expert_ids]
            self._pool.mark_absent(sent.worker_id, slots)
            return _Fault("unknown_expert", response.error)
        if response.status == experts_pb2.DISPATCH_STATUS_DRAINING:
            self._pool.mark_draining(sent.worker_id)
            return _Fault("draining", response.error or "is draining")
        return _Fault("internal", response.error)

    def _check_rows(self, sent: _Sent, rows: Tensor | None) -> _Fault | None:
        num_assignments = len(sent.frame.assignments.token_rows)
        num_rows = sent.num_tokens if self._call.gated.combine else num_assignments
        expected = (num_rows, self._call.rows.shape[1]), self._call.rows.dtype
        seen = None if rows is None else (tuple(rows.shape), rows.dtype)
        if seen == expected:
            return None
        return _Fault("internal", f"answered with rows of {seen} instead of {expected}")

    async def _pause(self, needed: NDArray[np.bool_]) -> None:
        """Return when sending again makes sense. Raises `ExpertUnavailableError` when it is over.

        That is at once where a replica is left that has not failed this call, else when the table
        changes; a worker that failed and is the only one is tried again with a growing delay.
        """
        now = time.monotonic()
        if self._give_up_at is None:
            self._give_up_at = now + self._limits.expert_wait_s
        if now >= self._give_up_at:
            raise self._unavailable(needed)
        table = self._pool.view.table
        resolved = table.resolve_avoiding(self._call.layer, self._avoided)[needed]
        candidates = {table.workers[w].worker_id for w in resolved if w != NO_WORKER}
        if candidates - self._avoided:
            await asyncio.sleep(0)
            return
        wait_s = self._give_up_at - now
        if candidates:
            delay_s = _FIRST_RESEND_DELAY_S * 2 ** min(self._num_retries, 16)
            wait_s = min(wait_s, delay_s, _MAX_RESEND_DELAY_S)
        await self._pool.wait_changed(table.version, wait_s)

    def _unavailable(self, needed: NDArray[np.bool_]) -> ExpertUnavailableError:
        experts = np.flatnonzero(needed).tolist()
        listed = ",".join(map(str, experts))
        layer = self._call.layer
        fault = f" (last fault: {self._last_fault})" if self._last_fault else ""
        return ExpertUnavailableError(
            f"layer {layer}: no worker computed experts {listed} within "
            f"{self._limits.expert_wait_s:g} s{fault}; start a worker with "
            f"`expertfleet expert --experts {listed} --layers {layer}`, or see its log",
            layer=layer,
            expert=experts[0],
            experts=experts,
        )
