from __future__ import annotations

import random
import statistics

import pytest

from services.cli.load.client import RequestRecord
from services.cli.load.report import LatencyBound, percentile, summarise


def _record(
    started_at: float, first: float, gap: float, tokens: int, **extra: object
) -> RequestRecord:
    return RequestRecord(
        started_at=started_at,
        prompt_tokens=10,
        arrivals=[(started_at + first + i * gap, 1) for i in range(tokens)],
        token_ids=list(range(tokens)),
        **extra,  # type: ignore[arg-type]
    )


def test_percentiles_agree_with_the_standard_library() -> None:
    generator = random.Random(3)
    values = [generator.random() for _ in range(101)]
    expected = statistics.quantiles(values, n=100, method="inclusive")
    assert percentile(values, 95) == pytest.approx(expected[94])
    assert percentile([5.0], 99) == 5.0


def test_rates_and_latencies_come_from_the_records_times() -> None:
    report = summarise([_record(0.0, 0.1, 0.02, 11), _record(0.5, 0.2, 0.04, 6)], LatencyBound())
    assert report.duration_s == pytest.approx(0.9)
    assert report.output_tokens_per_s == pytest.approx(17 / 0.9)
    assert report.latencies_ms["ttft"]["max"] == pytest.approx(200)
    assert report.latencies_ms["tpot"]["p50"] == pytest.approx(30)
    assert report.latencies_ms["itl"]["max"] == pytest.approx(40)
    assert report.goodput_per_s == report.requests_per_s


def test_goodput_counts_only_requests_within_both_bounds_and_no_failure() -> None:
    failed = RequestRecord(started_at=0.0, prompt_tokens=1, error="HTTP 503: full")
    records = [_record(0.0, 0.1, 0.02, 5), _record(0.0, 0.3, 0.02, 5), failed]
    records.append(_record(0.0, 0.1, 0.09, 5))
    report = summarise(records, LatencyBound(ttft_s=0.2, tpot_s=0.05))
    assert report.good_share == 0.25
    assert report.num_failed == 1
    assert report.errors == {"HTTP 503: full": 1}


def test_several_tokens_of_one_event_count_in_tpot_but_are_one_gap() -> None:
    record = RequestRecord(
        started_at=0.0, prompt_tokens=1, arrivals=[(1.0, 1), (2.0, 4)], token_ids=[1, 2, 3, 4, 5]
    )
    report = summarise([record], LatencyBound())
    assert report.latencies_ms["tpot"]["mean"] == pytest.approx(250)
    assert report.latencies_ms["itl"]["mean"] == pytest.approx(1000)


def test_ttft_is_told_turn_by_turn() -> None:
    records = [_record(0.0, 0.4, 0.01, 3), _record(1.0, 0.1, 0.01, 3, turn=1)]
    assert summarise(records, LatencyBound()).ttft_by_turn_ms == pytest.approx([400, 100])


def test_a_run_in_which_all_failed_still_has_a_report() -> None:
    failed = RequestRecord(started_at=0.0, prompt_tokens=1, error="refused")
    report = summarise([failed], LatencyBound())
    assert (report.num_failed, report.goodput_per_s, report.latencies_ms["ttft"]) == (1, 0.0, {})
