from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Literal

import pytest
import torch

from router_service.engine.engine import Engine
from router_service.experts import StepContext
from router_service.model.batch import ForwardBatch
from services.core.errors import (
    ContextLengthError,
    ExpertfleetError,
    ExpertUnavailableError,
    InvalidRequestError,
    NonFiniteError,
    OverloadedError,
    ShardLostError,
    UnavailableError,
)
from services.core.generation import GenerateRequest, TokenLogprob
from tests.support.at_once import all_at_once
from tests.support.eventually import eventually
from tests.support.fake_decoder import (
    EOS,
    Completion,
    FakeDecoder,
    FakeExperts,
    collect,
    fake_engine,
    fake_request,
    greedy_tokens,
    next_token,
)

Hook = Callable[[ForwardBatch, StepContext], Awaitable[None] | None]


@asynccontextmanager
async def _running(engine: Engine) -> AsyncIterator[Engine]:
    engine.start()
    try:
        yield engine
        engine.check_alive()
    finally:
        await engine.stop(timeout_s=0)


async def _complete(engine: Engine, request: GenerateRequest) -> Completion:
    (completion,) = await collect(engine.generate(request))
    return completion


def _poisoned(token: int, error: Exception) -> Hook:
    """Raise when a batch holds the token."""

    def before(batch: ForwardBatch, context: StepContext) -> None:
        if token in batch.token_ids:
            raise error

    return before


class _Gate:
    """Stops the decoder, for batches with the token, until it is opened from another thread."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.reached = threading.Event()
        self._opened = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._opened.set)

    async def __call__(self, batch: ForwardBatch, context: StepContext) -> None:
        if self.token in batch.token_ids:
            self._loop = asyncio.get_running_loop()
            self.reached.set()
            await self._opened.wait()


async def test_tokens_come_one_after_another_and_end_at_max_tokens() -> None:
    async with _running(fake_engine()) as engine:
        completion = await _complete(engine, fake_request([1, 2, 3], 6))
    assert completion.token_ids == greedy_tokens([1, 2, 3], 6)
    assert completion.finish_reason == "length"


@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, "auto"])
@pytest.mark.parametrize("seed", range(4))
async def test_tokens_are_the_same_whatever_the_chunks_the_evictions_and_the_reuse(
    num_micro_batches: int | Literal["auto"], seed: int
) -> None:
    rng = random.Random(seed)
    stems = [[rng.randrange(100) for _ in range(rng.randrange(30))] for _ in range(3)]
    prompts = [
        rng.choice(stems) + [rng.randrange(100) for _ in range(rng.randrange(1, 12))]
        for _ in range(24)
    ]
    engine = fake_engine(
        num_blocks=rng.randrange(16, 24),
        max_num_batched_tokens=rng.choice([3, 16, 50]),
        max_num_seqs=rng.choice([3, 16]),
        num_micro_batches=num_micro_batches,
        decoder=FakeDecoder(4, num_yields=2),
    )
    async with _running(engine):
        lengths = [rng.randrange(1, 20) for _ in prompts]
        completions = await all_at_once(
            engine,
            [
                _complete(engine, fake_request(prompt, length))
                for prompt, length in zip(prompts, lengths, strict=True)
            ],
        )
        stats = engine.stats()
    for prompt, length, completion in zip(prompts, lengths, completions, strict=True):
        assert completion.token_ids == greedy_tokens(prompt, length)
    assert stats.num_generated_tokens == sum(lengths)
    assert stats.num_cached_tokens > 0
    assert stats.kv_blocks_used == 0
    assert (stats.num_running, stats.num_waiting, stats.waiting_tokens) == (0, 0, 0)


async def test_running_out_of_blocks_evicts_and_changes_no_token() -> None:
    engine = fake_engine(num_blocks=10)
    prompts = [[order, order + 1, order + 2] for order in range(4)]
    async with _running(engine):
        completions = await all_at_once(
            engine, [_complete(engine, fake_request(prompt, 25)) for prompt in prompts]
        )
        assert engine.stats().num_preemptions > 0
    assert [item.token_ids for item in completions] == [greedy_tokens(p, 25) for p in prompts]


async def test_a_prompt_seen_before_reports_its_cached_tokens() -> None:
    async with _running(fake_engine()) as engine:
        prompt = list(range(18))
        first = await _complete(engine, fake_request(prompt, 3))
        second = await _complete(engine, fake_request(prompt, 3))
        stats = engine.stats()
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 16)
    assert second.token_ids == first.token_ids
    assert (stats.num_prefilled_tokens, stats.num_prompt_tokens) == (20, 36)


async def test_tenants_do_not_share_cached_blocks() -> None:
    async with _running(fake_engine()) as engine:
        prompt = list(range(18))
        await _complete(engine, fake_request(prompt, 1, tenant="a"))
        other = await _complete(engine, fake_request(prompt, 1, tenant="b"))
    assert other.num_cached_tokens == 0


async def test_a_stop_token_ends_the_completion_and_is_not_among_its_tokens() -> None:
    prompt = [5, 6]
    stop = greedy_tokens(prompt, 4)[3]
    async with _running(fake_engine()) as engine:
        completion = await _complete(engine, fake_request(prompt, 9, stop_token_ids=(stop,)))
    assert completion.token_ids == greedy_tokens(prompt, 3)
    assert (completion.finish_reason, completion.stop_token_id) == ("stop", stop)


def _eos_after(length: int) -> FakeDecoder:
    def logits_of(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(tokens) >= length:
            logits[EOS] = 30.0
        return logits

    return FakeDecoder(4, logits_of=logits_of)


async def test_the_end_of_sequence_ends_the_completion() -> None:
    async with _running(fake_engine(decoder=_eos_after(5))) as engine:
        completion = await _complete(engine, fake_request([1, 2, 3], 9))
    assert completion.token_ids == greedy_tokens([1, 2, 3], 2)
    assert (completion.finish_reason, completion.stop_token_id) == ("stop", EOS)


async def test_ignore_eos_goes_on_past_the_end_of_sequence() -> None:
    async with _running(fake_engine(decoder=_eos_after(5))) as engine:
        completion = await _complete(engine, fake_request([1, 2, 3], 6, ignore_eos=True))
    assert completion.token_ids == [*greedy_tokens([1, 2, 3], 2), EOS, EOS, EOS, EOS]
    assert completion.finish_reason == "length"


async def test_min_tokens_come_before_any_end_of_sequence() -> None:
    async with _running(fake_engine(decoder=_eos_after(3))) as engine:
        completion = await _complete(engine, fake_request([1, 2, 3], 9, min_tokens=4))
    assert completion.token_ids == greedy_tokens([1, 2, 3], 4)
    assert completion.finish_reason == "stop"


async def test_log_probabilities_come_with_each_token() -> None:
    async with _running(fake_engine()) as engine:
        logprobs: list[TokenLogprob] = []
        async for deltas in engine.generate(fake_request([1], 3, logprobs=2)):
            for delta in deltas:
                assert delta.logprobs is not None
                logprobs += delta.logprobs
    assert [item.token_id for item in logprobs] == greedy_tokens([1], 3)
    assert all(len(item.top) == 2 and item.top[0][0] == item.token_id for item in logprobs)


@pytest.mark.parametrize("budget", [7, 512])
async def test_completions_of_a_request_share_the_prompt_s_blocks(budget: int) -> None:
    async with _running(fake_engine(max_num_batched_tokens=budget)) as engine:
        prompt = list(range(18))
        completions = await collect(engine.generate(fake_request(prompt, 5, n=4)))
        stats = engine.stats()
    assert [item.token_ids for item in completions] == [greedy_tokens(prompt, 5)] * 4
    assert [item.num_cached_tokens for item in completions] == [0, 16, 16, 16]
    assert stats.num_prefilled_tokens == 18 + 3 * 2


async def test_sampled_completions_of_a_request_differ_and_its_seed_repeats_them() -> None:
    flat = FakeDecoder(4, logits_of=lambda tokens, logits: torch.zeros_like(logits))
    async with _running(fake_engine(decoder=flat)) as engine:

        async def sample(seed: int | None, n: int) -> list[list[int]]:
            request = fake_request([1, 2], 12, n=n, temperature=1.0, seed=seed, ignore_eos=True)
            return [item.token_ids for item in await collect(engine.generate(request))]

        first = await sample(7, 3)
        assert await sample(7, 3) == first
        assert await sample(7, 1) == first[:1]
        assert len({tuple(tokens) for tokens in first}) == 3
        assert await sample(None, 1) != await sample(None, 1)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (fake_request([], 4), InvalidRequestError),
        (fake_request([101], 4), InvalidRequestError),
        (fake_request([1], 0), InvalidRequestError),
        (fake_request([1] * 250, 7), ContextLengthError),
    ],
)
async def test_a_wrong_request_is_refused_before_the_first_delta(
    request_: GenerateRequest, error: type[Exception]
) -> None:
    async with _running(fake_engine()) as engine:
        with pytest.raises(error):
            await anext(engine.generate(request_))
        assert engine.max_sequence_tokens == 256


async def test_too_much_waiting_work_is_refused_and_the_rest_is_served() -> None:
    gate = _Gate(token=99)
    engine = fake_engine(max_num_seqs=1, max_waiting_tokens=20, decoder=FakeDecoder(4, before=gate))
    async with _running(engine):
        blocking = asyncio.ensure_future(_complete(engine, fake_request([99], 2)))
        await asyncio.to_thread(gate.reached.wait, 60)
        waiting = asyncio.ensure_future(_complete(engine, fake_request([1] * 15, 2)))
        await eventually(lambda: engine.stats().num_waiting == 1)
        with pytest.raises(OverloadedError) as caught:
            await anext(engine.generate(fake_request([2] * 6, 2)))
        assert caught.value.details["retry_after_s"] > 0
        gate.open()
        await asyncio.gather(blocking, waiting)


async def test_closing_the_iterator_frees_the_blocks() -> None:
    async with _running(fake_engine()) as engine:
        deltas = engine.generate(fake_request([1, 2, 3], 200))
        await anext(deltas)
        assert engine.stats().kv_blocks_used > 0
        await deltas.aclose()
        await eventually(lambda: engine.stats().kv_blocks_used == 0)
        assert engine.stats().num_generated_tokens < 200


async def test_cancelling_the_reader_frees_the_blocks_within_a_step() -> None:
    gate = _Gate(token=42)
    async with _running(fake_engine(decoder=FakeDecoder(4, before=gate))) as engine:
        reader = asyncio.ensure_future(_complete(engine, fake_request([42], 200)))
        await asyncio.to_thread(gate.reached.wait, 60)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        steps = engine.stats().num_steps
        await eventually(lambda: engine.stats().kv_blocks_used == 0)
        gate.open()
        assert (await _complete(engine, fake_request([1], 3))).token_ids == greedy_tokens([1], 3)
        assert engine.stats().num_steps == steps + 1 + 3


async def test_a_request_that_waits_can_be_aborted() -> None:
    gate = _Gate(token=42)
    engine = fake_engine(max_num_seqs=1, decoder=FakeDecoder(4, before=gate))
    async with _running(engine):
        first = asyncio.ensure_future(_complete(engine, fake_request([42], 3)))
        await asyncio.to_thread(gate.reached.wait, 60)
        second = asyncio.ensure_future(_complete(engine, fake_request([1], 3)))
        await eventually(lambda: engine.stats().num_waiting == 1)
        second.cancel()
        gate.open()
        assert (await first).token_ids == greedy_tokens([42], 3)
        await eventually(lambda: engine.stats().num_waiting == 0)


async def test_an_unavailable_expert_fails_only_the_micro_batch_that_needed_it() -> None:
    error = ExpertUnavailableError("no replica of expert 3", layer=1, expert=3)
    decoder = FakeDecoder(4, before=_poisoned(66, error), num_yields=1)
    async with _running(fake_engine(decoder=decoder, num_micro_batches=2)) as engine:
        bad, good = await asyncio.gather(
            _complete(engine, fake_request([66] * 9, 3)),
            _complete(engine, fake_request([1] * 9, 3)),
            return_exceptions=True,
        )
    assert isinstance(bad, ExpertUnavailableError)
    assert bad.details == {"layer": 1, "expert": 3}
    assert isinstance(good, Completion)
    assert good.token_ids == greedy_tokens([1] * 9, 3)


async def test_requests_of_a_failed_micro_batch_each_get_an_error_of_their_own() -> None:
    error = ExpertUnavailableError("no replica")
    async with _running(fake_engine(decoder=FakeDecoder(4, before=_poisoned(66, error)))) as engine:
        failures = await asyncio.gather(
            *(_complete(engine, fake_request([66, i], 3)) for i in range(3)),
            return_exceptions=True,
        )
    assert len({id(failure) for failure in failures}) == 3


async def test_a_non_finite_row_fails_its_request_and_no_other() -> None:
    def logits_of(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits * float("nan") if tokens[0] == 66 and len(tokens) > 10 else logits

    async with _running(fake_engine(decoder=FakeDecoder(4, logits_of=logits_of))) as engine:
        bad, good = await asyncio.gather(
            _complete(engine, fake_request([66] * 9, 9)),
            _complete(engine, fake_request([1] * 9, 9)),
            return_exceptions=True,
        )
        assert isinstance(bad, NonFiniteError)
        assert isinstance(good, Completion)
        assert good.token_ids == greedy_tokens([1] * 9, 9)
        again = await _complete(engine, fake_request([66] * 9, 1))
        assert again.num_cached_tokens == 0, "blocks of a non-finite sequence were reused"


async def test_an_unexpected_error_fails_the_step_s_requests_and_the_engine_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    decoder = FakeDecoder(4, before=_poisoned(66, ZeroDivisionError("a bug")))
    async with _running(fake_engine(decoder=decoder)) as engine:
        with caplog.at_level(logging.ERROR), pytest.raises(ExpertfleetError, match="ZeroDivision"):
            await _complete(engine, fake_request([66] * 9, 3))
        assert "a bug" in caplog.text
        assert (await _complete(engine, fake_request([1], 3))).token_ids == greedy_tokens([1], 3)
        assert engine.stats().kv_blocks_used == 0


async def test_a_forward_that_is_cancelled_from_within_fails_its_requests_only() -> None:
    decoder = FakeDecoder(4, before=_poisoned(66, asyncio.CancelledError()))  # type: ignore[arg-type]
    async with _running(fake_engine(decoder=decoder)) as engine:
        with pytest.raises(ExpertfleetError, match="CancelledError"):
            await _complete(engine, fake_request([66], 3))
        assert (await _complete(engine, fake_request([1], 3))).token_ids == greedy_tokens([1], 3)


async def test_blocks_of_a_failed_step_are_computed_again() -> None:
    failures = iter([True])

    def before(batch: ForwardBatch, context: StepContext) -> None:
        if 7 in batch.token_ids and next(failures, False):
            raise ZeroDivisionError

    engine = fake_engine(max_num_batched_tokens=8, decoder=FakeDecoder(4, before=before))
    async with _running(engine):
        prompt = [1, 2, 3, 4, 5, 6, 9, 8, 7, 0, 1, 2, 3]
        with pytest.raises(ExpertfleetError):
            await _complete(engine, fake_request(prompt, 2))
        completion = await _complete(engine, fake_request(prompt, 2))
    assert completion.token_ids == greedy_tokens(prompt, 2)
    assert completion.num_cached_tokens == 8


async def test_a_failing_completion_fails_its_whole_request() -> None:
    flat = FakeDecoder(4)
    bad: list[list[int]] = []

    def logits_of(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(tokens) == 6 and not bad:
            bad.append(tokens)
            return logits * float("nan")
        return logits

    flat.logits_of = logits_of
    async with _running(fake_engine(decoder=flat)) as engine:
        with pytest.raises(NonFiniteError):
            await collect(engine.generate(fake_request([1, 2, 3], 9, n=3)))
        await eventually(lambda: engine.stats().kv_blocks_used == 0)


async def test_an_idle_engine_does_not_step() -> None:
    async with _running(fake_engine()) as engine:
        await _complete(engine, fake_request([1], 2))
        steps = engine.stats().num_steps
        await _complete(engine, fake_request([1], 2))
        assert engine.stats().num_steps == steps + 2 == 4


async def test_micro_batches_of_a_step_are_disjoint_and_numbered() -> None:
    decoder = FakeDecoder(4, num_yields=1)
    async with _running(fake_engine(decoder=decoder, num_micro_batches=2)) as engine:
        await asyncio.gather(*(_complete(engine, fake_request([i] * 5, 6)) for i in range(6)))
    by_step: dict[int, list[int]] = {}
    for context, _ in decoder.batches:
        by_step.setdefault(context.step, []).append(context.micro_batch)
    assert all(indices == list(range(len(indices))) for indices in by_step.values())
    assert max(map(len, by_step.values())) == 2


async def test_micro_batches_run_side_by_side() -> None:
    """The second micro-batch goes on while the first waits for its experts."""
    other_ran = asyncio.Event()

    async def before(batch: ForwardBatch, context: StepContext) -> None:
        if context.micro_batch == 1:
            other_ran.set()
        elif batch.num_seqs > 1:
            async with asyncio.timeout(60):
                await other_ran.wait()

    decoder = FakeDecoder(4, before=before)
    async with _running(fake_engine(decoder=decoder, num_micro_batches=2)) as engine:
        await asyncio.gather(*(_complete(engine, fake_request([i] * 3, 8)) for i in range(6)))
    assert other_ran.is_set()


async def test_requests_from_two_event_loops_are_served_together() -> None:
    async with _running(fake_engine()) as engine:

        def in_a_thread() -> Completion:
            return asyncio.run(_complete(engine, fake_request([9, 8], 20)))

        here, there = await asyncio.gather(
            _complete(engine, fake_request([1, 2], 20)), asyncio.to_thread(in_a_thread)
        )
    assert here.token_ids == greedy_tokens([1, 2], 20)
    assert there.token_ids == greedy_tokens([9, 8], 20)


async def test_a_caller_whose_loop_died_loses_its_request() -> None:
    slow = FakeDecoder(4, before=lambda *_: asyncio.sleep(0.05))
    async with _running(fake_engine(decoder=slow)) as engine:
        deltas = engine.generate(fake_request([1], 250))

        def abandon() -> None:
            loop = asyncio.new_event_loop()
            loop.run_until_complete(anext(deltas))
            loop.close()

        await asyncio.to_thread(abandon)
        await eventually(lambda: engine.stats().kv_blocks_used == 0)
        assert engine.stats().num_generated_tokens < 250


async def test_stopping_lets_running_requests_finish_and_refuses_new_ones() -> None:
    gate = _Gate(token=42)
    experts = FakeExperts()
    engine = fake_engine(decoder=FakeDecoder(4, before=gate), experts=experts)
    engine.start()
    running = asyncio.ensure_future(_complete(engine, fake_request([42], 5)))
    await asyncio.to_thread(gate.reached.wait, 60)
    stopping = asyncio.ensure_future(engine.stop(timeout_s=60))
    await asyncio.sleep(0)
    with pytest.raises(ShardLostError):
        await anext(engine.generate(fake_request([1], 5)))
    gate.open()
    assert (await running).token_ids == greedy_tokens([42], 5)
    await stopping
    assert experts.is_closed
    with pytest.raises(UnavailableError):
        engine.check_alive()


async def test_stopping_fails_what_does_not_finish_in_time() -> None:
    gate = _Gate(token=42)
    engine = fake_engine(decoder=FakeDecoder(4, before=gate), max_num_seqs=1)
    engine.start()
    requests = [asyncio.ensure_future(_complete(engine, fake_request([42], 5))) for _ in range(3)]
    await asyncio.to_thread(gate.reached.wait, 60)
    await engine.stop(timeout_s=0.05)
    failures = await asyncio.gather(*requests, return_exceptions=True)
    assert [type(failure) for failure in failures] == [ShardLostError] * 3
    assert engine.stats().kv_blocks_used == 0


async def test_the_engine_runs_in_inference_mode() -> None:
    seen: list[bool] = []
    decoder = FakeDecoder(4, before=lambda *_: seen.append(torch.is_inference_mode_enabled()))
    async with _running(fake_engine(decoder=decoder)) as engine:
        await _complete(engine, fake_request([1], 2))
    assert seen == [True, True]


async def test_a_broken_engine_says_so_and_fails_everyone() -> None:
    engine = fake_engine()
    engine.start()
    engine._scheduler.schedule = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ExpertfleetError, match="ZeroDivisionError"):
        await _complete(engine, fake_request([1], 2))
    with pytest.raises(UnavailableError, match="restart the shard"):
        engine.check_ready()
    await engine.stop(timeout_s=1)


def test_the_fake_model_never_ends_a_completion_by_itself() -> None:
    assert EOS not in {next_token([i, j]) for i in range(30) for j in range(30)}
