"""Spans of requests and of sampled steps.

A request's span has its phases as children. A sampled step hangs under one traced request and links
to the others that took part; it travels through the layers, where each dispatch adds its own spans.
Times are taken when things happen, and spans are made later, when tokens are out (`Later`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from opentelemetry.trace import Link, Span, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

from router_service.engine.sampling_budget import SamplingBudget
from router_service.experts import MissingExperts, Resend, StepTrace
from router_service.scheduling.sequence import Sequence as TokenSequence
from router_service.scheduling.step_plan import ScheduledSequence
from services.core import telemetry
from services.core.generation import GenerateRequest
from services.core.tracing import extract_context, record_span, span_context

PHASE_QUEUE, PHASE_PREFILL, PHASE_DECODE = "queue", "prefill", "decode"

Later = Callable[[Callable[[], object]], object]
"""Takes a call to be made when nobody waits for tokens."""

PhaseObserver = Callable[[str, float, Span], None]
"""Told of a phase that is over, its seconds, and the request's span."""


class RequestTrace:
    """`SPAN_GENERATE` of one request, and the durations of its phases, which are measured whether
    the trace is recorded or not. Nearly free where it is not."""

    def __init__(
        self,
        tracer: Tracer,
        request: GenerateRequest,
        observe_phase: PhaseObserver | None = None,
        *,
        later: Later = lambda record: record(),
    ) -> None:
        self._tracer = tracer
        self._later = later
        self._observe_phase = observe_phase
        self._start_ns = time.time_ns()
        self._scheduled_ns: int | None = None
        self._first_token_ns: int | None = None
        self._num_prompt_tokens = len(request.prompt_token_ids)
        self.prefill_sampled = False
        self.decode_sampled = False
        self.span = tracer.start_span(
            telemetry.SPAN_GENERATE,
            context=extract_context(request.trace_context),
            start_time=self._start_ns,
        )
        self.is_recording = self.span.is_recording()
        if self.is_recording:
            later(lambda: self.span.set_attributes(_request_attributes(request)))

    def restored(self, start_ns: int, end_ns: int, num_tokens: int) -> None:
        """The session store was asked, and gave so many tokens' KV."""
        if self.is_recording:
            self._later(
                partial(
                    self._record_phase,
                    telemetry.SPAN_RESTORE,
                    start_ns,
                    end_ns,
                    {telemetry.ATTR_NUM_RESTORED_TOKENS: num_tokens},
                )
            )

    def scheduled(self) -> None:
        """The first sequence was admitted; later calls change nothing."""
        if self._scheduled_ns is None:
            self._scheduled_ns = time.time_ns()
            self._phase_over(
                PHASE_QUEUE, telemetry.SPAN_QUEUE, self._start_ns, self._scheduled_ns, {}
            )

    def first_token(self) -> None:
        """The first token was drawn; later calls change nothing."""
        if self._first_token_ns is None and self._scheduled_ns is not None:
            self._first_token_ns = time.time_ns()
            self._phase_over(
                PHASE_PREFILL,
                telemetry.SPAN_PREFILL,
                self._scheduled_ns,
                self._first_token_ns,
                {telemetry.ATTR_NUM_TOKENS: self._num_prompt_tokens},
            )

    def resent(self, resends: Sequence[Resend]) -> None:
        """Frames with tokens of this request were sent again."""
        if self.is_recording:
            for layer, worker_id, reason in resends:
                self.span.add_event(
                    telemetry.EVENT_RESENT,
                    {
                        telemetry.ATTR_LAYER: layer,
                        telemetry.ATTR_WORKER_ID: worker_id,
                        telemetry.ATTR_RETRY_REASON: reason,
                    },
                )

    def waits_for(self, missing: MissingExperts) -> None:
        """A sequence of this request could not go on for want of experts."""
        if self.is_recording:
            self.span.add_event(
                telemetry.EVENT_EXPERT_WAIT,
                {telemetry.ATTR_LAYER: missing.layer, telemetry.ATTR_EXPERT_IDS: missing.experts},
            )

    def end(
        self,
        sequences: Sequence[TokenSequence],
        finish_reasons: Sequence[str],
        error: BaseException | None = None,
    ) -> None:
        now = time.time_ns()
        num_output_tokens = sum(len(sequence.output_token_ids) for sequence in sequences)
        if self._first_token_ns is not None:
            self._phase_over(
                PHASE_DECODE,
                telemetry.SPAN_DECODE,
                self._first_token_ns,
                now,
                {telemetry.ATTR_NUM_TOKENS: num_output_tokens},
            )
        if not self.is_recording:
            return
        attributes: dict[str, AttributeValue] = {
            telemetry.GEN_AI_USAGE_OUTPUT_TOKENS: num_output_tokens,
            telemetry.GEN_AI_RESPONSE_FINISH_REASONS: list(finish_reasons),
            telemetry.ATTR_NUM_CACHED_TOKENS: sequences[0].num_cached_tokens,
            telemetry.ATTR_NUM_RESTORED_TOKENS: sequences[0].num_restored_tokens,
        }
        self._later(lambda: self._record_end(now, attributes, error))

    def _phase_over(
        self,
        phase: str,
        span_name: str,
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, AttributeValue],
    ) -> None:
        if self._observe_phase is not None:
            # The wall clock may be set back in between.
            seconds = max(0, end_ns - start_ns) / 1e9
            self._later(partial(self._observe_phase, phase, seconds, self.span))
        if self.is_recording:
            self._later(partial(self._record_phase, span_name, start_ns, end_ns, attributes))

    def _record_phase(
        self, name: str, start_ns: int, end_ns: int, attributes: Mapping[str, AttributeValue]
    ) -> None:
        record_span(
            self._tracer,
            name,
            parent=span_context(self.span),
            start_ns=start_ns,
            end_ns=end_ns,
            attributes=attributes,
        )

    def _record_end(
        self, end_ns: int, attributes: Mapping[str, AttributeValue], error: BaseException | None
    ) -> None:
        self.span.set_attributes(attributes)
        if error is not None:
            self.span.set_status(StatusCode.ERROR, str(error))
        self.span.end(end_time=end_ns)


class StepSampler:
    """Decides which steps get a span, and makes it.

    Sampled are every `interval`-th step, and for each traced request one step with a prefill chunk
    and one with a decode, as early as may be. A `SamplingBudget` bounds what that costs; where it
    is scarce prefills and decodes take turns.
    """

    def __init__(
        self,
        tracer: Tracer,
        *,
        interval: int,
        clock: Callable[[], float] = time.monotonic,
        later: Later = lambda record: record(),
    ) -> None:
        self._tracer = tracer
        self._later = later
        self._interval = interval
        self._clock = clock
        self._budget = SamplingBudget(clock())
        self._began_at = 0.0
        self._was_prefill = False
        """Of the two kinds, that which was sampled last."""

    def begin(
        self,
        step: int,
        entries: Sequence[ScheduledSequence],
        trace_of: Callable[[TokenSequence], RequestTrace],
    ) -> StepTrace | None:
        """Of a step that is sampled; it is to be `end`ed."""
        traced = [
            (trace, entry.is_prefill)
            for entry in entries
            if (trace := trace_of(entry.sequence)).is_recording
        ]
        if not traced:
            return None
        parent = self._pick(step, traced)
        if parent is None:
            return None
        self._began_at = self._clock()
        others = {id(trace): trace for trace, _ in traced if trace is not parent}
        num_tokens = sum(entry.num_tokens for entry in entries)
        num_decode_tokens = sum(1 for entry in entries if not entry.is_prefill)
        span = self._tracer.start_span(
            telemetry.SPAN_STEP,
            context=span_context(parent.span),
            links=[Link(trace.span.get_span_context()) for trace in others.values()],
            attributes={
                telemetry.ATTR_STEP: step,
                telemetry.ATTR_NUM_SEQS: len(entries),
                telemetry.ATTR_NUM_TOKENS: num_tokens,
                telemetry.ATTR_NUM_PREFILL_TOKENS: num_tokens - num_decode_tokens,
                telemetry.ATTR_NUM_DECODE_TOKENS: num_decode_tokens,
            },
        )
        return StepTrace(span)

    def end(self, trace: StepTrace) -> None:
        """The step is over."""
        end_ns = time.time_ns()
        self._budget.spend(self._clock() - self._began_at)
        self._later(lambda: self._record(trace, end_ns))

    def _record(self, trace: StepTrace, end_ns: int) -> None:
        began_at = self._clock()
        trace.end(end_ns)
        self._budget.spend(self._clock() - began_at)

    def _pick(self, step: int, traced: Sequence[tuple[RequestTrace, bool]]) -> RequestTrace | None:
        self._budget.earn(self._clock())
        if self._budget.is_spent:
            return None
        picked = self._first_of_its_kind(traced)
        if picked is None and step % self._interval == 0 and not self._budget.is_scarce:
            picked = traced[step // self._interval % len(traced)][0]
        return picked

    def _first_of_its_kind(
        self, traced: Sequence[tuple[RequestTrace, bool]]
    ) -> RequestTrace | None:
        """A request that has no sampled step yet of the kind that it has now."""
        for trace, is_prefill in traced:
            if is_prefill == self._was_prefill and self._budget.is_scarce:
                continue
            if is_prefill and not trace.prefill_sampled:
                trace.prefill_sampled = self._was_prefill = True
                return trace
            if not is_prefill and not trace.decode_sampled:
                trace.decode_sampled = True
                self._was_prefill = False
                return trace
        return None


def _request_attributes(request: GenerateRequest) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        telemetry.ATTR_REQUEST_ID: request.request_id,
        telemetry.GEN_AI_USAGE_INPUT_TOKENS: len(request.prompt_token_ids),
        telemetry.GEN_AI_REQUEST_MAX_TOKENS: request.sampling.max_tokens,
        telemetry.GEN_AI_REQUEST_TEMPERATURE: request.sampling.temperature,
    }
    if request.resumed:
        num_resumed = sum(len(choice.token_ids) for choice in request.resumed)
        attributes[telemetry.ATTR_NUM_RESUMED_TOKENS] = num_resumed
    if request.session_id is not None:
        attributes[telemetry.GEN_AI_CONVERSATION_ID] = request.session_id
    return attributes
