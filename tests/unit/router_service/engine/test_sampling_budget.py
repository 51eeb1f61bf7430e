from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from opentelemetry.sdk.trace import TracerProvider

from router_service.engine.sampling_budget import MAX_SAVED_S, SHARE, SamplingBudget
from router_service.engine.step_telemetry import RequestTrace, StepSampler
from router_service.scheduling.step_plan import ScheduledSequence
from tests.support.fake_decoder import fake_request

SAMPLED_S = 0.05


def test_what_is_sampled_takes_its_share_of_the_time_and_no_more() -> None:
    now, num_sampled = 100.0, 0
    budget = SamplingBudget(now)
    for _ in range(20_000):
        budget.earn(now)
        if not budget.is_spent:
            num_sampled += 1
            budget.spend(SAMPLED_S)
        now += 0.025
    allowed_s = MAX_SAVED_S + SHARE * (now - 100.0)
    assert num_sampled * SAMPLED_S == pytest.approx(allowed_s, abs=2 * SAMPLED_S)


def test_idle_time_is_saved_up_to_a_limit_and_a_clock_that_goes_back_takes_nothing() -> None:
    budget = SamplingBudget(100.0)
    for _ in range(100):
        budget.spend(SAMPLED_S)
    assert budget.is_spent
    budget.earn(50.0)
    budget.earn(1e6)
    assert not budget.is_scarce
    for _ in range(int(MAX_SAVED_S / SAMPLED_S)):
        assert not budget.is_spent
        budget.spend(SAMPLED_S)
    budget.spend(1e-6)
    assert budget.is_spent


class _Load:
    """Requests that come one after the other, each of one prefill and three decodes."""

    def __init__(self, sampler: StepSampler, step_s: float) -> None:
        self.now = 0.0
        self.kinds: list[bool] = []
        self._sampler = sampler
        self._step_s = step_s
        self._step = 0

    def request(self) -> None:
        tracer = TracerProvider().get_tracer("test")
        trace = RequestTrace(tracer, fake_request([1], 4))
        for is_prefill in (True, False, False, False):
            entry = SimpleNamespace(sequence=None, is_prefill=is_prefill, num_tokens=1)
            entries = cast("Sequence[ScheduledSequence]", [entry])
            span = self._sampler.begin(self._step, entries, lambda _: trace)
            self.now += self._step_s
            self._step += 1
            if span is not None:
                self.now += SAMPLED_S - self._step_s
                self._sampler.end(span)
                self.kinds.append(is_prefill)


def _load(step_s: float) -> _Load:
    clock: Any = SimpleNamespace(load=None)
    sampler = StepSampler(
        TracerProvider().get_tracer("test"),
        interval=64,
        clock=lambda: clock.load.now if clock.load else 0.0,
    )
    clock.load = _Load(sampler, step_s)
    return cast("_Load", clock.load)


def test_under_a_lasting_load_prefills_and_decodes_are_sampled_in_turn() -> None:
    load = _load(0.025)
    while load.now < 600.0:
        load.request()
    assert len(load.kinds) * SAMPLED_S <= MAX_SAVED_S + SHARE * load.now + SAMPLED_S
    late = load.kinds[20:]
    assert len(late) > 100
    assert late == [late[0] if number % 2 == 0 else not late[0] for number in range(len(late))]


def test_of_requests_that_come_now_and_then_each_has_both() -> None:
    load = _load(0.025)
    for _ in range(50):
        load.request()
        load.now += 10.0
    assert load.kinds == [True, False] * 50
