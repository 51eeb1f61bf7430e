"""One layer's dispatch: send each worker its rows, wait, send again what failed.

A frame that fails or is late goes to another replica where there is one: workers keep nothing, so
that is safe. An expert is never skipped. With no replica left the call waits for one to appear.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from opentelemetry.trace import Span

from protos import experts_pb2
from router_service.dispatch.dispatch_plan import (
    GatedTokens,
    PlannedFrame,
    plan_dispatch,
    rows_that_fit,
    split_frame,
)
from router_service.dispatch.dispatch_telemetry import DispatchSpan, DispatchTelemetry
from router_service.dispatch.transport import WorkerLink
from router_service.dispatch.wire_rows import WireRows
from router_service.dispatch.worker_pool import PoolView, WorkerPool
from services.core.errors import ExpertUnavailableError, MalformedFrameError
from services.core.routing_table import NO_WORKER
from services.core.wire import RequestHeader, ResponseFrame

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
    """What is computed: `rows` of T tokens as they go over the wire. `span` is the layer's if the
    step is sampled."""

    layer: int
    micro_batch: int
    rows: WireRows
    gated: GatedTokens
    span: Span | None


class Answered(NamedTuple):
    """A frame with its worker's answer; times are of `time.perf_counter_ns`."""

    frame: PlannedFrame
    response: ResponseFrame
    sent_ns: int
    received_ns: int


class _Sent:
    """A frame that was sent, or a piece of one that was too large."""

    __slots__ = (
        "_round",
        "call_id",
        "frame",
        "link",
        "received_ns",
        "response",
        "sent_ns",
        "span",
        "worker_id",
    )

    def __init__(
        self,
        frame: PlannedFrame,
        worker_id: str,
        link: WorkerLink,
        call_id: int,
        span: DispatchSpan | None,
        round_: _Round,
    ) -> None:
        self.frame = frame
        self.worker_id = worker_id
        self.link = link
        self.call_id = call_id
        self.span = span
        self.sent_ns = time.perf_counter_ns()
        self.received_ns = 0
        self.response: ResponseFrame | None = None
        self._round = round_

    def take_answer(self, response: ResponseFrame | None) -> None:
        """An `OnAnswer`."""
        self.received_ns = time.perf_counter_ns()
        self.response = response
        self._round.count_answer()


class _Round:
    """The wait for frames that were sent together.

    One future and one timer for all of them: these are made for every layer call.
    """

    __slots__ = ("_done", "_num_waiting")

    def __init__(self) -> None:
        self._num_waiting = 1  # itself, until everything is sent: a broken link answers at once
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def expect_answer(self) -> None:
        self._num_waiting += 1

    def count_answer(self) -> None:
        self._num_waiting -= 1
        if self._num_waiting == 0:
            self._end_wait()

    async def wait(self, timeout_s: float) -> None:
        """Return when every frame was answered, or when it is too late."""
        self.count_answer()
        timer = asyncio.get_running_loop().call_later(timeout_s, self._end_wait)
        try:
            await self._done
        finally:
            timer.cancel()

    def _end_wait(self) -> None:
        if not self._done.done():
            self._done.set_result(None)


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
        self._header = self._request_header()
        self._avoided: set[str] = set()
        self._num_retries = 0
        self._give_up_at: float | None = None
        self._last_fault = ""

    async def run(self) -> list[Answered]:
        """Frames with their answers; together they cover every assignment.

        Raises `ExpertUnavailableError`, or `MalformedFrameError` where a worker refused a frame
        for what it is: every other would.
        """
        answers: list[Answered] = []
        num_assignments = len(self._call.gated.token_rows)
        needed: NDArray[np.bool_] | None = None
        while True:
            round_ = _Round()
            sent = self._send(needed, round_)
            try:
                await round_.wait(self._limits.call_timeout_s)
            finally:
                _forget_unanswered(sent)
            for pieces in sent:
                good = [answer for piece in pieces if (answer := self._take(piece)) is not None]
                # All pieces of a frame or none: its experts are sent again as a whole.
                if len(good) == len(pieces):
                    answers.extend(good)
            if sum([answered.frame.num_assignments for answered in answers]) == num_assignments:
                return answers
            needed = self._call.gated.rows_per_expert > 0
            for answered in answers:
                needed[list(answered.frame.expert_ids)] = False
            await self._pause(needed)
            self._num_retries += 1

    def _send(self, needed: NDArray[np.bool_] | None, round_: _Round) -> list[list[_Sent]]:
        """Send what is needed (None: everything) of experts that have a worker, a frame to each
        worker, in pieces that this process and the worker accept."""
        view = self._pool.view
        workers = view.table.resolve_avoiding(self._call.layer, self._avoided)
        if needed is not None:
            workers = np.where(needed, workers, NO_WORKER)
        plan = plan_dispatch(self._call.gated, workers)
        sent = []
        for frame, rows in zip(plan.frames, self._call.rows.select(plan), strict=True):
            max_rows = self._max_rows(view.max_frame_bytes[frame.worker])
            if len(rows) <= max_rows:
                sent.append([self._send_piece(frame, rows, view, round_)])
                continue
            pieces = []
            for piece in split_frame(frame, max_rows):
                pieces.append(self._send_piece(piece, rows[: len(piece.token_ids)], view, round_))
                rows = rows[len(piece.token_ids) :]
            sent.append(pieces)
        return sent

    def _max_rows(self, max_frame_bytes: int) -> int:
        rows = self._call.rows
        return rows_that_fit(
            min(self._limits.max_frame_bytes, max_frame_bytes),
            top_k=self._call.gated.top_k,
            row_bytes=rows.hidden_size * rows.wire_format.activation.itemsize,
        )

    def _send_piece(
        self, frame: PlannedFrame, rows: NDArray[Any], view: PoolView, round_: _Round
    ) -> _Sent:
        worker_id = view.table.workers[frame.worker].worker_id
        span = self._start_span(frame, worker_id)
        header = self._header if span is None else self._request_header(span.traceparent)
        call_id = next(self._call_ids)
        encoded = header.frame(
            call_id=call_id,
            payload=rows.data,
            num_tokens=len(rows),
            expert_ids=frame.expert_ids,
            rows_per_expert=frame.rows_per_expert,
            token_rows=frame.token_rows,
            topk_weights=frame.topk_weights,
            scales=self._call.rows.scales(frame.token_ids),
        )
        link = view.links[frame.worker]
        sent = _Sent(frame, worker_id, link, call_id, span, round_)
        round_.expect_answer()
        link.send(self._call.micro_batch, call_id, encoded, sent.take_answer)
        return sent

    def _request_header(self, traceparent: str = "") -> RequestHeader:
        rows = self._call.rows
        wire_format = rows.wire_format
        return RequestHeader(
            layer=self._call.layer,
            dtype=wire_format.request,
            hidden_size=rows.hidden_size,
            combine=self._call.gated.combine,
            answer_dtype=wire_format.answer if wire_format.narrows_answers else None,
            traceparent=traceparent,
        )

    def _start_span(self, frame: PlannedFrame, worker_id: str) -> DispatchSpan | None:
        if self._call.span is None:
            return None
        return self._telemetry.start_dispatch(
            self._call.span,
            layer=self._call.layer,
            worker_id=worker_id,
            frame=frame,
            num_retries=self._num_retries,
        )

    def _take(self, sent: _Sent) -> Answered | None:
        """A good answer; None, with what went wrong noted, if the frame must be sent again."""
        outcome = self._judge(sent)
        if isinstance(outcome, Answered):
            return outcome
        self._telemetry.count_retry(outcome.reason)
        if sent.span is not None:
            sent.span.failed(outcome.text)
        self._last_fault = f"{sent.worker_id}: {outcome.text}"
        if outcome.reason != "broken":
            self._avoided.add(sent.worker_id)
        return None

    def _judge(self, sent: _Sent) -> Answered | _Fault:
        if not sent.received_ns:
            return _Fault("late", f"no answer within {self._limits.call_timeout_s:g} s")
        response = sent.response
        if response is None:
            return _Fault("broken", "the connection broke")
        if response.status == experts_pb2.DISPATCH_STATUS_OK:
            if (fault := self._check_rows(sent, response)) is not None:
                return fault
            self._telemetry.observe(sent.worker_id, (sent.received_ns - sent.sent_ns) / 1e9)
            if sent.span is not None:
                sent.span.answered(response)
            return Answered(sent.frame, response, sent.sent_ns, sent.received_ns)
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
                f"{len(sent.frame.token_ids)} tokens: {response.error}",
                layer=self._call.layer,
                worker_id=sent.worker_id,
            )
        if response.status == experts_pb2.DISPATCH_STATUS_UNKNOWN_EXPERT:
            slots = [(self._call.layer, expert) for expert in sent.frame.expert_ids]
            self._pool.mark_absent(sent.worker_id, slots)
            return _Fault("unknown_expert", response.error)
        if response.status == experts_pb2.DISPATCH_STATUS_DRAINING:
            self._pool.mark_draining(sent.worker_id)
            return _Fault("draining", response.error or "is draining")
        return _Fault("internal", response.error)

    def _check_rows(self, sent: _Sent, response: ResponseFrame) -> _Fault | None:
        frame, dtype = sent.frame, self._call.rows.wire_format.answer
        num_rows = len(frame.token_ids) if self._call.gated.combine else frame.num_assignments
        expected = (num_rows, self._call.rows.hidden_size * dtype.itemsize, dtype)
        seen = (response.num_rows, response.row_bytes, response.dtype)
        if seen == expected:
            return None
        return _Fault(
            "internal", f"answered with rows, bytes of a row, dtype {seen}, not {expected}"
        )

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


def _forget_unanswered(sent: list[list[_Sent]]) -> None:
    """What comes later is dropped."""
    for pieces in sent:
        for piece in pieces:
            if not piece.received_ns:
                piece.link.forget(piece.call_id)
