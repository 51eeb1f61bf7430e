"""Layer calls carried whole by native code, with what the shard keeps account of.

Between two layers the experts' weights pass through all caches, so that every function run for a
call starts cold; what counts is how few of them there are. Calls that are not of the common kind,
and frames that fail or are late, are left to `LayerDispatch`.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from opentelemetry.trace import Span
from torch import Tensor

from router_service.dispatch.dispatch_plan import (
    MAX_COMBINED_TOP_K,
    GatedTokens,
    PlannedFrame,
    group_by_expert,
    plan_dispatch,
    rows_that_fit,
)
from router_service.dispatch.dispatch_telemetry import DispatchSpan, RoundNames
from router_service.dispatch.lane_layers import LayersRun, PreparedLayers, can_run
from router_service.dispatch.lane_rounds import LaneRound, LaneRounds
from router_service.dispatch.lane_transport import LaneWorkerLink
from router_service.dispatch.layer_dispatch import DispatchParts, LayerDispatch
from router_service.dispatch.replica_chooser import Choice
from router_service.dispatch.sent_frame import SentFrame
from router_service.dispatch.worker_pool import PoolView
from router_service.experts import StepContext, StepLayers
from services.core.errors import MalformedFrameError
from services.core.lane.client import UNANSWERED, RoundPart, RoundRequest, round_trips
from services.core.routing_table import RoutingTable
from services.core.tracing import unix_ns
from services.core.wire import ResponseFrame, decode_response

_MAX_UNBOOKED = 32


class LaneCall(NamedTuple):
    """A call whose frames are on their way, or over. Workers of `choice` are numbers of `view`;
    `names` are those of a sampled step's spans."""

    layer: int
    round_: LaneRound
    view: PoolView
    choice: Choice
    names: RoundNames | None

    @property
    def request(self) -> RoundRequest:
        """Has the output [T, H], once the round is whole."""
        return self.round_.request


class LaneCalls:
    """Used on one event loop, beside `LayerDispatch` over the same pool.

    Answers go into the chooser's books a few calls late where no expert has a choice of workers.
    """

    def __init__(self, rounds: LaneRounds, parts: DispatchParts, *, num_experts: int) -> None:
        self._rounds = rounds
        self._parts = parts
        self._any_rows = np.ones(num_experts, dtype=np.int64)
        self._max_rows: tuple[PoolView, array[int]] | None = None
        self._prepared: PreparedLayers | None = None
        self._unbooked: list[tuple[RoutingTable, memoryview[int]]] = []
        """Results of rounds; not the rounds, which hold tensors."""

    def begin(
        self,
        layer: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        context: StepContext,
    ) -> LaneCall | None:
        """Send a call's frames. None, with nothing sent, where it must go another way: a tensor
        that is not on the CPU, a token that is not finite, an expert without a worker, a worker
        without a lane, a frame that must be split."""
        if not topk_ids.is_cpu or topk_ids.shape[1] > MAX_COMBINED_TOP_K:
            return None
        view, chooser = self._parts.pool.view, self._parts.chooser
        rows_per_expert = self._any_rows
        if view.table.has_choice[layer]:
            self._book_answers()
            rows_per_expert = np.bincount(topk_ids.numpy().ravel(), minlength=len(rows_per_expert))
        choice = chooser.plan(layer, rows_per_expert, skip_stuck=context.incidents is not None)
        names = None if context.trace is None else RoundNames(context.trace, len(view.links))
        round_ = self._rounds.start(
            layer=layer,
            hidden_states=hidden_states,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            worker_of_expert=choice.workers,
            links=view.links,
            max_rows=self._max_rows_of(view, hidden_states, topk_ids.shape[1]),
            shares=choice.shares,
            stream=context.micro_batch,
            may_block=context.num_micro_batches == 1,
            traceparents=None if names is None else names.traceparents,
        )
        return None if round_ is None else LaneCall(layer, round_, view, choice, names)

    def run_layers(
        self, first: int, layers: StepLayers, x: Tensor, update: Tensor, context: StepContext
    ) -> LayersRun | None:
        """Run from the layer `first` for as long as nothing has to be decided. None, with nothing
        computed, where something has: an expert has several workers, or one is stuck; the step is
        sampled or not alone in flight, or there are no lanes."""
        view, chooser = self._parts.pool.view, self._parts.chooser
        if (
            context.trace is not None
            or context.num_micro_batches > 1
            or not self._rounds.can_run_layers
            or True in view.table.has_choice
            or (context.incidents is not None and chooser.num_stuck)
            or not can_run(layers, x, update)
        ):
            return None
        prepared = self._prepared
        if prepared is None or not prepared.is_of(layers, view):
            top_k = layers.layers[0].part.num_experts_per_tok
            prepared = self._prepared = PreparedLayers(
                layers.layers,
                view,
                self._rounds,
                max_rows=self._max_rows_of(view, x, top_k),
                hidden_size=x.shape[1],
                dtype=x.dtype,
            )
        stop, round_ = prepared.run(self._rounds, first, layers, x, update)
        self._parts.budget.earn(prepared.request.num_parts)
        results = prepared.results[first:stop].copy()
        self._unbooked.extend((view.table, result.data) for result in results)
        if len(self._unbooked) >= _MAX_UNBOOKED:
            self._book_answers()
        return LayersRun(prepared, first, stop, round_)

    def call_of(self, run: LayersRun) -> LaneCall | None:
        """The call of the layer at which `run` stopped, None if nothing was sent for it."""
        if run.round_ is None:
            return None
        view = run.prepared.view
        return LaneCall(run.stop, run.round_, view, Choice(view.table.resolve(run.stop)), None)

    async def finish(self, call: LaneCall) -> bool:
        """Whether the call became whole; then its output is there, and it is in the books.

        If not, a frame failed or is past its deadline, and `hand_over` must follow.
        """
        try:
            if not call.round_.is_whole and not await self._wait(call):
                return False
        except BaseException:
            call.round_.release()
            raise
        self._parts.budget.earn(call.request.num_parts)
        if call.names is not None:
            call.names.step.later(self._span_record(call, call.names, time.perf_counter_ns()))
        self._unbooked.append((call.view.table, call.request.copied_result()))
        if len(self._unbooked) >= _MAX_UNBOOKED:
            self._book_answers()
        return True

    def hand_over(
        self, call: LaneCall, gated: GatedTokens, dispatch: LayerDispatch, span: Span | None
    ) -> None:
        """Let `dispatch`, of the same call and under its `span`, go on with the frames as they
        are."""
        self._book_answers()
        view, frames = call.view, _frames_of(call.choice, gated)
        parts = call.round_.parts
        sent = []
        for part in parts:
            worker_id = view.table.workers[part.worker].worker_id
            planned, link = frames[part.worker], view.links[part.worker]
            dispatch_span: DispatchSpan | None = None
            if span is not None and call.names is not None:
                dispatch_span = self._parts.telemetry.start_dispatch(
                    span,
                    layer=call.layer,
                    worker_id=worker_id,
                    frame=planned,
                    span_id=call.names.frame_ids[part.worker],
                    start_ns=unix_ns(part.sent_ns),
                )
            frame = SentFrame(planned, worker_id, link, part.call_id, dispatch_span, dispatch)
            frame.sent_ns = part.sent_ns
            sent.append(frame)
        dispatch.take_over(sent)
        for part, frame in zip(parts, sent, strict=True):
            link = view.links[part.worker]
            assert isinstance(link, LaneWorkerLink)
            if part.outcome == UNANSWERED:
                link.adopt(part.call_id, frame.take_answer)
            else:
                frame.received_ns = part.received_ns
                frame.response = _response(part, link)
                dispatch.take(frame)

    async def _wait(self, call: LaneCall) -> bool:
        """While frames are in flight, the books say so."""
        chooser, workers = self._parts.chooser, call.view.table.workers
        trips = [
            (workers[trip.worker].worker_id, trip.num_assignments, trip.num_experts)
            for trip in round_trips(call.request.result)
        ]
        for trip in trips:
            chooser.sent(*trip)
        try:
            deadline_s = min([chooser.deadline_s(*trip) for trip in trips])
            return await self._rounds.wait(call.round_, deadline_s)
        finally:
            for trip in trips:
                chooser.dropped(*trip)

    def _span_record(self, call: LaneCall, names: RoundNames, ended_ns: int) -> Callable[[], None]:
        """A call that records the spans of a whole round, and holds none of its activations."""
        layer, choice, workers = call.layer, call.choice, call.view.table.workers
        gate_choice, result = call.request.gate_choice, call.request.result

        def record() -> None:
            gated = group_by_expert(*gate_choice, len(self._any_rows))
            self._parts.telemetry.record_round(
                names,
                layer=layer,
                gated=gated,
                frames=_frames_of(choice, gated),
                trips=round_trips(result),
                worker_ids=[worker.worker_id for worker in workers],
                ended_ns=ended_ns,
            )

        return record

    def _book_answers(self) -> None:
        unbooked, self._unbooked = self._unbooked, []
        chooser, telemetry = self._parts.chooser, self._parts.telemetry
        for table, result in unbooked:
            for trip in round_trips(result):
                worker_id = table.workers[trip.worker].worker_id
                rows, experts = trip.num_assignments, trip.num_experts
                elapsed_s = trip.elapsed_ns * 1e-9
                chooser.sent(worker_id, rows, experts)
                chooser.answered(
                    worker_id, rows, elapsed_s, experts, compute_s=trip.compute_us * 1e-6
                )
                telemetry.observe(worker_id, elapsed_s)

    def _max_rows_of(self, view: PoolView, hidden_states: Tensor, top_k: int) -> array[int]:
        """[W]: what this process and each worker accept."""
        known = self._max_rows
        if known is not None and known[0] is view:
            return known[1]
        row_bytes = hidden_states.shape[1] * hidden_states.itemsize
        own = self._parts.limits.max_frame_bytes
        max_rows = array(
            "q",
            [
                rows_that_fit(min(own, limit), top_k=top_k, row_bytes=row_bytes)
                for limit in view.max_frame_bytes
            ],
        )
        self._max_rows = view, max_rows
        return max_rows


def _frames_of(choice: Choice, gated: GatedTokens) -> dict[int, PlannedFrame]:
    """By worker: the frames of a round, as `LayerDispatch` would have planned them."""
    plan = plan_dispatch(gated, choice.workers, choice.shares)
    return {frame.worker: frame for frame in plan.frames}


def _response(part: RoundPart, link: LaneWorkerLink) -> ResponseFrame | None:
    """None if the link is broken, or has to be."""
    if part.answer is None:
        return None
    try:
        return decode_response(part.answer)
    except MalformedFrameError as error:
        link.broke(error.message)
        return None
