"""Figures of a load test: rates, percentiles, and goodput under latency bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from services.cli.load.client import RequestRecord

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyBound:
    """What a request must keep to count as good; None bounds nothing. Seconds."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def is_met(self, record: RequestRecord) -> bool:
        """A failed request is never good."""
        if record.error is not None or not record.arrivals:
            return False
        if self.ttft_s is not None and record.ttft_s > self.ttft_s:
            return False
        tpot_s = record.tpot_s
        return self.tpot_s is None or tpot_s is None or tpot_s <= self.tpot_s


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """`latencies_ms` maps ttft, tpot, itl and e2e to {percentile: milliseconds}.

    TTFT counts from when a request was due, ITL are the gaps between events that brought tokens,
    and goodput is the good requests per second of the whole run. `ttft_by_turn_ms` has medians.
    """

    num_requests: int
    num_failed: int
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    goodput_per_s: float
    good_share: float
    latencies_ms: dict[str, dict[str, float]]
    ttft_by_turn_ms: list[float]
    errors: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(records: Sequence[RequestRecord], bound: LatencyBound) -> LoadReport:
    """Of the records of one run, failures included; `records` is not empty."""
    good = [record for record in records if record.error is None and record.arrivals]
    started_at = min(record.started_at for record in records)
    duration_s = max(max(record.finished_at for record in records) - started_at, 1e-9)
    num_good = sum(map(bound.is_met, records))
    output_tokens = sum(record.num_tokens for record in records)
    gaps = [
        later - earlier for record in good for (earlier, _), (later, _) in pairwise(record.arrivals)
    ]
    latencies = {
        "ttft": [record.ttft_s for record in good],
        "tpot": [tpot_s for record in good if (tpot_s := record.tpot_s) is not None],
        "itl": gaps,
        "e2e": [record.finished_at - record.started_at for record in good],
    }
    return LoadReport(
        num_requests=len(records),
        num_failed=len(records) - len(good),
        duration_s=duration_s,
        prompt_tokens=sum(record.prompt_tokens for record in records),
        output_tokens=output_tokens,
        requests_per_s=len(good) / duration_s,
        output_tokens_per_s=output_tokens / duration_s,
        goodput_per_s=num_good / duration_s,
        good_share=num_good / len(records),
        latencies_ms={name: _percentiles(values) for name, values in latencies.items()},
        ttft_by_turn_ms=_by_turn(good),
        errors=_count_errors(records),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks (type 7 of Hyndman and Fan 1996)."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    figures = {f"p{percent}": percentile(seconds, percent) * 1e3 for percent in PERCENTILES}
    return {"mean": sum(seconds) / len(seconds) * 1e3, **figures, "max": max(seconds) * 1e3}


def _by_turn(records: Sequence[RequestRecord]) -> list[float]:
    num_turns = max((record.turn + 1 for record in records), default=0)
    by_turn = [[r.ttft_s for r in records if r.turn == turn] for turn in range(num_turns)]
    return [percentile(values, 50) * 1e3 for values in by_turn if values]


def _count_errors(records: Sequence[RequestRecord]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in records:
        if record.error is not None:
            counts[record.error] = counts.get(record.error, 0) + 1
    return counts
