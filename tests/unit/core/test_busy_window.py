from __future__ import annotations

import random

import pytest

from services.core.busy_window import BusyWindow


def test_a_worker_that_computes_half_of_the_time_is_half_busy() -> None:
    busy = BusyWindow(15.0, started_at=100.0)
    for beat in range(400):
        busy.add(0.1, ended_at=100.1 + 0.2 * beat)
    assert busy.ratio(180.0) == pytest.approx(0.5, abs=0.01)


def test_asking_changes_nothing_however_often() -> None:
    busy = BusyWindow(15.0, started_at=0.0)
    busy.add(6.0, ended_at=20.0)
    assert [busy.ratio(20.0) for _ in range(5)] == [pytest.approx(0.4)] * 5
    assert busy.ratio(29.0) == pytest.approx(0.4)
    assert busy.ratio(32.0) == pytest.approx(0.2)


def test_what_is_past_the_window_is_forgotten() -> None:
    busy = BusyWindow(15.0, started_at=0.0)
    busy.add(15.0, ended_at=15.0)
    assert busy.ratio(15.0) == pytest.approx(1.0)
    assert busy.ratio(30.5) == 0.0
    assert busy.ratio(1e6) == 0.0


def test_one_computation_longer_than_the_window_fills_it() -> None:
    busy = BusyWindow(15.0, started_at=0.0)
    busy.add(40.0, ended_at=50.0)
    assert busy.ratio(50.0) == pytest.approx(1.0)
    assert busy.ratio(53.0) == pytest.approx(12 / 15)


def test_before_the_window_is_full_the_time_since_the_start_counts() -> None:
    busy = BusyWindow(15.0, started_at=1000.0)
    assert busy.ratio(1000.0) == 0.0
    busy.add(1.0, ended_at=1002.0)
    assert busy.ratio(1002.0) == pytest.approx(0.5)
    assert busy.ratio(1004.0) == pytest.approx(0.25)


def test_two_that_compute_at_once_are_no_more_than_wholly_busy() -> None:
    busy = BusyWindow(15.0, started_at=0.0)
    for end in range(1, 31):
        busy.add(1.0, ended_at=end)
        busy.add(1.0, ended_at=end)
    assert busy.ratio(30.0) == 1.0


def test_any_computations_give_their_true_share_to_within_a_slot() -> None:
    generator = random.Random(5)
    window_s, now = 15.0, 50.0
    spans: list[tuple[float, float]] = []
    busy = BusyWindow(window_s, started_at=now)
    for _ in range(2000):
        begin = now + generator.expovariate(5.0)
        now = begin + generator.expovariate(4.0)
        spans.append((begin, now))
        busy.add(now - begin, ended_at=now)
        low = max(50.0, now - window_s)
        true = sum(max(0.0, end - max(begin, low)) for begin, end in spans[-400:])
        assert busy.ratio(now) == pytest.approx(
            true / (now - low), abs=0.5 / min(15, now - 50) + 1e-9
        )
