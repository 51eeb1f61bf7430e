from __future__ import annotations

import random

from services.core.generation import GenerateRequest, GenerationDelta, ResumedChoice, SamplingParams
from services.gateway.console.activity import Activity, Served
from services.gateway.console.latencies import LatencyWindow
from services.gateway.console.shard_timer import ShardTimer


def test_percentiles_are_by_rank_in_milliseconds() -> None:
    window = LatencyWindow(30.0)
    assert window.percentiles(0.0) is None
    values = [number / 1000 for number in range(1, 101)]
    random.shuffle(values)
    for value in values:
        window.add(value, 1.0)
    assert window.percentiles(1.0) == {"p50": 50.0, "p95": 95.0}


def test_what_is_older_than_the_window_does_not_count() -> None:
    window = LatencyWindow(30.0)
    window.add(9.0, 100.0)
    window.add(0.5, 120.0)
    assert window.percentiles(125.0) == {"p50": 500.0, "p95": 9000.0}
    assert window.percentiles(135.0) == {"p50": 500.0, "p95": 500.0}
    assert window.percentiles(151.0) is None


def request(n: int = 1, resumed: bool = False) -> GenerateRequest:
    return GenerateRequest(
        request_id="r",
        prompt_token_ids=(1,),
        sampling=SamplingParams(max_tokens=9),
        n=n,
        resumed=(ResumedChoice(token_ids=(4,)),) * n if resumed else (),
    )


def test_a_shard_is_timed_from_sending_to_the_first_token_and_on() -> None:
    timer = ShardTimer(request())
    assert (timer.ttft_s, timer.tpot_s) == (None, None)
    timer.take([GenerationDelta(index=0, token_ids=(1, 2))])
    assert timer.ttft_s is not None and timer.ttft_s >= 0
    assert timer.tpot_s is None, "the first tokens came together"
    timer.take([GenerationDelta(index=0, token_ids=(3,))])
    timer.take([GenerationDelta(index=0, token_ids=(4, 5))])
    assert timer.tpot_s is not None
    assert timer.tpot_s == (timer._last_at - timer._first_at) / 3


def test_choices_side_by_side_are_timed_as_one() -> None:
    timer = ShardTimer(request(n=2))
    for _ in range(3):
        timer.take([GenerationDelta(index=index, token_ids=(1,)) for index in range(2)])
    assert timer.tpot_s == (timer._last_at - timer._first_at) / 2


def test_the_first_token_of_a_resumed_request_is_no_first_token() -> None:
    timer = ShardTimer(request(resumed=True))
    timer.take([GenerationDelta(index=0, token_ids=(1,))])
    assert timer.ttft_s is None


def test_shards_have_latencies_of_their_own_and_a_request_without_tokens_has_none() -> None:
    now = 50.0
    activity = Activity(clock=lambda: now)
    activity.shard_served("shard-0", 0.1, None)
    activity.shard_served("shard-1", None, None)
    known = activity.of_shard("shard-0", num_shards=2)
    assert known is not None
    assert known.ttft.percentiles(now) == {"p50": 100.0, "p95": 100.0}
    assert known.tpot.percentiles(now) is None
    assert activity.of_shard("shard-1", num_shards=1) is None
    served = Served(
        model="m", num_prompt_tokens=3, num_generated_tokens=0, ttft_s=None, tpot_s=None
    )
    activity.request_ended(served, request_id="r", trace_id=None, status=499, took_s=2.5)
    assert activity.latencies.ttft.percentiles(now) is None
    (slow,) = activity.slow_requests.slowest(now)
    assert (slow["status"], slow["ttft_s"], slow["started_at"]) == (499, None, 47.5)


def test_the_only_shard_served_all_where_nobody_tells_shards_apart() -> None:
    activity = Activity(clock=lambda: 50.0)
    assert activity.of_shard("shard-0", num_shards=1) is activity.latencies
    assert activity.of_shard("shard-0", num_shards=2) is None
