from __future__ import annotations

from services.sessions.circuit_breaker import CircuitBreaker


def test_failures_that_are_not_in_a_row_leave_it_closed() -> None:
    breaker = CircuitBreaker(threshold=2, open_s=2.0)
    for moment in range(5):
        breaker.failed(float(moment))
        assert breaker.allow(float(moment))
        breaker.succeeded()


def test_it_opens_after_enough_failures_and_lets_one_trial_through_later() -> None:
    breaker = CircuitBreaker(threshold=2, open_s=2.0)
    breaker.failed(10.0)
    breaker.failed(10.0)
    assert not breaker.allow(10.0)
    assert not breaker.allow(11.9)
    assert breaker.allow(12.0)
    assert not breaker.allow(12.1)
    breaker.succeeded()
    assert breaker.allow(12.2)
    assert not breaker.is_open


def test_a_failed_trial_opens_it_again() -> None:
    breaker = CircuitBreaker(threshold=2, open_s=2.0)
    breaker.failed(10.0)
    breaker.failed(10.0)
    assert breaker.allow(12.0)
    breaker.failed(12.5)
    assert not breaker.allow(14.4)
    assert breaker.allow(14.5)


def test_a_trial_that_never_reports_back_is_followed_by_another() -> None:
    breaker = CircuitBreaker(threshold=1, open_s=2.0)
    breaker.failed(0.0)
    assert breaker.allow(2.0)
    assert not breaker.allow(3.9)
    assert breaker.allow(4.0)
