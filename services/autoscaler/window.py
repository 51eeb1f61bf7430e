"""Load over a sliding window, from the counters that leases carry.

Leases come once a heartbeat and are read at other moments, so time is taken from the lease where
it says when it was written. A process that started anew counts from zero again: its window starts
over.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from services.autoscaler.view import FleetView, Phase, WorkerView
from services.core.registry import FleetSnapshot, ShardRecord, Slot, WorkerRecord

PREFILL_TOKENS_PER_GENERATED = 8.0
"""Past so many prefilled tokens for one generated, prefill takes most of the time; decode again
below half of it."""
PREFILL_ROWS_PER_ACTIVATION = 16.0
"""Where no shard tells: rows of one expert in one frame that only prefill brings."""


class LoadWindow:
    """Give it every snapshot with `add`, then read `view`. `now` is in seconds and only grows.

    How saturated the shards are is taken over `saturation_window_s`, as requests come by chance.
    All load is measured anew when workers have come or gone: it was another fleet's.
    """

    def __init__(self, window_s: float = 2.0, saturation_window_s: float = 6.0) -> None:
        self._window_s = window_s
        self._saturation_window_s = saturation_window_s
        self._workers: dict[str, _Series] = {}
        self._shards: dict[str, _Series] = {}
        self._steps: dict[str, _Series] = {}
        self._ready: frozenset[str] = frozenset()
        self._records: tuple[WorkerRecord, ...] = ()
        self._phase: Phase = "idle"

    def add(self, snapshot: FleetSnapshot, now: float) -> None:
        self._records = snapshot.workers
        ready = frozenset(one.worker_id for one in snapshot.workers if one.state == "ready")
        if ready != self._ready:
            self._workers.clear()
            self._steps.clear()
            self._ready = ready
        for worker in snapshot.workers:
            series = self._workers.setdefault(worker.worker_id, _Series())
            series.add(_worker_sample(worker, now), worker.started_at, self._window_s)
        for shard in snapshot.shards:
            sample = _shard_sample(shard, now)
            for known, window_s in (
                (self._shards, self._window_s),
                (self._steps, self._saturation_window_s),
            ):
                series = known.setdefault(shard.shard_id, _Series())
                series.add(sample, shard.started_at, window_s)
        _forget(self._workers, {worker.worker_id for worker in snapshot.workers})
        for known in (self._shards, self._steps):
            _forget(known, {shard.shard_id for shard in snapshot.shards})

    def view(self) -> FleetView:
        own = {
            record.worker_id: _view(record, self._workers[record.worker_id])
            for record in self._records
        }
        frames = {name: series.rate("frames") for name, series in self._workers.items()}
        workers = _with_activations(_at_one_time(own, self._demanded()), frames)
        self._phase = self._detect_phase(workers)
        steps = [series for series in self._steps.values() if series.newest("steps") > 0]
        busy = math.fsum(series.rate("steps") for series in steps)
        return FleetView(
            workers=workers,
            phase=self._phase,
            saturation=_mean([series.rate("full") for series in steps]),
            experts_share=math.fsum(s.rate("experts") for s in steps) / busy if busy > 0 else None,
        )

    def _demanded(self) -> dict[Slot, float]:
        """Rows per second that shards sent for each slot."""
        demanded: dict[Slot, float] = {}
        for series in self._shards.values():
            for slot, rate in series.row_rates().items():
                demanded[slot] = demanded.get(slot, 0.0) + rate
        return demanded

    def _detect_phase(self, workers: Mapping[str, WorkerView]) -> Phase:
        prefilled = math.fsum(series.rate("prefilled") for series in self._shards.values())
        generated = math.fsum(series.rate("generated") for series in self._shards.values())
        if prefilled + generated > 0:
            threshold = PREFILL_TOKENS_PER_GENERATED
            if self._phase == "prefill":
                threshold /= 2
            return "prefill" if prefilled > threshold * generated else "decode"
        rows = math.fsum(math.fsum(worker.rows.values()) for worker in workers.values())
        if rows == 0:
            return "idle"
        activated = math.fsum(math.fsum(w.activations.values()) for w in workers.values())
        return "prefill" if rows > PREFILL_ROWS_PER_ACTIVATION * activated else "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    at: float
    counts: Mapping[str, float]
    rows: Mapping[Slot, int]


@dataclass(slots=True)
class _Series:
    """Samples of one process, the oldest just about a window before the newest."""

    started_at: float = 0.0
    samples: deque[_Sample] = field(default_factory=deque)

    def add(self, sample: _Sample, started_at: float, window_s: float) -> None:
        if self.samples and self._is_reset(sample, started_at):
            self.samples.clear()
        self.started_at = started_at
        if self.samples and self.samples[-1].at == sample.at:
            return
        self.samples.append(sample)
        # A little early is in time: heartbeats are never exactly a second apart.
        while len(self.samples) > 2 and self.samples[1].at <= sample.at - 0.95 * window_s:
            self.samples.popleft()

    def rate(self, name: str) -> float:
        if self.span_s <= 0:
            return 0.0
        first, last = self.samples[0], self.samples[-1]
        return (last.counts[name] - first.counts[name]) / self.span_s

    def newest(self, name: str) -> float:
        return self.samples[-1].counts[name]

    def row_rates(self) -> dict[Slot, float]:
        if self.span_s <= 0:
            return {}
        first, last = self.samples[0].rows, self.samples[-1].rows
        return {
            slot: max(0, count - first.get(slot, 0)) / self.span_s for slot, count in last.items()
        }

    @property
    def span_s(self) -> float:
        return self.samples[-1].at - self.samples[0].at if len(self.samples) > 1 else 0.0

    def _is_reset(self, sample: _Sample, started_at: float) -> bool:
        last = self.samples[-1]
        # By 1: sums of seconds that are read while they are added to may be a step behind.
        went_back = any(sample.counts[name] < count - 1 for name, count in last.counts.items())
        return started_at != self.started_at or sample.at < last.at or went_back


def _worker_sample(record: WorkerRecord, now: float) -> _Sample:
    counts = {"frames": float(record.num_frames), "busy": record.busy_s}
    return _Sample(at=record.written_at or now, counts=counts, rows=record.tokens)


def _shard_sample(record: ShardRecord, now: float) -> _Sample:
    counts = {
        "prefilled": float(record.num_prefilled_tokens),
        "generated": float(record.num_generated_tokens),
        "steps": record.step_s,
        "full": record.full_s,
        "experts": record.experts_s,
    }
    return _Sample(at=record.written_at or now, counts=counts, rows=record.expert_load)


def _view(record: WorkerRecord, series: _Series) -> WorkerView:
    frames = series.rate("frames")
    # Workers that do not count their busy seconds give means per frame.
    busy = series.rate("busy") or frames * record.compute_ms / 1000
    rows = {slot: rate for slot, rate in series.row_rates().items() if slot in record.slots}
    slot_bytes = record.slot_bytes
    if slot_bytes == 0 and record.slots:
        slot_bytes = -(-record.weight_bytes // len(record.slots))
    return WorkerView(
        worker_id=record.worker_id,
        host=record.host,
        device=record.device,
        started_at=record.started_at,
        is_ready=record.state == "ready",
        slots=record.slots,
        slot_bytes=slot_bytes,
        free_bytes=max(0, record.memory_free_bytes),
        sampled_s=series.span_s,
        utilization=min(1.0, busy),
        queue_ms=record.queue_ms,
        compute_ms=record.compute_ms,
        frames=frames,
        rows=rows,
    )


def _at_one_time(
    workers: Mapping[str, WorkerView], demanded: Mapping[Slot, float]
) -> dict[str, WorkerView]:
    """With rows and utilisation as they would be over the shards' window, the same for all workers.

    Each worker's lease is of another moment, and one prompt more or less between two of them looks
    like heat. What a row costs a worker is its own figure. Replicas share a slot's rows as they did
    by their own account.
    """
    if not any(demanded.values()):
        return dict(workers)
    held: dict[Slot, list[float]] = {}
    for worker in workers.values():
        for slot in worker.slots:
            held.setdefault(slot, []).append(worker.rows.get(slot, 0.0))
    aligned = {}
    for name, worker in workers.items():
        rows = {}
        for slot in worker.slots:
            own, counts = worker.rows.get(slot, 0.0), held[slot]
            total = math.fsum(counts)
            share = own / total if total > 0 else 1 / len(counts)
            rows[slot] = demanded.get(slot, 0.0) * share
        before = math.fsum(worker.rows.values())
        scale = math.fsum(rows.values()) / before if before > 0 else 1.0
        busy = min(1.0, worker.utilization * scale)
        aligned[name] = replace(worker, rows=rows, utilization=busy)
    return aligned


def _with_activations(
    workers: Mapping[str, WorkerView], frames: Mapping[str, float]
) -> dict[str, WorkerView]:
    """With how often per second each slot's weights are read.

    A frame is of one layer, so a layer is computed about as often as the busiest holder of it gets
    frames for each of its layers. With m rows for a slot each time, drawn independently, the slot
    is wanted in a share 1 - exp(-m) of them. A call goes to one replica: they divide it as rows.
    """
    times: dict[int, float] = {}
    totals: dict[Slot, float] = {}
    for name, worker in workers.items():
        layers = {layer for layer, _ in worker.slots}
        for layer in layers:
            times[layer] = max(times.get(layer, 0.0), frames[name] / len(layers))
        for slot, rate in worker.rows.items():
            totals[slot] = totals.get(slot, 0.0) + rate
    reads = {
        slot: -times[slot[0]] * math.expm1(-total / times[slot[0]]) if times[slot[0]] > 0 else 0.0
        for slot, total in totals.items()
    }
    return {
        name: replace(
            worker,
            activations={
                slot: reads[slot] * rate / totals[slot] if rate > 0 else 0.0
                for slot, rate in worker.rows.items()
            },
        )
        for name, worker in workers.items()
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _forget(series: dict[str, _Series], alive: set[str]) -> None:
    for name in series.keys() - alive:
        del series[name]
