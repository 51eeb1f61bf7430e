"""What goes on while the engine waits for its experts."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

import pytest
import torch

from router_service.experts import ExpertBackend, StepContext
from router_service.model.batch import ForwardBatch
from router_service.scheduling.step_plan import ScheduledStep
from tests.support.eventually import eventually
from tests.support.fake_decoder import (
    FakeDecoder,
    FakeExperts,
    FakeKVCache,
    collect,
    fake_engine,
    fake_request,
    greedy_tokens,
)

NUM_LAYERS = 3


class _LayeredDecoder(FakeDecoder):
    """Asks the experts in every layer before it says what the fake model says."""

    async def forward(
        self,
        batch: ForwardBatch,
        kv_cache: FakeKVCache,
        experts: ExpertBackend,
        context: StepContext,
    ) -> torch.Tensor:
        rows = torch.zeros(batch.num_tokens, 4)
        for layer in range(NUM_LAYERS):
            await experts.forward(layer, rows, rows.long(), rows, context)
        return await super().forward(batch, kv_cache, experts, context)


class _RemoteExperts(FakeExperts):
    """Answers once `num_in_flight` calls of a step's layer are in flight at the same time."""

    def __init__(self, num_in_flight: int) -> None:
        super().__init__()
        self.num_in_flight = num_in_flight
        self.answered: Counter[tuple[int, int]] = Counter()
        self._sent: Counter[tuple[int, int]] = Counter()
        self._complete: dict[tuple[int, int], asyncio.Event] = {}

    async def forward(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        context: StepContext,
    ) -> torch.Tensor:
        call = context.step, layer
        complete = self._complete.setdefault(call, asyncio.Event())
        self._sent[call] += 1
        if self._sent[call] == self.num_in_flight:
            complete.set()
        async with asyncio.timeout(60):
            await complete.wait()
        await asyncio.sleep(0)
        self.answered[call] += 1
        return hidden_states


class _StallingExperts(FakeExperts):
    """From the second step on, answers only once `go_on` is set for that step."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Semaphore(0)

    async def forward(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        context: StepContext,
    ) -> torch.Tensor:
        await asyncio.sleep(0)
        if context.step > 0 and layer == 0:
            assert await asyncio.to_thread(self.go_on.acquire, timeout=60)
        return hidden_states


async def test_every_layer_s_frames_of_all_micro_batches_are_on_the_way_at_once() -> None:
    """With fewer in flight the experts would never answer."""
    experts = _RemoteExperts(num_in_flight=3)
    engine = fake_engine(decoder=_LayeredDecoder(4), experts=experts, num_micro_batches=3)
    engine._thread.start()
    prompt = [1, 2, 3]
    waiting = [
        asyncio.ensure_future(collect(engine.generate(fake_request(prompt, 8)))) for _ in range(6)
    ]
    # The same sequences in every step, so that each has three micro-batches.
    await eventually(lambda: engine.stats().num_waiting == 6)
    engine.start()
    try:
        completions = await asyncio.gather(*waiting)
    finally:
        await engine.stop(1)
    assert all(item[0].token_ids == greedy_tokens(prompt, 8) for item in completions)
    assert set(experts.answered.values()) == {3}
    assert len(experts.answered) == 8 * NUM_LAYERS


async def test_a_step_s_tokens_reach_their_callers_while_the_next_waits_for_experts() -> None:
    """The next step's experts answer only after the caller has got the token before."""
    experts = _StallingExperts()
    engine = fake_engine(decoder=_LayeredDecoder(4), experts=experts)
    engine.start()
    tokens: list[int] = []
    try:
        async with asyncio.timeout(60):
            async for deltas in engine.generate(fake_request([1, 2, 3], 6)):
                tokens += [token for delta in deltas for token in delta.token_ids]
                experts.go_on.release()
    finally:
        await engine.stop(1)
    assert tokens == greedy_tokens([1, 2, 3], 6)


async def test_an_abort_between_plan_and_micro_batches_harms_nobodys_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Micro-batches are tasks, which begin after callbacks that were queued before them."""
    engine = fake_engine(decoder=FakeDecoder(4, num_yields=1), num_micro_batches=2)
    plan, tracker = engine._scheduler.schedule, engine._tracker
    num_aborted = 0

    def schedule() -> ScheduledStep:
        nonlocal num_aborted
        step = plan()
        for entry in step.entries:
            if entry.sequence.prompt_token_ids[0] == 7 and not entry.is_prefill:
                stream = tracker._by_order[entry.sequence.order].stream
                asyncio.get_running_loop().call_soon(tracker.abort, stream)
                num_aborted += 1
                break
        return step

    monkeypatch.setattr(engine._scheduler, "schedule", schedule)
    engine.start()
    prompts = [list(range(10 + 5 * index, 15 + 5 * index)) for index in range(3)]
    staying = [asyncio.create_task(collect(engine.generate(fake_request(p, 40)))) for p in prompts]
    leaving = [
        asyncio.create_task(collect(engine.generate(fake_request([7, index], 40))))
        for index in range(5)
    ]
    for prompt, task in zip(prompts, staying, strict=True):
        (completion,) = await task
        assert completion.token_ids == greedy_tokens(prompt, 40)
    assert num_aborted == 5
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    await engine.stop(1)
