"""One layer's dispatch: send each worker its rows, wait, send again what failed or is late.

A frame that fails goes to another replica where there is one: workers keep nothing, so that is
safe. One that is past its deadline goes to another replica too, and the first answer wins; an only
replica that is slow is waited for. An expert is never skipped: with no replica left the call waits
for one to appear, or, where the step allows it, leaves the rows that need it behind.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from opentelemetry.trace import Span

from router_service.dispatch.dispatch_plan import (
    DispatchPlan,
    GatedTokens,
    PlannedFrame,
    gated_of_frame,
    plan_dispatch,
    rows_that_fit,
    split_frame,
)
from router_service.dispatch.dispatch_telemetry import DispatchSpan, DispatchTelemetry
from router_service.dispatch.frame_faults import BLAMELESS, find_fault
from router_service.dispatch.replica_chooser import Choice, ReplicaChooser
from router_service.dispatch.retry_budget import RetryBudget
from router_service.dispatch.sent_frame import Answered, Fault, FrameState, SentFrame
from router_service.dispatch.wire_rows import WireRows
from router_service.dispatch.worker_pool import PoolView, WorkerPool
from router_service.experts import MissingExperts, Resend, StepIncidents, expert_unavailable
from services.core.errors import MalformedFrameError
from services.core.routing_table import NO_WORKER
from services.core.wire import RequestHeader

GRACE_S = 0.3
"""How long rows wait for an expert that is away before they are left behind."""
_FIRST_RESEND_DELAY_S = 0.02
_MAX_RESEND_DELAY_S = 1.0
_MANY_RETRIES = 64
"""So many in one call, and there is something that sending at once does not mend."""
_OVER_BUDGET_DELAY_S = 0.25
_LOOK_AGAIN_S = 0.05
_TIMER_LAG_S = 0.01
_AFTER_LAG_S = 0.025


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchLimits:
    """`call_timeout_s` bounds a frame's deadline, `expert_wait_s` a call from its first failure."""

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
    incidents: StepIncidents | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchParts:
    """What all layer calls of a shard share. `call_ids` are those of the links' process."""

    pool: WorkerPool
    chooser: ReplicaChooser
    budget: RetryBudget
    limits: DispatchLimits
    telemetry: DispatchTelemetry
    call_ids: Iterator[int]


class LayerDispatch:
    """Runs one `LayerCall`; used once.

    One future and one timer serve all of its frames: these are made for every layer call.
    """

    def __init__(self, call: LayerCall, parts: DispatchParts) -> None:
        self._call = call
        self._pool = parts.pool
        self._chooser = parts.chooser
        self._budget = parts.budget
        self._limits = parts.limits
        self._telemetry = parts.telemetry
        self._call_ids = parts.call_ids
        self._header = self._request_header()
        self._roots: list[SentFrame] = []
        self._num_waiting = 0
        self._is_troubled = False
        self._has_ended = False
        self._has_lacked = False
        self._may_leave_behind = call.incidents is not None
        self._error: MalformedFrameError | None = None
        self._wakeup: asyncio.Future[None] | None = None
        self._avoided: set[str] = set()
        self._num_retries = 0
        self._troubled_since: float | None = None
        self._last_fault = ""

    async def run(self) -> list[Answered]:
        """Frames with their answers. Together they cover every assignment, save those of rows that
        were noted in `incidents`.

        Raises `ExpertUnavailableError`, `NothingLeftError` if all rows were left behind, or
        `MalformedFrameError` where a worker refused a frame for what it is: every other would.
        """
        try:
            if not self._roots:
                self._roots = self._send(self._call.gated, None)
            self._budget.earn(len(self._roots))
            while self._num_waiting or self._is_troubled:
                if self._is_troubled:
                    self._mend(time.monotonic())
                    if all(root.is_done for root in self._roots):
                        break
                await self._wait(time.monotonic())
        finally:
            self._end()
        return [answer for root in self._roots for answer in root.answers()]

    def take_over(self, sent: Sequence[SentFrame]) -> None:
        """Before `run`, which then sends nothing at first: frames of this call, all that it needs,
        that somebody else sent. Their answers are still to be taken."""
        self._roots = list(sent)
        for frame in sent:
            num_rows, num_experts = frame.frame.num_assignments, frame.num_experts
            frame.expected_s = self._chooser.sent(frame.worker_id, num_rows, num_experts)
            frame.due = frame.sent_ns * 1e-9 + self._chooser.deadline_s(
                frame.worker_id, num_rows, num_experts, frame.expected_s
            )
            self._num_waiting += 1

    # Sending

    def _send(
        self,
        gated: GatedTokens,
        token_ids: NDArray[np.int64] | None,
        *,
        exclude: Collection[str] = (),
    ) -> list[SentFrame]:
        """Send assignments to workers of their experts, a frame to each worker, in pieces that
        this process and the worker accept. What has no worker becomes a frame that lacks one.

        `token_ids`: the call's tokens that the rows of `gated` are; None for all.
        """
        view, layer = self._pool.view, self._call.layer
        choice = self._chooser.plan(
            layer,
            gated.rows_per_expert,
            avoid=self._avoided,
            exclude=exclude,
            skip_stuck=self._may_leave_behind,
        )
        plan = plan_dispatch(gated, choice.workers, choice.shares)
        if token_ids is None:
            selected = self._call.rows.select(plan)
        else:
            plan = _over_tokens(plan, token_ids)
            selected = [self._call.rows.take(frame.token_ids) for frame in plan.frames]
        sent: list[SentFrame] = []
        for frame, rows in zip(plan.frames, selected, strict=True):
            max_rows = self._max_rows(view.max_frame_bytes[frame.worker])
            if len(rows) <= max_rows:
                sent.append(self._send_piece(frame, rows, view))
                continue
            for piece in split_frame(frame, max_rows):
                sent.append(self._send_piece(piece, rows[: len(piece.token_ids)], view))
                rows = rows[len(piece.token_ids) :]
        lacking = self._lacking(gated, token_ids, choice)
        return sent if lacking is None else [*sent, lacking]

    def _lacking(
        self, gated: GatedTokens, token_ids: NDArray[np.int64] | None, choice: Choice
    ) -> SentFrame | None:
        is_lacking = (choice.workers < 0) & (gated.rows_per_expert > 0)
        if not is_lacking.any():
            return None
        self._has_lacked = True
        self._trouble(time.monotonic())
        plan = plan_dispatch(gated, np.where(is_lacking, 0, NO_WORKER))
        if token_ids is not None:
            plan = _over_tokens(plan, token_ids)
        return SentFrame(plan.frames[0], "", None, 0, None, self)

    def _max_rows(self, max_frame_bytes: int) -> int:
        rows = self._call.rows
        return rows_that_fit(
            min(self._limits.max_frame_bytes, max_frame_bytes),
            top_k=self._call.gated.top_k,
            row_bytes=rows.hidden_size * rows.wire_format.activation.itemsize,
        )

    def _send_piece(self, frame: PlannedFrame, rows: NDArray[Any], view: PoolView) -> SentFrame:
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
        sent = SentFrame(frame, worker_id, link, call_id, span, self)
        num_rows, num_experts = frame.num_assignments, len(frame.expert_ids)
        sent.expected_s = self._chooser.sent(worker_id, num_rows, num_experts)
        sent.due = time.monotonic() + self._chooser.deadline_s(
            worker_id, num_rows, num_experts, sent.expected_s
        )
        self._num_waiting += 1
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

    # Answers

    def take(self, sent: SentFrame) -> None:
        """An answer is there, or its link broke. It counts in the books even when it is too late
        to be used."""
        fault = self._judge(sent)
        response = sent.response
        num_rows, num_experts = sent.frame.num_assignments, sent.num_experts
        num_stuck = self._chooser.num_stuck
        if fault is None and response is not None:
            sent.state = FrameState.GOOD
            self._chooser.answered(
                sent.worker_id,
                num_rows,
                sent.elapsed_s,
                num_experts,
                expected_s=sent.expected_s,
                compute_s=response.compute_us * 1e-6,
                was_overdue=sent.is_overdue,
            )
            self._telemetry.observe(sent.worker_id, sent.elapsed_s)
            if sent.span is not None:
                sent.span.answered(response)
        else:
            self._count_fault(sent, fault, num_rows, num_experts)
        if self._chooser.num_stuck != num_stuck:
            self._pool.announce()
        if self._has_ended:
            return
        self._num_waiting -= 1
        if self._is_troubled or not self._num_waiting:
            self._wake()

    def _judge(self, sent: SentFrame) -> Fault | None:
        call = self._call
        try:
            return find_fault(
                sent,
                layer=call.layer,
                combine=call.gated.combine,
                hidden_size=call.rows.hidden_size,
                dtype=call.rows.wire_format.answer,
            )
        except MalformedFrameError as error:
            self._error = error
            return Fault("refused", error.message)

    def _count_fault(
        self, sent: SentFrame, fault: Fault | None, num_rows: int, num_experts: int
    ) -> None:
        assert fault is not None
        now = time.monotonic()
        if fault.reason in BLAMELESS:
            self._chooser.dropped(
                sent.worker_id, num_rows, num_experts, was_overdue=sent.is_overdue
            )
        elif self._chooser.failed(
            sent.worker_id, num_rows, now, num_experts, was_overdue=sent.is_overdue
        ):
            self._pool.ejected(sent.worker_id, fault.text)
        if sent.span is not None:
            sent.span.failed(fault.text)
        if self._has_ended:
            return
        if fault.reason == "unknown_expert":
            slots = [(self._call.layer, expert) for expert in sent.frame.expert_ids]
            self._pool.mark_absent(sent.worker_id, slots)
        elif fault.reason == "draining":
            self._pool.mark_draining(sent.worker_id)
        if fault.reason != "broken":
            self._avoided.add(sent.worker_id)
        self._fail(sent, fault, now)

    def _fail(self, sent: SentFrame, fault: Fault, now: float) -> None:
        """The frame must be sent again: at once where a replica is left that has not failed this
        call and the budget allows, later otherwise."""
        sent.state, sent.fault, sent.retry_at = FrameState.FAILED, fault, now
        self._trouble(now)
        if sent.children:
            return  # it was sent again already
        self._last_fault = f"{sent.worker_id}: {fault.text}"
        self._note_resend(sent, fault.reason)
        if not self._has_others(sent, self._avoided):
            sent.retry_at += _resend_delay_s(self._num_retries)
        elif self._num_retries >= _MANY_RETRIES:
            sent.retry_at += _resend_delay_s(self._num_retries - _MANY_RETRIES)
        elif fault.reason not in BLAMELESS and not self._budget.take():
            sent.retry_at += _OVER_BUDGET_DELAY_S

    def _note_resend(self, sent: SentFrame, reason: str) -> None:
        self._telemetry.count_retry(reason)
        if self._call.incidents is not None:
            resend = Resend(self._call.layer, sent.worker_id, reason)
            self._call.incidents.resends.append(resend)

    # Trouble

    def _mend(self, now: float) -> None:
        """Do what can be done for each frame that is not done."""
        if self._error is not None:
            raise self._error
        since = now if self._troubled_since is None else self._troubled_since
        is_over = now >= since + self._limits.expert_wait_s
        needed: set[int] = set()
        for root in self._roots:
            for sent in tuple(root.unfinished()):
                if sent.state is FrameState.WAITING:
                    if now >= sent.due:
                        self._look_after(sent, now)
                elif is_over:
                    needed.update(sent.frame.expert_ids)
                elif sent.state is FrameState.FAILED:
                    if now >= sent.retry_at:
                        self._send_again(sent)
                else:
                    self._tend_lacking(sent, now)
        if needed:
            raise expert_unavailable(
                self._call.layer, needed, self._limits.expert_wait_s, self._last_fault
            )

    def _send_again(self, sent: SentFrame, *, exclude: Collection[str] = ()) -> None:
        self._num_retries += 1
        gated = gated_of_frame(sent.frame, self._call.gated)
        sent.children = self._send(gated, sent.frame.token_ids, exclude=exclude)

    def _tend_lacking(self, sent: SentFrame, now: float) -> None:
        """Send what has a worker by now; leave the rest behind when it is time."""
        layer, incidents = self._call.layer, self._call.incidents
        skips = self._may_leave_behind
        if any(
            self._chooser.has_worker(layer, expert, skip_stuck=skips)
            for expert in sent.frame.expert_ids
        ):
            self._send_again(sent)
        elif incidents is not None and now >= self._leave_at(sent):
            self._leave_behind(sent, incidents)

    def _leave_at(self, sent: SentFrame) -> float:
        """The grace runs from when the first of its experts went away; none for stuck workers."""
        layer = self._call.layer
        since = [self._pool.missing_since((layer, expert)) for expert in sent.frame.expert_ids]
        return min(since) + GRACE_S

    def _leave_behind(self, sent: SentFrame, incidents: StepIncidents) -> None:
        sent.state = FrameState.LEFT
        missing = MissingExperts(self._call.layer, sent.frame.expert_ids, sent.frame.token_ids)
        incidents.leave_behind(missing, self._call.gated.num_tokens)

    def _look_after(self, sent: SentFrame, now: float) -> None:
        """The frame is past its deadline."""
        worker_id = sent.worker_id
        if not sent.is_overdue:
            sent.is_overdue, sent.overdue_at = True, now
            if self._chooser.overdue(worker_id, now):
                self._pool.ejected(worker_id, "answers late")
            self._pool.probe(worker_id)
        others = {worker_id, *self._avoided}
        has_other = self._has_others(sent, others)
        elapsed_s = (time.perf_counter_ns() - sent.sent_ns) * 1e-9
        if has_other and self._budget.take():
            self._telemetry.count_hedge()
            self._note_resend(sent, "late")
            self._send_again(sent, exclude=others)
            self._avoided.add(worker_id)
            sent.due = math.inf
        elif elapsed_s >= self._limits.call_timeout_s:
            self._give_up_on(sent, now)
        elif self._may_leave_behind and not has_other and now >= sent.overdue_at + GRACE_S:
            # Rows that only this worker can compute are left behind; the others go elsewhere.
            self._chooser.stuck(worker_id)
            self._note_resend(sent, "stuck")
            self._send_again(sent, exclude=(worker_id,))
            sent.due = math.inf
        else:
            left_s = self._limits.call_timeout_s - elapsed_s
            sent.due = now + min(_LOOK_AGAIN_S, max(left_s, 0.001))

    def _has_others(self, sent: SentFrame, exclude: Collection[str]) -> bool:
        """Whether other workers than these could compute all of the frame."""
        return all(
            self._chooser.has_worker(self._call.layer, expert, exclude=exclude)
            for expert in sent.frame.expert_ids
        )

    def _give_up_on(self, sent: SentFrame, now: float) -> None:
        """Its answer will not come: whoever can, also this worker, computes it anew."""
        text = f"no answer within {self._limits.call_timeout_s:g} s"
        self._forget(sent)
        self._num_waiting -= 1
        if sent.span is not None:
            sent.span.failed(text)
        self._avoided.add(sent.worker_id)
        self._fail(sent, Fault("late", text), now)

    def _forget(self, sent: SentFrame) -> None:
        if sent.received_ns or sent.link is None:
            return
        sent.received_ns = time.perf_counter_ns()
        sent.link.forget(sent.call_id)
        num_stuck = self._chooser.num_stuck
        self._chooser.dropped(
            sent.worker_id,
            sent.frame.num_assignments,
            sent.num_experts,
            was_overdue=sent.is_overdue,
        )
        if self._chooser.num_stuck != num_stuck:
            self._pool.announce()

    def _end(self) -> None:
        """Frames of the call that were overtaken or given up may still be answered: that is noted
        for as long as an answer counts as one, then they are forgotten."""
        self._has_ended = True
        if self._has_lacked and self._troubled_since is not None:
            self._telemetry.count_expert_wait(time.monotonic() - self._troubled_since)
        if not self._num_waiting:
            return
        loop = asyncio.get_running_loop()
        for root in self._roots:
            for sent in root.everything():
                if sent.link is not None and not sent.received_ns:
                    if sent.is_overdue:
                        loop.call_later(self._limits.call_timeout_s, self._forget, sent)
                    else:
                        self._forget(sent)

    def _trouble(self, now: float) -> None:
        self._is_troubled = True
        if self._troubled_since is None:
            self._troubled_since = now

    # Waiting

    async def _wait(self, now: float) -> None:
        """Return when every frame was answered, when there is something to mend, or to look after
        frames that are due."""
        loop = asyncio.get_running_loop()
        at = self._next_look()
        self._wakeup = loop.create_future()
        timer = loop.call_later(max(0.0, at - now), self._on_timer, at)
        unsubscribe = self._pool.subscribe(self._wake) if self._is_troubled else None
        try:
            await self._wakeup
        finally:
            self._wakeup = None
            timer.cancel()
            if unsubscribe is not None:
                unsubscribe()

    def _next_look(self) -> float:
        if not self._is_troubled:
            return min([sent.due for sent in self._roots])
        assert self._troubled_since is not None
        at = self._troubled_since + self._limits.expert_wait_s
        for root in self._roots:
            for sent in root.unfinished():
                if sent.state is FrameState.WAITING:
                    at = min(at, sent.due)
                elif sent.state is FrameState.FAILED:
                    at = min(at, sent.retry_at)
                elif self._may_leave_behind:
                    at = min(at, self._leave_at(sent))
        return at

    def _on_timer(self, at: float, *, is_first: bool = True) -> None:
        """Where the loop itself was held up, answers that came meanwhile are taken in first."""
        if is_first and time.monotonic() - at > _TIMER_LAG_S:
            again = asyncio.get_running_loop().call_later
            again(_AFTER_LAG_S, lambda: self._on_timer(at, is_first=False))
            return
        self._trouble(time.monotonic())
        self._wake()

    def _wake(self) -> None:
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)


def _resend_delay_s(num_retries: int) -> float:
    return min(_FIRST_RESEND_DELAY_S * 2.0 ** min(num_retries, 16), _MAX_RESEND_DELAY_S)


def _over_tokens(plan: DispatchPlan, token_ids: NDArray[np.int64]) -> DispatchPlan:
    """A plan over some of the call's tokens as one over all of them."""
    frames = [frame._replace(token_ids=token_ids[frame.token_ids]) for frame in plan.frames]
    return DispatchPlan(frames, token_ids[plan.token_ids])
