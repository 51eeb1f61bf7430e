"""Rates of every process over a short and a long window, from the counters that leases carry.

Leases are written once a heartbeat and read at other moments, so rates are taken over the times
that the leases say they were written at. Two leases in a row make a short window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from services.core.registry import FleetSnapshot, ShardRecord, Slot, WorkerRecord

_COARSE_STEPS = 6


class ProcessRates:
    """Between two samples of one process, per second: `counters` by name, and its tokens by slot.

    Those by slot are many, so they are worked out when they are asked for, once.
    """

    def __init__(self, first: _Sample, last: _Sample) -> None:
        self._first, self._last = first, last
        self.span_s = last.at - first.at
        self.counters: Mapping[str, float] = {
            name: (count - first.counters[name]) / self.span_s
            for name, count in last.counters.items()
        }

    @cached_property
    def slots(self) -> Mapping[Slot, float]:
        """Tokens per second of the slots that had any."""
        before, span_s = self._first.slots, self.span_s
        return {
            slot: (count - before.get(slot, 0)) / span_s
            for slot, count in self._last.slots.items()
            if count > before.get(slot, 0)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessWindows:
    """None until two leases of the process were seen. A process that fell silent has rates of 0 in
    the short window."""

    now: ProcessRates | None
    window: ProcessRates | None


class FleetWindows:
    """Give it every snapshot with `add`. `now` is in seconds and only grows.

    `silent_s`: a process whose lease was not renewed for so long does nothing now.
    """

    def __init__(
        self, *, short_s: float = 0.9, long_s: float = 30.0, silent_s: float = 3.0
    ) -> None:
        self._short_s = short_s
        self._long_s = long_s
        self._silent_s = silent_s
        self._series: dict[str, _Series] = {}

    def add(self, snapshot: FleetSnapshot, now: float) -> None:
        samples = {
            **{worker.worker_id: _worker_sample(worker, now) for worker in snapshot.workers},
            **{shard.shard_id: _shard_sample(shard, now) for shard in snapshot.shards},
        }
        for name in self._series.keys() - samples.keys():
            del self._series[name]
        for name, sample in samples.items():
            series = self._series.setdefault(name, _Series())
            series.add(sample, short_s=self._short_s, long_s=self._long_s)

    def of(self, name: str, now: float) -> ProcessWindows:
        """The windows of the worker or shard with this id."""
        series = self._series.get(name)
        if series is None or series.now is None:
            return ProcessWindows(now=None, window=None)
        newest = series.recent[-1]
        if now - newest.read_at > self._silent_s:
            nothing_since = replace(newest, at=newest.at + now - newest.read_at)
            return ProcessWindows(now=ProcessRates(newest, nothing_since), window=series.window)
        return ProcessWindows(now=series.now, window=series.window)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """`at` is by the writer's clock, `read_at` by ours."""

    at: float
    read_at: float
    started_at: float
    slots: Mapping[Slot, int]
    counters: Mapping[str, float]


@dataclass(slots=True)
class _Series:
    """Samples of one process: the last ones as they came, older ones a few seconds apart.

    `now` and `window` are the rates up to the last one, None before the second.
    """

    recent: deque[_Sample] = field(default_factory=deque)
    coarse: deque[_Sample] = field(default_factory=deque)
    now: ProcessRates | None = None
    window: ProcessRates | None = None

    def add(self, sample: _Sample, *, short_s: float, long_s: float) -> None:
        if self.recent and _is_reset(self.recent[-1], sample):
            self.recent.clear()
            self.coarse.clear()
            self.now = self.window = None
        if self.recent and self.recent[-1].at == sample.at:
            return
        self.recent.append(sample)
        while len(self.recent) > 2 and self.recent[1].at <= sample.at - short_s:
            self.recent.popleft()
        if not self.coarse or sample.at - self.coarse[-1].at >= long_s / _COARSE_STEPS:
            self.coarse.append(sample)
        while len(self.coarse) > 1 and self.coarse[1].at <= sample.at - long_s:
            self.coarse.popleft()
        if len(self.recent) > 1:
            self.now = ProcessRates(self.recent[0], sample)
            self.window = ProcessRates(self.coarse[0], sample)


def _is_reset(last: _Sample, sample: _Sample) -> bool:
    went_back = any(sample.counters[name] < count for name, count in last.counters.items())
    return sample.started_at != last.started_at or sample.at < last.at or went_back


def _worker_sample(worker: WorkerRecord, now: float) -> _Sample:
    return _Sample(
        at=worker.written_at or now,
        read_at=now,
        started_at=worker.started_at,
        slots=worker.tokens,
        counters={"tokens": float(sum(worker.tokens.values())), "busy_s": worker.busy_s},
    )


def _shard_sample(shard: ShardRecord, now: float) -> _Sample:
    return _Sample(
        at=shard.written_at or now,
        read_at=now,
        started_at=shard.started_at,
        slots=shard.expert_load,
        counters={"generated": float(shard.num_generated_tokens), "full_s": shard.full_s},
    )


def summed(rates: Iterable[ProcessRates | None]) -> tuple[dict[Slot, float], float] | None:
    """Tokens per second of each slot over several processes, and the longest span among them; None
    where none has a rate."""
    known = [each for each in rates if each is not None]
    if not known:
        return None
    total = dict(known[0].slots)
    for each in known[1:]:
        for slot, rate in each.slots.items():
            total[slot] = total.get(slot, 0.0) + rate
    return total, max(each.span_s for each in known)
