from __future__ import annotations

import random

import pytest

from services.gateway.beat_watch import MAX_BOUND_S, MIN_BOUND_S, TICK_S, BeatWatch

BEAT_S = 0.1
"""The longest silence of a shard that does not hang, on an idle machine."""


class Clock:
    """A watch that is ticked as its owner's loop would, and a shard that beats or does not."""

    def __init__(self) -> None:
        self.watch = BeatWatch()
        self.watch.connected()
        self.now = 100.0
        self.watch.tick(self.now)

    def beat(self, seconds: float, every_s: float = BEAT_S) -> bool:
        """Whether the shard was ever taken for silent."""
        was_silent, next_beat = False, self.now + every_s
        end = self.now + seconds
        while self.now < end:
            self._tick()
            was_silent |= self.watch.is_silent
            if self.now >= next_beat:
                self.watch.heard(is_beat=True)
                next_beat += every_s
        return was_silent

    def silence_s(self, limit_s: float = 60.0) -> float:
        """How long it is until silence counts."""
        begin = self.now
        while not self.watch.is_silent and self.now < begin + limit_s:
            self._tick()
        return self.now - begin

    def _tick(self) -> None:
        self.now += TICK_S
        self.watch.tick(self.now)


def test_a_shard_that_beats_is_never_silent_and_one_that_stops_is_found_in_half_a_second() -> None:
    clock = Clock()
    assert not clock.beat(60.0)
    assert clock.silence_s() == pytest.approx(MIN_BOUND_S, abs=3 * TICK_S)


def test_a_new_shard_gets_more_time_for_nothing_is_known_of_it() -> None:
    clock = Clock()
    assert not clock.beat(0.5)
    assert 2 * MIN_BOUND_S < clock.silence_s() < 1.0


def test_a_shard_that_never_beat_is_not_judged() -> None:
    clock = Clock()
    clock.watch.heard(is_beat=False)
    assert clock.silence_s(limit_s=30.0) > 29
    clock.watch.heard(is_beat=True)
    assert clock.silence_s() < MAX_BOUND_S + 2 * TICK_S
    clock.watch.connected()
    assert not clock.watch.is_silent
    assert clock.silence_s() > MIN_BOUND_S


def test_on_a_busy_machine_where_beats_come_late_silence_is_given_longer() -> None:
    clock = Clock()
    assert not clock.beat(20.0, every_s=0.35)
    assert clock.silence_s() > 0.9
    clock.watch.heard(is_beat=True)
    assert not clock.beat(120.0)
    assert clock.silence_s() < 0.6


def test_beats_that_come_ever_later_are_followed() -> None:
    clock = Clock()
    for late_s in (0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0):
        assert not clock.beat(4 * late_s, every_s=late_s)


def test_time_in_which_the_watcher_itself_was_held_up_does_not_count() -> None:
    clock = Clock()
    clock.beat(60.0)
    for _ in range(3):
        clock.now += 10.0
        clock.watch.tick(clock.now)
        assert not clock.watch.is_silent
    assert clock.silence_s() > 0


def test_a_shard_that_was_given_up_by_mistake_is_given_longer_the_next_time_but_not_for_ever() -> (
    None
):
    clock = Clock()
    clock.beat(60.0)
    bounds = []
    for _ in range(6):
        bounds.append(clock.silence_s())
        clock.watch.given_up()
        clock.watch.connected()
        clock.beat(1.0)
    assert bounds[1] > 2 * bounds[0]
    assert bounds == sorted(bounds)
    assert bounds[-1] <= MAX_BOUND_S + 2 * TICK_S
    clock.beat(120.0)
    assert clock.silence_s() < 0.6


def test_the_bound_stays_within_its_limits_whatever_comes() -> None:
    generator = random.Random()
    watch, now = BeatWatch(), 0.0
    for _ in range(5000):
        now += generator.choice((0.0, 0.01, 0.05, 1.0, 100.0, -1.0))
        watch.tick(now)
        generator.choice((lambda: watch.heard(is_beat=True), watch.given_up, watch.connected))()
        assert MIN_BOUND_S <= watch.bound_s <= MAX_BOUND_S
        assert not watch.is_silent or watch.silent_s > MIN_BOUND_S
