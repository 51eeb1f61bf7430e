from __future__ import annotations

import random

from services.gateway.console.contract import SlowRequestView
from services.gateway.console.slow_requests import SlowRequests


def slow(duration_s: float) -> SlowRequestView:
    return {
        "request_id": f"r-{duration_s}",
        "trace_id": None,
        "model": "m",
        "started_at": 0.0,
        "duration_s": duration_s,
        "ttft_s": None,
        "num_prompt_tokens": 1,
        "num_generated_tokens": 1,
        "status": 200,
    }


def test_the_slowest_of_many_are_kept_whenever_they_came() -> None:
    requests = SlowRequests(limit=20, window_s=600.0)
    durations = [random.random() for _ in range(5000)]
    for index, duration in enumerate(durations):
        requests.add(slow(duration), 6000.0 + index * 0.1)
    kept = [request["duration_s"] for request in requests.slowest(6500.0)]
    assert kept == sorted(durations, reverse=True)[:20]


def test_a_slow_request_is_forgotten_after_the_window() -> None:
    requests = SlowRequests(limit=2, window_s=600.0)
    requests.add(slow(90.0), 1000.0)
    requests.add(slow(1.0), 1500.0)
    assert [each["duration_s"] for each in requests.slowest(1530.0)] == [90.0, 1.0]
    assert [each["duration_s"] for each in requests.slowest(1601.0)] == [1.0]
    assert requests.slowest(9000.0) == []
