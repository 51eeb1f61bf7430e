"""Spans and metrics of a layer's dispatch. Spans exist only in sampled steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
from opentelemetry.trace import NoOpTracer, Span, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router_service.dispatch.dispatch_plan import GatedTokens, PlannedFrame
from router_service.dispatch.replica_chooser import WorkerFigures
from router_service.experts import StepContext, StepTrace
from services.core.deferred_observations import DeferredObservations
from services.core.lane.client import RoundTrip
from services.core.metrics import CALL_BUCKETS_S
from services.core.telemetry import (
    ATTR_COMPUTE_MS,
    ATTR_EXPERT_IDS,
    ATTR_GATE_WEIGHTS,
    ATTR_LAYER,
    ATTR_NUM_RETRIES,
    ATTR_NUM_TOKENS,
    ATTR_QUEUE_MS,
    ATTR_TOKENS_PER_EXPERT,
    ATTR_WORKER_ID,
    METRIC_DISPATCH,
    METRIC_DISPATCH_DEADLINE,
    METRIC_DISPATCH_EJECTIONS,
    METRIC_DISPATCH_HEDGES,
    METRIC_DISPATCH_RETRIES,
    METRIC_EJECTED_WORKERS,
    METRIC_EXPERT_WAIT,
    METRIC_LOST_WORKERS,
    METRIC_OUTSTANDING_ROWS,
    METRIC_REFUSED_WORKERS,
    SPAN_DISPATCH,
    SPAN_LAYER,
)
from services.core.tracing import (
    chosen_span_id,
    new_span_id,
    record_span,
    span_carrier,
    span_context,
    traceparent_of,
    unix_ns,
)
from services.core.wire import ResponseFrame


class DispatchTelemetry:
    """What one shard's dispatches record; without a tracer or a registry they go nowhere."""

    def __init__(self, tracer: Tracer | None, registry: CollectorRegistry | None) -> None:
        self._tracer = tracer or NoOpTracer()
        registry = registry if registry is not None else CollectorRegistry()
        self._durations = Histogram(
            METRIC_DISPATCH,
            "Seconds from sending a frame to a worker to its answer",
            ["worker"],
            buckets=CALL_BUCKETS_S,
            registry=None,
        )
        self._answers = DeferredObservations(registry, [self._durations], self._observe)
        self._retries = Counter(
            METRIC_DISPATCH_RETRIES,
            "Frames to be sent again, by what went wrong",
            ["reason"],
            registry=registry,
        )
        self._hedges = Counter(
            METRIC_DISPATCH_HEDGES,
            "Frames past their deadline that were sent to a second worker too",
            registry=registry,
        )
        self._ejections = Counter(
            METRIC_DISPATCH_EJECTIONS,
            "Times a worker with other replicas was left alone after several faults",
            registry=registry,
        )
        self._lost = Counter(
            METRIC_LOST_WORKERS,
            "Workers in use that went without a word: killed, crashed or cut off",
            registry=registry,
        )
        self._expert_wait = Counter(
            METRIC_EXPERT_WAIT,
            "Seconds that layer calls and sequences waited for experts without a replica",
            registry=registry,
        )
        self._registry = registry
        self._children: dict[str, Histogram] = {}

    def export_workers(
        self,
        figures: Callable[[], Iterator[WorkerFigures]],
        count_refused: Callable[[], int],
    ) -> None:
        """Show what the books say of every worker, read when it is scraped."""
        self._registry.register(_WorkerCollector(figures, count_refused))

    def layer_span(
        self,
        layer: int,
        gated: GatedTokens,
        context: StepContext,
        names: RoundNames | None = None,
    ) -> AbstractContextManager[Span | None]:
        """See `layer_span`. With `names` of a round that did not become whole, it is the one that
        its frames name."""
        return layer_span(self._tracer, layer, gated, context, names)

    def start_dispatch(
        self,
        parent: Span,
        *,
        layer: int,
        worker_id: str,
        frame: PlannedFrame,
        num_retries: int = 0,
        span_id: int | None = None,
        start_ns: int | None = None,
    ) -> DispatchSpan:
        """The span of one frame under its layer's; of one that is on its way already, with its id
        and since when (Unix time)."""
        with chosen_span_id(span_id):
            span = self._tracer.start_span(
                SPAN_DISPATCH,
                context=span_context(parent),
                attributes=_dispatch_attributes(layer, worker_id, frame, num_retries),
                start_time=start_ns,
            )
        return DispatchSpan(span)

    def record_round(
        self,
        names: RoundNames,
        *,
        layer: int,
        gated: GatedTokens,
        frames: Mapping[int, PlannedFrame],
        trips: Sequence[RoundTrip],
        worker_ids: Sequence[str],
        ended_ns: int,
    ) -> None:
        """The spans of a whole round: the layer's, and one for the frame of each worker, whose
        numbers `frames` and `trips` have. `ended_ns` is of `time.perf_counter_ns`."""
        span = record_layer(
            self._tracer,
            names.step,
            layer,
            gated,
            started_ns=names.started_ns,
            ended_ns=ended_ns,
            span_id=names.layer_id,
        )
        parent = span_context(span)
        for trip in trips:
            record_span(
                self._tracer,
                SPAN_DISPATCH,
                parent=parent,
                start_ns=unix_ns(trip.sent_ns),
                end_ns=unix_ns(trip.received_ns),
                attributes={
                    **_dispatch_attributes(layer, worker_ids[trip.worker], frames[trip.worker]),
                    ATTR_QUEUE_MS: trip.queue_us / 1000,
                    ATTR_COMPUTE_MS: trip.compute_us / 1000,
                },
                span_id=names.frame_ids[trip.worker],
            )

    def observe(self, worker_id: str, seconds: float) -> None:
        """A frame of that worker was answered after so long."""
        self._answers.add((worker_id, seconds))

    def _observe(self, answer: tuple[str, float]) -> None:
        worker_id, seconds = answer
        child = self._children.get(worker_id)
        if child is None:
            child = self._children[worker_id] = self._durations.labels(worker_id)
        child.observe(seconds)

    def count_retry(self, reason: str) -> None:
        self._retries.labels(reason).inc()

    def count_hedge(self) -> None:
        self._hedges.inc()

    def count_ejection(self) -> None:
        self._ejections.inc()

    def count_lost(self) -> None:
        self._lost.inc()

    def count_expert_wait(self, seconds: float) -> None:
        self._expert_wait.inc(seconds)

    def forget_worker(self, worker_id: str) -> None:
        """Drop the series of a worker that is gone, so that names that change do not pile up."""
        self._answers.settle()
        if self._children.pop(worker_id, None) is not None:
            self._durations.remove(worker_id)


class _WorkerCollector(Collector):
    def __init__(
        self, figures: Callable[[], Iterator[WorkerFigures]], count_refused: Callable[[], int]
    ) -> None:
        self._figures = figures
        self._count_refused = count_refused

    def describe(self) -> Iterator[Metric]:
        yield from self._families()

    def collect(self) -> Iterator[Metric]:
        rows, deadlines, ejected, refused = self._families()
        num_ejected = 0
        for worker in self._figures():
            rows.add_metric([worker.worker_id], worker.outstanding_rows)
            deadlines.add_metric([worker.worker_id], worker.deadline_s)
            num_ejected += worker.is_ejected
        ejected.add_metric([], num_ejected)
        refused.add_metric([], self._count_refused())
        yield from (rows, deadlines, ejected, refused)

    def _families(self) -> tuple[GaugeMetricFamily, ...]:
        return (
            GaugeMetricFamily(
                METRIC_OUTSTANDING_ROWS, "Rows sent to a worker and not answered", labels=["worker"]
            ),
            GaugeMetricFamily(
                METRIC_DISPATCH_DEADLINE,
                "Seconds a frame of one row may take before it is sent elsewhere too",
                labels=["worker"],
            ),
            GaugeMetricFamily(METRIC_EJECTED_WORKERS, "Workers left alone for now", labels=[]),
            GaugeMetricFamily(
                METRIC_REFUSED_WORKERS, "Workers that do not compute this model", labels=[]
            ),
        )


class DispatchSpan:
    """From a frame's sending to its answer. `traceparent` makes the worker's span its child."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.traceparent = span_carrier(span).get("traceparent", "")

    def answered(self, response: ResponseFrame) -> None:
        self._span.set_attribute(ATTR_QUEUE_MS, response.queue_us / 1000)
        self._span.set_attribute(ATTR_COMPUTE_MS, response.compute_us / 1000)
        self._span.end()

    def failed(self, reason: str) -> None:
        self._span.set_status(StatusCode.ERROR, reason)
        self._span.end()


class RoundNames:
    """Ids of the spans of a layer call that native code carries: its frames name their spans, which
    are recorded afterwards."""

    __slots__ = ("frame_ids", "layer_id", "started_ns", "step")

    def __init__(self, step: StepTrace, num_workers: int) -> None:
        self.step = step
        self.started_ns = time.perf_counter_ns()
        self.layer_id = new_span_id()
        self.frame_ids = [new_span_id() for _ in range(num_workers)]
        """Of the frame to each worker."""

    @property
    def traceparents(self) -> bytes:
        """As `RoundRequest` has them."""
        trace_id = self.step.trace_id
        return "".join([traceparent_of(trace_id, each) for each in self.frame_ids]).encode()


@contextmanager
def layer_span(
    tracer: Tracer,
    layer: int,
    gated: GatedTokens,
    context: StepContext,
    names: RoundNames | None = None,
) -> Iterator[Span | None]:
    """The layer's span under the step's; None where the step is not sampled."""
    if context.trace is None:
        yield None
        return
    with chosen_span_id(None if names is None else names.layer_id):
        span = tracer.start_span(
            SPAN_LAYER,
            context=context.trace.parent,
            attributes=_layer_attributes(layer, gated),
            start_time=None if names is None else unix_ns(names.started_ns),
        )
    try:
        yield span
    except BaseException as error:
        span.set_status(StatusCode.ERROR, str(error))
        raise
    finally:
        span.end()


def record_layer(
    tracer: Tracer,
    trace: StepTrace,
    layer: int,
    gated: GatedTokens,
    *,
    started_ns: int,
    ended_ns: int,
    span_id: int | None = None,
) -> Span:
    """The span of a layer that is over; times are of `time.perf_counter_ns`."""
    return record_span(
        tracer,
        SPAN_LAYER,
        parent=trace.parent,
        start_ns=unix_ns(started_ns),
        end_ns=unix_ns(ended_ns),
        attributes=_layer_attributes(layer, gated),
        span_id=span_id,
    )


def _layer_attributes(layer: int, gated: GatedTokens) -> dict[str, AttributeValue]:
    """Gate weights are the means over the tokens each expert got, in the order of expert ids."""
    used = np.flatnonzero(gated.rows_per_expert)
    counts = gated.rows_per_expert[used]
    weights = np.bincount(gated.expert_ids, weights=gated.topk_weights)[used] / counts
    return {
        ATTR_LAYER: layer,
        ATTR_NUM_TOKENS: gated.num_tokens,
        ATTR_EXPERT_IDS: used.tolist(),
        ATTR_TOKENS_PER_EXPERT: counts.tolist(),
        ATTR_GATE_WEIGHTS: np.round(weights, 4).tolist(),
    }


def _dispatch_attributes(
    layer: int, worker_id: str, frame: PlannedFrame, num_retries: int = 0
) -> dict[str, AttributeValue]:
    return {
        ATTR_LAYER: layer,
        ATTR_WORKER_ID: worker_id,
        ATTR_NUM_TOKENS: len(frame.token_ids),
        ATTR_EXPERT_IDS: frame.expert_ids,
        ATTR_TOKENS_PER_EXPERT: frame.rows_per_expert,
        ATTR_NUM_RETRIES: num_retries,
    }
