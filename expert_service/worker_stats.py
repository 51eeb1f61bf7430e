"""What a worker counts, for Prometheus and for its lease."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from expert_service.compute import Outcome
from protos import experts_pb2
from services.core.deferred_observations import DeferredObservations
from services.core.metrics import CALL_BUCKETS_S, ROWS_BUCKETS
from services.core.registry import Slot
from services.core.telemetry import (
    METRIC_WORKER_BATCH_ROWS,
    METRIC_WORKER_COMPUTE,
    METRIC_WORKER_FRAMES,
    METRIC_WORKER_QUEUE,
    METRIC_WORKER_TOKENS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalMeans:
    """Per frame, over the time since the last reading; 0 if there was no frame."""

    queue_ms: float
    compute_ms: float


class WorkerStats:
    """Used from the event loop; the metrics endpoint's thread only reads."""

    def __init__(self, registry: CollectorRegistry) -> None:
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

    def record_computed(self, outcome: Outcome) -> None:
        frame = outcome.job.frame
        assigned = frame.assignments
        for expert, count in zip(assigned.expert_ids, assigned.rows_per_expert, strict=True):
            slot = (frame.layer, expert)
            self._tokens[slot] = self._tokens.get(slot, 0) + count
        self._num_frames += 1
        self._interval_queue_us += outcome.queue_us
        self._interval_compute_us += outcome.compute_us
        self._frames_by_status[experts_pb2.DISPATCH_STATUS_OK].inc()
        self._computed.add((outcome.queue_us, outcome.compute_us, outcome.batch_rows))

    def _observe(self, figures: tuple[int, int, int]) -> None:
        queue_us, compute_us, batch_rows = figures
        self._queue.observe(queue_us / 1e6)
        self._compute.observe(compute_us / 1e6)
        self._batch_rows.observe(batch_rows)

    def record_refused(self, status: experts_pb2.DispatchStatus) -> None:
        self._frames_by_status[status].inc()

    def read_interval(self) -> IntervalMeans:
        """Means since the last call."""
        frames = max(self._num_frames - self._read_frames, 1)
        means = IntervalMeans(
            queue_ms=self._interval_queue_us / frames / 1000,
            compute_ms=self._interval_compute_us / frames / 1000,
        )
        self._read_frames = self._num_frames
        self._interval_queue_us = self._interval_compute_us = 0
        return means


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
