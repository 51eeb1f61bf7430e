from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
import torch

from router_service.dispatch.dispatch_timings import DispatchTimings
from router_service.engine.step_timings import StepTimings, TimedExperts
from router_service.experts import StepContext
from tests.support.fake_decoder import FakeExperts, collect, fake_engine, fake_request

ROWS = torch.zeros(1, 4)


class _SlowExperts(FakeExperts):
    async def forward(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        context: StepContext,
    ) -> torch.Tensor:
        await asyncio.sleep(0.05)
        return hidden_states


def _compute(seconds: float) -> None:
    """Keep the thread, as a kernel does."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


async def test_the_shard_s_own_time_is_what_lies_between_calls_of_the_experts() -> None:
    timings = StepTimings()
    calls: list[None] = []
    start = time.perf_counter()

    async def micro_batch() -> None:
        experts = TimedExperts(_SlowExperts(), timings, lambda: calls.append(None))
        for layer in range(2):
            _compute(0.01)
            await experts.forward(layer, ROWS, ROWS, ROWS, StepContext())
        _compute(0.005)
        experts.finish_forward()

    await asyncio.gather(micro_batch(), micro_batch())
    timings.step_s = time.perf_counter() - start
    assert len(calls) == 4
    assert 0.04 <= timings.attention_s < timings.step_s
    assert timings.head_s >= 0.01
    assert timings.experts_s == pytest.approx(timings.step_s - timings.attention_s - timings.head_s)


def test_parts_add_up_to_the_step_and_differences_are_what_was_added() -> None:
    first = StepTimings(
        num_steps=1, num_tokens=32, step_s=1.0, schedule_s=0.1, attention_s=0.3, emit_s=0.2
    )
    total = StepTimings()
    total.add(first)
    before = replace(total)
    total.add(replace(first, attention_s=0.25))
    added = total.since(before)
    assert added.attention_s == pytest.approx(0.25)
    assert replace(added, attention_s=0.3) == first
    assert sum(total.parts().values()) == pytest.approx(total.step_s)
    assert total.experts_s == pytest.approx(0.85)


class _CountingExperts(FakeExperts):
    def take_timings(self) -> DispatchTimings:
        return DispatchTimings(num_calls=4, pack_ns=1, wire_ns=2, expert_ns=1_000_000)


async def test_what_the_experts_say_of_their_calls_is_added_step_by_step() -> None:
    engine = fake_engine(experts=_CountingExperts())
    engine.start()
    await collect(engine.generate(fake_request([1], 3)))
    await engine.stop(1)
    calls = engine.take_timings().calls()
    assert calls["expert"] == pytest.approx(3e-3)
    assert calls["wire"] == pytest.approx(6e-9)
    assert calls["queue"] == calls["combine"] == 0


async def test_an_engine_says_where_its_time_went_since_it_was_asked_last() -> None:
    engine = fake_engine(num_micro_batches=2)
    engine.start()
    try:
        await asyncio.gather(*(collect(engine.generate(fake_request([i], 5))) for i in range(4)))
        taken = engine.take_timings()
        assert taken.num_steps == engine.stats().num_steps >= 5
        assert taken.num_micro_batches > taken.num_steps
        assert taken.num_tokens == 4 * 5
        assert sum(taken.parts().values()) == pytest.approx(taken.step_s)
        assert min(taken.parts().values()) >= 0
        assert engine.take_timings().num_steps == 0
        assert engine.stats().timings.num_tokens == taken.num_tokens
        assert engine.stats().num_micro_batches in (1, 2)
    finally:
        await engine.stop(1)
