"""Experts that are away hold up the sequences that need them, and no other."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import numpy as np
import pytest

from router_service.engine.engine import Engine
from router_service.experts import MissingExperts, StepContext
from router_service.model.batch import ForwardBatch
from router_service.scheduling.scheduler import Scheduler
from router_service.scheduling.sequence import Sequence
from router_service.scheduling.step_plan import SchedulerConfig
from services.core.errors import ExpertUnavailableError
from services.core.generation import GenerateRequest, SamplingParams
from tests.support.eventually import eventually
from tests.support.fake_decoder import (
    Completion,
    FakeDecoder,
    FakeExperts,
    collect,
    fake_engine,
    fake_request,
    greedy_tokens,
)


class AbsentExperts(FakeExperts):
    """While `is_away`, batches' rows with a token above 50 lack expert 1 of layer 0."""

    def __init__(self, expert_wait_s: float = 30.0) -> None:
        super().__init__()
        self.expert_wait_s = expert_wait_s
        self.is_away = threading.Event()
        self.num_hits = 0
        self.waits: list[float] = []
        self._callbacks: list[Callable[[], None]] = []

    def is_available(self, slots: Iterable[tuple[int, int]]) -> bool:
        assert list(slots) == [(0, 1)]
        return not self.is_away.is_set()

    def on_change(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def count_wait(self, seconds: float) -> None:
        self.waits.append(seconds)

    def before(self, batch: ForwardBatch, context: StepContext) -> None:
        rows = np.flatnonzero(batch.token_ids.numpy() > 50)
        if self.is_away.is_set() and len(rows) and context.incidents is not None:
            self.num_hits += 1
            context.incidents.leave_behind(MissingExperts(0, (1,), rows), batch.num_tokens)

    def come_back(self, engine: Engine) -> None:
        self.is_away.clear()
        for callback in self._callbacks:
            engine._thread.call_soon(callback)


@asynccontextmanager
async def running(experts: AbsentExperts, **options: int) -> AsyncIterator[Engine]:
    decoder = FakeDecoder(4, before=experts.before)
    engine = fake_engine(decoder=decoder, experts=experts, **options)
    engine.start()
    try:
        yield engine
        engine.check_alive()
    finally:
        await engine.stop(timeout_s=0)


async def complete(engine: Engine, request: GenerateRequest) -> Completion:
    (completion,) = await collect(engine.generate(request))
    return completion


def low_prompt(num_tokens: int) -> list[int]:
    """A prompt whose completion of so many tokens never has a token above 50."""
    for first in range(100_000):
        prompt = [first % 50, first // 50 % 50, first // 2500 % 50]
        if max(greedy_tokens(prompt, num_tokens)) <= 50:
            return prompt
    raise AssertionError


@pytest.mark.parametrize("num_micro_batches", [1, 2])
async def test_sequences_that_need_no_missing_expert_go_on_while_others_wait(
    num_micro_batches: int,
) -> None:
    experts = AbsentExperts()
    async with running(experts, num_micro_batches=num_micro_batches) as engine:
        experts.is_away.set()
        prompts = [[60 + i, 1, 2, 3, 4, 5, 6] for i in range(4)]
        waiting = [
            asyncio.create_task(complete(engine, fake_request(prompt, 12))) for prompt in prompts
        ]
        await eventually(lambda: experts.num_hits > 0)
        prompt = low_prompt(6)
        for _ in range(3):
            going_on = await complete(engine, fake_request(prompt, 6))
            assert going_on.token_ids == greedy_tokens(prompt, 6)
        hits = experts.num_hits
        assert not any(task.done() for task in waiting)
        assert engine.stats().num_running == 4
        # They are not tried again and again while nothing has changed.
        await complete(engine, fake_request(prompt, 6))
        assert experts.num_hits == hits
        experts.come_back(engine)
        done = await asyncio.gather(*waiting)
        assert [c.token_ids for c in done] == [greedy_tokens(prompt, 12) for prompt in prompts]
        assert len(experts.waits) == 4
    assert engine.stats().kv_blocks_used == 0


async def test_a_running_sequence_that_meets_a_missing_expert_repeats_and_loses_no_token() -> None:
    experts = AbsentExperts()
    async with running(experts) as engine:
        tokens: list[int] = []

        async for deltas in engine.generate(fake_request([7, 8, 9], 200)):
            for delta in deltas:
                tokens.extend(delta.token_ids)
            if len(tokens) in range(10, 100, 10) and not experts.is_away.is_set():
                hits = experts.num_hits
                experts.is_away.set()
                await eventually(lambda seen=hits: experts.num_hits > seen)  # type: ignore[misc]
                experts.come_back(engine)
    assert tokens == greedy_tokens([7, 8, 9], 200)
    assert experts.waits


async def test_who_waits_for_too_long_fails_alone_and_is_told_which_expert() -> None:
    experts = AbsentExperts(expert_wait_s=0.3)
    async with running(experts) as engine:
        experts.is_away.set()
        started = time.monotonic()
        with pytest.raises(ExpertUnavailableError, match=r"layer 0: .*experts 1 within") as raised:
            await complete(engine, fake_request([60, 1, 2], 4))
        assert 0.25 < time.monotonic() - started < 20.0
        assert raised.value.details == {"layer": 0, "expert": 1, "experts": [1]}
        prompt = low_prompt(4)
        assert (await complete(engine, fake_request(prompt, 4))).token_ids == greedy_tokens(
            prompt, 4
        )
    assert engine.stats().kv_blocks_used == 0


async def test_a_waiting_request_can_be_aborted() -> None:
    experts = AbsentExperts()
    async with running(experts) as engine:
        experts.is_away.set()
        task = asyncio.create_task(complete(engine, fake_request([60, 1, 2], 4)))
        await eventually(lambda: experts.num_hits > 0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await eventually(lambda: engine.stats().kv_blocks_used == 0)


def test_a_parked_sequence_is_passed_over_and_may_be_evicted() -> None:
    scheduler = Scheduler(SchedulerConfig(block_size=4, num_blocks=3, max_model_len=64))
    older, parked = (
        Sequence(
            order=order,
            index=0,
            prompt_token_ids=[1, 2, 3],
            sampling=SamplingParams(max_tokens=5),
            seed=0,
            root=b"",
        )
        for order in range(2)
    )
    scheduler.add(older)
    scheduler.add(parked)
    plan = scheduler.schedule()
    assert [entry.sequence for entry in plan.entries] == [older, parked]
    scheduler.commit(plan.entries[0])
    scheduler.park(parked)
    for token in range(5):
        older.append(token)
        parked_blocks = list(parked.block_table)
        plan = scheduler.schedule()
        assert [entry.sequence for entry in plan.entries] == [older]
        scheduler.commit(plan.entries[0])
    assert parked_blocks
    scheduler.unpark(parked)
    older.append(5)
    scheduler.finish(older)
    (entry,) = scheduler.schedule().entries
    assert entry.sequence is parked
    assert (entry.start, entry.num_tokens, entry.samples) == (0, 3, True)
    scheduler.park(parked)
    scheduler.finish(parked)
    assert scheduler.blocks.num_used == 0
