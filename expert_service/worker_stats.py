"""What a worker counts, for Prometheus and for its lease."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from expert_service.compute import Outcome
from protos import experts_pb2
from services.core.busy_window import BusyWindow
from services.core.deferred_observations import DeferredObservations
from services.core.metrics import BUSY_WINDOW_S, CALL_BUCKETS_S, ROWS_BUCKETS
from services.core.registry import Slot
from services.core.telemetry import (
    METRIC_WORKER_BATCH_ROWS,
    METRIC_WORKER_BUSY,
    METRIC_WORKER_BUSY_RATIO,
    METRIC_WORKER_COMPUTE,
    METRIC_WORKER_FRAMES,
    METRIC_WORKER_LOAD,
    METRIC_WORKER_MEMORY_FREE,
    METRIC_WORKER_QUEUE,
    METRIC_WORKER_SLOTS,
    METRIC_WORKER_SLOTS_LOADED,
    METRIC_WORKER_SLOTS_UNLOADED,
    METRIC_WORKER_TOKENS,
    METRIC_WORKER_WEIGHT_BYTES,
)
from services.core.tracing import traceparent_exemplar

_LOAD_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalMeans:
    """Per frame, over the time since the last reading; 0 if there was no frame."""

    queue_ms: float
    compute_ms: float


class WorkerStats:
    """Used from the event loop; the metrics endpoint's thread only reads."""

    def __init__(
        self, registry: CollectorRegistry, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._tokens: dict[Slot, int] = {}
        self._num_frames = 0
        self._read_frames = 0
        self._interval_queue_us = 0
        self._interval_compute_us = 0
        frames = Counter(
            METRIC_WORKER_FRAMES,
            "Dispatch frames answered, by status",
            ["status"],
            registry=registry,
        )
        self._frames_by_status = {
            number: frames.labels(status=name.removeprefix("DISPATCH_STATUS_").lower())
            for name, number in experts_pb2.DispatchStatus.items()
        }
        self._queue = Histogram(
            METRIC_WORKER_QUEUE,
            "Time a frame waited for the compute thread",
            buckets=CALL_BUCKETS_S,
            registry=None,
        )
        self._compute = Histogram(
            METRIC_WORKER_COMPUTE,
            "Time of the computation a frame was part of",
            buckets=CALL_BUCKETS_S,
            registry=None,
        )
        self._batch_rows = Histogram(
            METRIC_WORKER_BATCH_ROWS,
            "Expert rows computed together, seen by each frame",
            buckets=ROWS_BUCKETS,
            registry=None,
        )
        self._busy_us = 0
        self._busy = BusyWindow(BUSY_WINDOW_S, started_at=clock())
        self._sources: list[Callable[[], None]] = []
        registry.register(_BusyCollector(lambda: self.busy_s, self.busy_ratio))
        self._held = Gauge(METRIC_WORKER_SLOTS, "Slots (layer, expert) held", registry=registry)
        self._weight_bytes = Gauge(
            METRIC_WORKER_WEIGHT_BYTES, "Bytes of the weights held", registry=registry
        )
        self._memory_free = Gauge(
            METRIC_WORKER_MEMORY_FREE, "Bytes that further slots may take", registry=registry
        )
        self._slots_loaded = Counter(
            METRIC_WORKER_SLOTS_LOADED, "Slots loaded at run time", registry=registry
        )
        self._slots_unloaded = Counter(
            METRIC_WORKER_SLOTS_UNLOADED, "Slots unloaded at run time", registry=registry
        )
        self._load = Histogram(
            METRIC_WORKER_LOAD,
            "Time to load slots at run time, of one request",
            buckets=_LOAD_BUCKETS_S,
            registry=registry,
        )
        self._computed = DeferredObservations(
            registry, [self._queue, self._compute, self._batch_rows], self._observe
        )
        registry.register(_TokenCollector(self._tokens))

    @property
    def num_frames(self) -> int:
        """Frames computed since start."""
        return self._num_frames

    def tokens(self) -> Mapping[Slot, int]:
        """Assignments computed per slot since start."""
        return dict(self._tokens)

    @property
    def busy_s(self) -> float:
        """Seconds of computing since start, of one frame or several together."""
        return self._busy_us / 1e6

    def record_busy(self, compute_us: int) -> None:
        """A computation is over, of one frame or several together."""
        self._busy_us += compute_us
        self._busy.add(compute_us / 1e6, ended_at=self._clock())

    def busy_ratio(self) -> float:
        """Share of the last `BUSY_WINDOW_S` seconds spent computing, 0 to 1."""
        return self._busy.ratio(self._clock())

    def show_held(self, *, num_slots: int, weight_bytes: int, memory_free_bytes: int) -> None:
        """What the lease says of memory; called whenever a lease is written."""
        self._held.set(num_slots)
        self._weight_bytes.set(weight_bytes)
        self._memory_free.set(memory_free_bytes)

    def record_loaded(self, num_slots: int, elapsed_s: float) -> None:
        self._slots_loaded.inc(num_slots)
        self._load.observe(elapsed_s)

    def record_unloaded(self, num_slots: int) -> None:
        self._slots_unloaded.inc(num_slots)

    def add_source(self, record: Callable[[], None]) -> None:
        """`record` brings in what was counted elsewhere; called before an interval is read."""
        self._sources.append(record)

    def record_computed(self, outcome: Outcome) -> None:
        assigned = outcome.job.frame.assignments
        self.record_frame(
            layer=outcome.job.frame.layer,
            expert_ids=assigned.expert_ids,
            rows_per_expert=assigned.rows_per_expert,
            queue_us=outcome.queue_us,
            compute_us=outcome.compute_us,
            batch_rows=outcome.batch_rows,
            traceparent=outcome.job.frame.traceparent,
        )

    def record_frame(
        self,
        *,
        layer: int,
        expert_ids: Sequence[int],
        rows_per_expert: Sequence[int],
        queue_us: int,
        compute_us: int,
        batch_rows: int,
        traceparent: str = "",
    ) -> None:
        """A frame was computed and answered; `batch_rows` assignments together with it.
        `traceparent` is the sender's span, where its step is sampled."""
        for expert, count in zip(expert_ids, rows_per_expert, strict=True):
            slot = (layer, expert)
            self._tokens[slot] = self._tokens.get(slot, 0) + count
        self._num_frames += 1
        self._interval_queue_us += queue_us
        self._interval_compute_us += compute_us
        self._frames_by_status[experts_pb2.DISPATCH_STATUS_OK].inc()
        self._computed.add((queue_us, compute_us, batch_rows, traceparent))

    def _observe(self, figures: tuple[int, int, int, str]) -> None:
        queue_us, compute_us, batch_rows, traceparent = figures
        exemplar = traceparent_exemplar(traceparent) if traceparent else None
        self._queue.observe(queue_us / 1e6, exemplar)
        self._compute.observe(compute_us / 1e6, exemplar)
        self._batch_rows.observe(batch_rows)

    def record_refused(self, status: experts_pb2.DispatchStatus) -> None:
        self._frames_by_status[status].inc()

    def read_interval(self) -> IntervalMeans:
        """Means since the last call."""
        for record in self._sources:
            record()
        frames = max(self._num_frames - self._read_frames, 1)
        means = IntervalMeans(
            queue_ms=self._interval_queue_us / frames / 1000,
            compute_ms=self._interval_compute_us / frames / 1000,
        )
        self._read_frames = self._num_frames
        self._interval_queue_us = self._interval_compute_us = 0
        return means


class _BusyCollector(Collector):
    """Reads the seconds and the ratio when scraped."""

    def __init__(self, read_busy_s: Callable[[], float], read_ratio: Callable[[], float]) -> None:
        self._read_busy_s = read_busy_s
        self._read_ratio = read_ratio

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(METRIC_WORKER_BUSY, "Seconds of computing")
        family.add_metric([], self._read_busy_s())
        yield family
        yield GaugeMetricFamily(
            METRIC_WORKER_BUSY_RATIO,
            f"Share of the last {BUSY_WINDOW_S:g} seconds spent computing",
            value=self._read_ratio(),
        )


class _TokenCollector(Collector):
    """Reads the counts when scraped, so that counting costs a frame nothing more."""

    def __init__(self, tokens: dict[Slot, int]) -> None:
        self._tokens = tokens

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            METRIC_WORKER_TOKENS,
            "Assignments (token, expert) computed, by slot",
            labels=["layer", "expert"],
        )
        for (layer, expert), count in sorted(self._tokens.copy().items()):
            family.add_metric([str(layer), str(expert)], count)
        yield family
