from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_service.scheduling.admission import (
    MAX_RETRY_AFTER_S,
    MIN_MOVING_STEPS,
    QueueRate,
    QueueState,
    check_admission,
    predicted_wait_s,
)
from router_service.scheduling.step_plan import SchedulerConfig
from services.core.errors import OverloadedError


def _limits(*, tokens: int = 10_000, seqs: int = 1000, max_ttft_s: float = 60.0) -> SchedulerConfig:
    return SchedulerConfig(
        block_size=16,
        num_blocks=64,
        max_model_len=1024,
        max_waiting_tokens=tokens,
        max_waiting_seqs=seqs,
        max_ttft_s=max_ttft_s,
    )


def _queue(waiting: int, *, seqs: int = 1, ahead: int | None = None) -> QueueState:
    tokens_ahead = waiting if ahead is None else ahead
    return QueueState(waiting_tokens=waiting, waiting_seqs=seqs, tokens_ahead=tokens_ahead)


def _refusal(
    queue: QueueState, num_tokens: int, rate: float | None, limits: SchedulerConfig
) -> OverloadedError | None:
    try:
        check_admission(queue, num_tokens, rate, limits)
    except OverloadedError as error:
        return error
    return None


def _fed(
    *steps: tuple[float, int], has_backlog: bool = True, memory_s: float = 30.0
) -> tuple[QueueRate, float]:
    """A rate that saw steps of (seconds, tokens), one after the other, and the time after them."""
    rate, now = QueueRate(memory_s), 0.0
    for seconds, tokens in steps:
        rate.observe(
            started_at=now, ended_at=now + seconds, num_tokens=tokens, has_backlog=has_backlog
        )
        now += seconds
    return rate, now


def test_the_rate_is_tokens_per_second_of_steps_that_leave_something_waiting() -> None:
    rate, _ = _fed(*[(0.5, 200)] * 10)
    assert rate.tokens_per_s == pytest.approx(400, rel=0.02)


def test_a_long_step_counts_for_its_length() -> None:
    rate, _ = _fed(*[(0.1, 100), (0.9, 100)] * 5)
    assert rate.tokens_per_s == pytest.approx(200, rel=0.03)


def test_steps_that_leave_nothing_waiting_show_no_rate() -> None:
    rate, _ = _fed(*[(0.03, 10)] * 100, has_backlog=False)
    assert rate.tokens_per_s is None


def test_nothing_is_predicted_from_too_few_steps() -> None:
    rate, now = _fed(*[(0.1, 100)] * (MIN_MOVING_STEPS - 1))
    assert rate.tokens_per_s is None
    rate.observe(started_at=now, ended_at=now + 0.1, num_tokens=100, has_backlog=True)
    assert rate.tokens_per_s == pytest.approx(1000, rel=0.05)


def test_time_between_steps_counts_only_while_something_waits() -> None:
    busy, now = _fed(*[(0.1, 100)] * 5)
    busy.observe(started_at=now + 0.4, ended_at=now + 0.5, num_tokens=100, has_backlog=True)
    assert busy.tokens_per_s == pytest.approx(600, rel=0.05)
    idle, now = _fed(*[(0.1, 100)] * 5)
    idle.observe(started_at=now, ended_at=now + 0.1, num_tokens=5, has_backlog=False)
    for index in range(2):
        at = now + 1000 + index / 10
        idle.observe(started_at=at, ended_at=at + 0.1, num_tokens=100, has_backlog=True)
    assert idle.tokens_per_s == pytest.approx(1000, rel=0.05)


def test_the_rate_falls_while_nothing_moves_and_follows_when_it_moves_again() -> None:
    stuck, now = _fed(*[(0.1, 100)] * 50, *[(0.1, 0)] * 300)
    fallen = stuck.tokens_per_s
    assert fallen is not None and 0 < fallen < 250
    for index in range(900):
        at = now + index / 10
        stuck.observe(started_at=at, ended_at=at + 0.1, num_tokens=100, has_backlog=True)
    assert stuck.tokens_per_s == pytest.approx(1000, rel=0.1)


def test_past_the_predicted_wait_a_request_is_told_when_to_come_back() -> None:
    limits = _limits(max_ttft_s=10)
    assert _refusal(_queue(1000), 1, 100.0, limits) is None
    error = _refusal(_queue(1500), 1, 100.0, limits)
    assert error is not None and error.details["retry_after_s"] == pytest.approx(5.0)
    assert "15 s (1500 prompt tokens" in error.message and "10 s" in error.message
    # What it was told is true: when that time has passed, it is taken.
    left = 1500 - int(error.details["retry_after_s"] * 100.0)
    assert _refusal(_queue(left), 1, 100.0, limits) is None


def test_only_what_is_ahead_of_a_request_makes_it_wait() -> None:
    limits = _limits(max_ttft_s=10)
    assert _refusal(_queue(5000, ahead=900), 1, 100.0, limits) is None


def test_a_long_prompt_is_not_refused_for_its_own_length() -> None:
    assert _refusal(_queue(10), 9000, 1.0, _limits(max_ttft_s=10)) is None


def test_without_a_bound_or_a_measured_rate_only_amounts_count() -> None:
    assert _refusal(_queue(9000), 1, 0.001, _limits(max_ttft_s=0)) is None
    assert _refusal(_queue(9000), 1, None, _limits()) is None


def test_past_a_number_of_completions_requests_are_refused() -> None:
    limits = _limits(seqs=8)
    assert _refusal(_queue(80, seqs=7), 1, None, limits) is None
    error = _refusal(_queue(80, seqs=8), 1, 2.0, limits)
    assert error is not None and error.details["retry_after_s"] == pytest.approx(5.0)


def test_an_endless_wait_has_a_bounded_retry_after() -> None:
    assert predicted_wait_s(10, 0.0) == math.inf
    error = _refusal(_queue(10), 1, 0.0, _limits())
    assert error is not None and error.details["retry_after_s"] == MAX_RETRY_AFTER_S


AMOUNTS = st.integers(0, 300)


@settings(max_examples=150, deadline=None)
@given(
    waiting=AMOUNTS,
    ahead=AMOUNTS,
    seqs=st.integers(0, 6),
    own=AMOUNTS,
    more=st.tuples(AMOUNTS, AMOUNTS, st.integers(0, 3), AMOUNTS),
    rate=st.one_of(st.none(), st.floats(0, 100)),
    max_ttft_s=st.sampled_from([0.0, 1.0, 5.0]),
)
def test_what_is_refused_stays_refused_with_more_of_anything(
    waiting: int,
    ahead: int,
    seqs: int,
    own: int,
    more: tuple[int, int, int, int],
    rate: float | None,
    max_ttft_s: float,
) -> None:
    limits = _limits(tokens=200, seqs=5, max_ttft_s=max_ttft_s)
    seqs = min(seqs, waiting)  # who waits has a token at least
    error = _refusal(_queue(waiting, seqs=seqs, ahead=ahead), own, rate, limits)
    if error is None:
        return
    assert waiting or ahead, "an empty queue takes anything"
    assert 1 <= error.details["retry_after_s"] <= MAX_RETRY_AFTER_S
    worse = _queue(waiting + more[0], seqs=seqs + more[2], ahead=ahead + more[1])
    assert _refusal(worse, own + more[3], rate, limits) is not None
    if rate is not None:
        assert _refusal(worse, own + more[3], rate / 2, limits) is not None
