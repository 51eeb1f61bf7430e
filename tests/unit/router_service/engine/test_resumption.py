"""A completion goes on in another engine exactly as it would have in the one that was lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router_service.engine.engine import Engine
from router_service.session_tier import checkpoint_writer
from router_service.session_tier.session_tier import SessionTier
from services.core.errors import InvalidRequestError, OverloadedError, ShardLostError
from services.core.generation import GenerationDelta, ResumedChoice
from services.core.settings import CheckpointKV
from tests.support.eventually import eventually
from tests.support.fake_decoder import (
    EOS,
    VOCAB_SIZE,
    Completion,
    FakeDecoder,
    FakeKVCache,
    collect,
    fake_engine,
    fake_layout,
    fake_request,
    greedy_tokens,
    next_token,
)
from tests.support.flaky_store import FlakyStore

LAYOUT = fake_layout(block_size=4)
PROMPT = [(7 * i) % 100 for i in range(30)]
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "a temperature": {"temperature": 1.3, "seed": 5},
    "penalties": {
        "temperature": 1.1,
        "seed": -3,
        "repetition_penalty": 1.4,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.9,
        "top_p": 0.95,
    },
    "min_tokens": {"temperature": 1.5, "seed": 11, "min_tokens": 12, "stop_token_ids": (7, 50, 93)},
}


@asynccontextmanager
async def _running(engine: Engine) -> AsyncIterator[Engine]:
    engine.start()
    try:
        yield engine
    finally:
        await engine.stop(timeout_s=2)


def _decoder() -> FakeDecoder:
    """Several likely tokens after each context, so that a draw and a penalty decide."""

    def spread(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(VOCAB_SIZE)
        for rank in range(6):
            logits[next_token([*tokens, rank])] += 4.0 - 0.3 * rank
        logits[EOS] = -20.0
        return logits

    return FakeDecoder(4, logits_of=spread)


async def _complete(engine: Engine, **options: Any) -> list[Completion]:
    request = fake_request(options.pop("prompt", PROMPT), **{"max_tokens": 24, "seed": 1} | options)
    return await collect(engine.generate(request))


def _cut(completions: Sequence[Completion], cuts: Sequence[int]) -> tuple[ResumedChoice, ...]:
    """What had been emitted when the shard was lost after so many tokens of each completion."""
    return tuple(
        ResumedChoice(is_finished=True)
        if cut >= len(completion.token_ids)
        else ResumedChoice(token_ids=tuple(completion.token_ids[:cut]))
        for completion, cut in zip(completions, cuts, strict=True)
    )


@pytest.mark.parametrize("sampling", SAMPLINGS)
async def test_any_cut_gives_the_same_continuation(sampling: str) -> None:
    options = SAMPLINGS[sampling]
    async with _running(fake_engine(decoder=_decoder())) as engine:
        (whole,) = await _complete(engine, **options)
    num_recomputed = 0
    async with _running(fake_engine(decoder=_decoder())) as engine:
        for number, cut in enumerate(range(0, len(whole.token_ids), 3), start=1):
            resumed = _cut([whole], [cut])
            # Tenants do not share blocks: nothing is found that another cut has computed.
            (rest,) = await _complete(engine, **options, resumed=resumed, tenant=f"tenant-{cut}")
            assert rest.token_ids == whole.token_ids[cut:], f"cut at {cut}"
            assert rest.finish_reason == whole.finish_reason
            assert rest.stop_token_id == whole.stop_token_id
            num_recomputed += len(PROMPT) + cut
            stats = engine.stats()
            assert stats.num_prompt_tokens == stats.num_recomputed_tokens == num_recomputed
            assert stats.num_resumed_requests == number
            assert stats.kv_blocks_used == 0


@settings(max_examples=8, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 99), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 20), min_size=3, max_size=3),
    seed=st.integers(0, 2**64 - 1),
    budget=st.sampled_from([3, 8, 64]),
    num_blocks=st.sampled_from([24, 64]),
)
def test_any_cut_of_several_choices_gives_the_same_continuations(
    prompt: list[int], cuts: list[int], seed: int, budget: int, num_blocks: int
) -> None:
    """Beside another request, in chunks, with a cache too small for all; some choices finished."""
    options: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": 20,
        "temperature": 1.2,
        "seed": seed,
        "n": 3,
        "frequency_penalty": 0.5,
    }

    async def run() -> None:
        async with _running(fake_engine(decoder=_decoder())) as engine:
            whole = await _complete(engine, **options)
        resumed = _cut(whole, cuts)
        if all(choice.is_finished for choice in resumed):
            return
        small = fake_engine(
            decoder=_decoder(), num_blocks=num_blocks, max_num_batched_tokens=budget
        )
        async with _running(small) as engine:
            again, _ = await asyncio.gather(
                _by_index(engine, **options, resumed=resumed), _complete(engine, prompt=[1, 2])
            )
            assert engine.stats().kv_blocks_used == 0
        for index, (completion, cut) in enumerate(zip(whole, cuts, strict=True)):
            if resumed[index].is_finished:
                assert index not in again
            else:
                assert again[index] == completion.token_ids[cut:]

    asyncio.run(run())


async def _by_index(engine: Engine, **options: Any) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    request = fake_request(options.pop("prompt"), **options)
    async for deltas in engine.generate(request):
        for delta in deltas:
            tokens.setdefault(delta.index, []).extend(delta.token_ids)
    return tokens


async def test_a_resumed_request_shares_its_prompt_and_finds_it_cached() -> None:
    async with _running(fake_engine(decoder=_decoder())) as engine:
        whole = await _complete(engine, n=2, temperature=1.0)
        before = engine.stats()
        rest = await _complete(engine, n=2, temperature=1.0, resumed=_cut(whole, [10, 10]))
        after = engine.stats()
    assert [item.token_ids for item in rest] == [item.token_ids[10:] for item in whole]
    assert [item.num_cached_tokens for item in rest] == [30, 30], "no more than the prompt has"
    assert after.num_prefilled_tokens - before.num_prefilled_tokens <= 2 * 4
    assert after.num_recomputed_tokens <= 2 * 4


async def test_a_resumed_request_is_taken_even_where_new_ones_are_refused() -> None:
    gate = asyncio.Event()

    async def until_the_gate_opens(*_: object) -> None:
        while not gate.is_set():  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.001)

    decoder = FakeDecoder(4, before=until_the_gate_opens)
    engine = fake_engine(decoder=decoder, max_waiting_tokens=20, max_num_seqs=1)
    async with _running(engine):
        others = [asyncio.ensure_future(_complete(engine, prompt=[9] * 15, max_tokens=200))]
        await eventually(lambda: engine.stats().num_running == 1)
        others.append(asyncio.ensure_future(_complete(engine, prompt=[9] * 15, max_tokens=200)))
        await eventually(lambda: engine.stats().num_waiting == 1)
        with pytest.raises(OverloadedError):
            await _complete(engine)
        resumed = (ResumedChoice(token_ids=tuple(greedy_tokens(PROMPT, 3))),)
        request = asyncio.ensure_future(_complete(engine, max_tokens=5, resumed=resumed))
        gate.set()
        (rest,) = await request
        await asyncio.gather(*others)
    assert rest.token_ids == greedy_tokens(PROMPT, 5)[3:]


@pytest.mark.parametrize(
    ("resumed", "options", "what"),
    [
        ((ResumedChoice(),), {"n": 2}, "of n"),
        ((ResumedChoice(is_finished=True),), {}, "unfinished"),
        ((ResumedChoice(token_ids=(1,) * 24),), {}, "at most 23"),
        ((ResumedChoice(token_ids=(VOCAB_SIZE,)),), {}, "token 0 to"),
        ((ResumedChoice(token_ids=(-1,)),), {}, "token 0 to"),
        ((ResumedChoice(),), {"seed": None}, "seed"),
    ],
)
async def test_what_cannot_be_resumed_is_refused(
    resumed: tuple[ResumedChoice, ...], options: dict[str, Any], what: str
) -> None:
    async with _running(fake_engine()) as engine:
        with pytest.raises(InvalidRequestError, match=what):
            await _complete(engine, resumed=resumed, **options)


async def _tokens_until_lost(engine: Engine, into: list[int], **options: Any) -> ShardLostError:
    request = fake_request(PROMPT, **{"max_tokens": 200, "seed": 1} | options)
    try:
        async for deltas in engine.generate(request):
            into += _token_ids(deltas)
    except ShardLostError as error:
        return error
    raise AssertionError("it was not lost")


def _token_ids(deltas: Sequence[GenerationDelta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


@pytest.mark.parametrize("how", ["hand_back", "stop"])
async def test_a_shard_that_goes_gives_its_requests_back_with_all_their_tokens(how: str) -> None:
    decoder = _slow_decoder(num_fast=20)
    emitted: list[int] = []
    async with _running(fake_engine(decoder=decoder)) as engine:
        lost = asyncio.ensure_future(_tokens_until_lost(engine, emitted))
        await eventually(lambda: len(emitted) >= 5)
        if how == "hand_back":
            await engine.hand_back()
        else:
            await engine.stop(timeout_s=0.0)
        assert (await lost).reason == "drained"
        with pytest.raises(ShardLostError, match="stopping"):
            await _complete(engine)
        assert engine.stats().kv_blocks_used == 0
    async with _running(fake_engine()) as engine:
        resumed = (ResumedChoice(token_ids=tuple(emitted)),)
        (rest,) = await _complete(engine, max_tokens=200, resumed=resumed)
    assert emitted + rest.token_ids == greedy_tokens(PROMPT, 200)


async def test_an_engine_that_breaks_gives_its_requests_to_others() -> None:
    engine = fake_engine()
    engine._scheduler.schedule = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    async with _running(engine):
        assert (await _tokens_until_lost(engine, [])).reason == "died"


# Checkpoints: what of the KV outlives the engine.


@pytest.fixture(autouse=True)
def ample_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """To copy blocks as they fill: a fake step takes no time of which this could be a share."""
    monkeypatch.setattr(checkpoint_writer, "TIME_SHARE", 1.0)
    monkeypatch.setattr(checkpoint_writer, "MAX_BURST_S", 1.0)


@asynccontextmanager
async def _shard(
    store: FlakyStore, checkpoint_kv: CheckpointKV = "all", **options: Any
) -> AsyncIterator[tuple[Engine, SessionTier]]:
    tier = SessionTier(
        store,
        layout=LAYOUT,
        queue_bytes=1 << 20,
        default_ttl_s=60.0,
        checkpoint_kv=checkpoint_kv,
        checkpoint_ttl_s=30.0,
    )
    async with _running(fake_engine(session_tier=tier, **options)) as engine:
        yield engine, tier


def _slow_decoder(num_fast: int = 40) -> FakeDecoder:
    """Slow after its first steps, so that a request of 200 tokens goes on for seconds when these
    have reached its caller, and their blocks the store."""
    decoder = FakeDecoder(
        4, before=lambda *_: asyncio.sleep(0.005 if len(decoder.batches) <= num_fast else 0.1)
    )
    return decoder


def _num_kept(store: FlakyStore) -> int:
    return len(store.inner.values) + len(store.inner.checkpoint_values)


async def _lose(store: FlakyStore, num_tokens: int, **options: Any) -> list[int]:
    """Tokens of a request that its shard, which checkpoints, gave back half-way."""
    emitted: list[int] = []
    async with _shard(store, decoder=_slow_decoder()) as (engine, tier):
        lost = asyncio.ensure_future(_tokens_until_lost(engine, emitted, **options))
        await eventually(lambda: len(emitted) >= num_tokens and _num_kept(store) >= 8)
        await tier.flush(60)
        await engine.hand_back()
        await lost
    return emitted


async def test_a_request_without_a_session_goes_on_from_its_checkpoint() -> None:
    store = FlakyStore(LAYOUT)
    emitted = await _lose(store, 8)
    num_stored = len(store.inner.checkpoint_values)
    assert num_stored >= 8, "a lost request's checkpoint stays"
    kv_cache = FakeKVCache(64, 4)
    async with _shard(store, kv_cache=kv_cache) as (engine, tier):
        resumed = (ResumedChoice(token_ids=tuple(emitted)),)
        (rest,) = await _complete(engine, max_tokens=60, resumed=resumed)
        stats = engine.stats()
        await tier.flush(60)
    assert emitted + rest.token_ids == greedy_tokens(PROMPT, 60)
    assert kv_cache.num_imports == num_stored
    assert stats.num_restored_tokens == 4 * num_stored
    assert stats.num_recomputed_tokens == len(PROMPT) + len(emitted) - 4 * num_stored
    assert rest.num_restored_tokens == min(len(PROMPT), 4 * num_stored)
    assert not store.inner.checkpoint_values, "who adopted a checkpoint forgets it at the end"


async def test_checkpoints_are_forgotten_when_their_request_ends() -> None:
    store = FlakyStore(LAYOUT)
    async with _shard(store, decoder=_slow_decoder()) as (engine, tier):
        request = fake_request(PROMPT, 40)
        deltas = engine.generate(request)
        await anext(deltas)
        await eventually(lambda: len(store.inner.checkpoint_values) >= 8)
        await deltas.aclose()
        await eventually(lambda: engine.stats().num_running == 0)
        await tier.flush(60)
        assert not store.inner.checkpoint_values
        await _complete(engine, max_tokens=12)
        await tier.flush(60)
    assert not store.inner.checkpoint_values


async def test_a_shared_prefix_is_checkpointed_once_and_kept_for_the_last_who_needs_it() -> None:
    store = FlakyStore(LAYOUT)
    async with _shard(store, decoder=_slow_decoder()) as (engine, tier):
        first, second = (engine.generate(fake_request([*PROMPT, i], 100)) for i in range(2))
        await asyncio.gather(anext(first), anext(second))
        await eventually(lambda: len(store.inner.checkpoint_values) >= 9)
        await first.aclose()
        await eventually(lambda: engine.stats().num_running == 1)
        await tier.flush(60)
        assert len(store.inner.checkpoint_values) >= 7
        assert store.checkpoints[0][0] in store.inner.checkpoint_values
        written = [block for hashes in store.checkpoints for block in hashes]
        assert len(written) == len(set(written))
        await second.aclose()


@pytest.mark.parametrize("checkpoint_kv", ["off", "sessions"])
async def test_without_checkpoints_nothing_of_other_requests_is_written_or_asked(
    checkpoint_kv: CheckpointKV,
) -> None:
    store = FlakyStore(LAYOUT)
    async with _shard(store, checkpoint_kv, decoder=_slow_decoder()) as (engine, tier):
        await _complete(engine, max_tokens=8)
        resumed = (ResumedChoice(token_ids=tuple(greedy_tokens(PROMPT, 3))),)
        await _complete(engine, max_tokens=8, resumed=resumed)
        await tier.flush(60)
        assert (store.num_counts, store.checkpoints, store.puts) == (0, [], [])
        await _complete(engine, max_tokens=8, session_id="s")
        await tier.flush(60)
    assert bool(store.puts) == (checkpoint_kv == "sessions")


@pytest.mark.parametrize("fault", ["down", "slow", "tampered", "empty"])
async def test_a_faulty_store_changes_no_token_of_a_resumed_request(fault: str) -> None:
    store = FlakyStore(LAYOUT)
    emitted = await _lose(store, 8)
    store.is_down = fault == "down"
    store.delay_s = 2.0 if fault == "slow" else 0.0
    if fault == "tampered":
        for block_hash, value in store.inner.checkpoint_values.items():
            store.inner.checkpoint_values[block_hash] = value[:-1] + bytes([value[-1] ^ 1])
    if fault == "empty":
        store.inner.checkpoint_values.clear()
    async with _shard(store) as (engine, _):
        resumed = (ResumedChoice(token_ids=tuple(emitted)),)
        async with asyncio.timeout(60):
            (rest,) = await _complete(engine, max_tokens=60, resumed=resumed)
        store.delay_s = 0.0
    assert emitted + rest.token_ids == greedy_tokens(PROMPT, 60)
    assert rest.num_restored_tokens == 0


@pytest.mark.parametrize("session_ttl_s", [10.0, 500.0], ids=["shorter", "longer"])
async def test_a_session_outlives_the_checkpoint_of_a_request_with_the_same_prompt(
    session_ttl_s: float,
) -> None:
    """Its time to live may be shorter than that of checkpoints, which is 30 s here."""
    store = FlakyStore(LAYOUT)
    session: dict[str, Any] = {"session_id": "s", "session_ttl_s": session_ttl_s}
    async with _shard(store, decoder=_slow_decoder()) as (engine, tier):
        other = engine.generate(fake_request(PROMPT, 200))
        await anext(other)
        await eventually(lambda: len(store.inner.checkpoint_values) >= 7)
        await _complete(engine, max_tokens=4, **session)
        await other.aclose()
        await eventually(lambda: engine.stats().num_running == 0)
        await tier.flush(60)
        info = await tier.get_session("default", "s")
    assert not store.inner.checkpoint_values
    assert info is not None
    assert info.num_blocks == (30 + 3) // 4
    async with _shard(store) as (engine, _):
        (again,) = await _complete(engine, max_tokens=4, **session)
    assert again.num_restored_tokens == 28, "all of the prompt's full blocks"


async def test_a_session_keeps_what_it_restored_from_a_checkpoint() -> None:
    store = FlakyStore(LAYOUT)
    await _lose(store, 8)
    checkpoints = list(store.inner.checkpoint_values)
    async with _shard(store) as (engine, tier):
        (turn,) = await _complete(engine, max_tokens=4, session_id="s")
        await tier.flush(60)
    assert turn.num_restored_tokens == 28
    await store.inner.forget_checkpoint(checkpoints)
    async with _shard(store) as (engine, _):
        (again,) = await _complete(engine, max_tokens=4, session_id="s")
    assert again.num_restored_tokens == 28


async def test_a_session_goes_on_on_another_shard_in_the_middle_of_an_answer() -> None:
    store = FlakyStore(LAYOUT)
    emitted = await _lose(store, 8, session_id="s")
    async with _shard(store) as (engine, tier):
        resumed = (ResumedChoice(token_ids=tuple(emitted)),)
        (rest,) = await _complete(engine, max_tokens=60, resumed=resumed, session_id="s")
        await tier.flush(60)
        answer = emitted + rest.token_ids
        (turn,) = await _complete(
            engine, prompt=[*PROMPT, *answer, 1, 2], max_tokens=5, session_id="s"
        )
        await tier.flush(60)
        info = await tier.get_session("default", "s")
    assert answer == greedy_tokens(PROMPT, 60)
    assert turn.token_ids == greedy_tokens([*PROMPT, *answer, 1, 2], 5)
    assert rest.num_restored_tokens >= 28
    assert info is not None
    assert info.num_blocks == (30 + 60 + 2 + 5 - 1) // 4, "a session's blocks stay"
