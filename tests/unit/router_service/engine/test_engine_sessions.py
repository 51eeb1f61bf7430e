"""Sessions end to end in one process: written behind by one engine, restored by the next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from router_service.engine.engine import Engine
from router_service.session_tier.block_transfer import BlockTransfer
from router_service.session_tier.restore_policy import RestorePolicy
from router_service.session_tier.session_tier import SessionTier
from tests.support.at_once import all_at_once
from tests.support.eventually import eventually
from tests.support.fake_decoder import (
    Completion,
    FakeDecoder,
    FakeKVCache,
    collect,
    fake_engine,
    fake_layout,
    fake_request,
    greedy_tokens,
)
from tests.support.flaky_store import FlakyStore

LAYOUT = fake_layout(block_size=4)
PROMPT = [(7 * i) % 100 for i in range(50)]


@asynccontextmanager
async def _shard(
    store: FlakyStore, *, queue_bytes: int = 1 << 20, max_wait_s: float = 60.0, **options: Any
) -> AsyncIterator[tuple[Engine, SessionTier]]:
    tier = SessionTier(
        store,
        layout=LAYOUT,
        queue_bytes=queue_bytes,
        default_ttl_s=60.0,
        policy=RestorePolicy(block_size=4, block_bytes=LAYOUT.payload_bytes, max_wait_s=max_wait_s),
    )
    engine = fake_engine(session_tier=tier, **options)
    engine.start()
    try:
        yield engine, tier
    finally:
        await engine.stop(timeout_s=2)


async def _turn(
    engine: Engine, prompt: list[int], max_tokens: int = 10, **options: Any
) -> Completion:
    request = fake_request(prompt, max_tokens, **{"session_id": "s"} | options)
    return (await collect(engine.generate(request)))[0]


async def test_another_shard_goes_on_with_a_session_without_computing_it_again() -> None:
    store = FlakyStore(LAYOUT)
    async with _shard(store) as (engine, _):
        first = await _turn(engine, PROMPT)
    longer = [*PROMPT, *first.token_ids, 1, 2, 3]
    async with _shard(store, kv_cache=(kv_cache := FakeKVCache(64, 4))) as (engine, tier):
        second = await _turn(engine, longer)
        stats = engine.stats()
        info = await tier.get_session("default", "s")
    assert second.token_ids == greedy_tokens(longer, 10)
    assert second.num_restored_tokens == second.num_cached_tokens == 56
    assert stats.num_prefilled_tokens == len(longer) - 56
    assert stats.num_restored_tokens == 56
    assert kv_cache.num_imports == 14
    assert info is not None
    assert info.num_tokens == len(longer) + 10


async def test_only_what_is_not_in_the_local_cache_is_fetched() -> None:
    store = FlakyStore(LAYOUT)
    async with _shard(store) as (engine, tier):
        await _turn(engine, PROMPT)
        await tier.flush(60)
    async with _shard(store) as (engine, tier):
        await _turn(engine, PROMPT[:22], session_id=None)
        second = await _turn(engine, PROMPT)
        assert store.num_fetched == 7
        assert (second.num_cached_tokens, second.num_restored_tokens) == (48, 28)


async def test_a_session_s_blocks_are_written_once_and_prolonged_by_later_turns() -> None:
    store = FlakyStore(LAYOUT)
    async with _shard(store) as (engine, tier):
        first = await _turn(engine, PROMPT)
        await tier.flush(60)
        longer = [*PROMPT, *first.token_ids, 1, 2, 3]
        await _turn(engine, longer, session_ttl_s=500.0)
        await tier.flush(60)
    written = [block for _, hashes, _, _ in store.puts for block in hashes]
    assert len(written) == len(set(written)) == (len(longer) + 9) // 4
    ((_, touched, _, ttl_s),) = [item for item in store.touches if item[1]]
    assert touched == written[: len(touched)]
    assert len(touched) == (len(longer) - 1) // 4 - 1
    assert ttl_s == 500.0


async def test_blocks_are_written_while_the_request_still_runs() -> None:
    store = FlakyStore(LAYOUT)
    decoder = FakeDecoder(4, before=lambda *_: asyncio.sleep(0.002))
    async with _shard(store, decoder=decoder) as (engine, _):
        deltas = engine.generate(fake_request(PROMPT, 150, session_id="s"))
        await anext(deltas)
        await eventually(lambda: len(store.inner.values) >= 14)
        await deltas.aclose()


async def test_without_a_session_nothing_is_asked_or_written() -> None:
    store = FlakyStore(LAYOUT)
    async with _shard(store) as (engine, tier):
        await _turn(engine, PROMPT, session_id=None)
        await tier.flush(60)
    assert store.num_counts == 0
    assert store.puts == []


async def test_all_completions_of_a_request_are_saved_and_the_prompt_only_once() -> None:
    store = FlakyStore(LAYOUT)
    async with _shard(store) as (engine, tier):
        request = fake_request(PROMPT, 9, n=3, session_id="s", temperature=1.5, seed=1)
        completions = await collect(engine.generate(request))
        await tier.flush(60)
    written = [block for _, hashes, _, _ in store.puts for block in hashes]
    distinct = {tuple(item.token_ids) for item in completions}
    shared = len(PROMPT) // 4
    assert written.count(written[0]) == 1
    assert len(set(written)) >= shared + len(distinct)


@pytest.mark.parametrize("fault", ["down", "slow", "tampered", "short", "empty"])
async def test_a_faulty_store_changes_no_token(fault: str) -> None:
    store = FlakyStore(LAYOUT)
    async with _shard(store) as (engine, _):
        await _turn(engine, PROMPT)
    store.is_down = fault == "down"
    store.delay_s = 0.3 if fault == "slow" else 0.0
    store.payload_limit = 5 if fault == "short" else None
    if fault == "tampered":
        for block_hash, value in store.inner.values.items():
            store.inner.values[block_hash] = value[:-1] + bytes([value[-1] ^ 1])
    if fault == "empty":
        store.inner.values.clear()
    async with _shard(store, max_wait_s=0.1) as (engine, tier):
        second = await _turn(engine, PROMPT)
        third = await _turn(engine, [*PROMPT, 1])
        stats = tier.stats()
        store.delay_s = 0.0
    assert second.token_ids == greedy_tokens(PROMPT, 10)
    assert third.token_ids == greedy_tokens([*PROMPT, 1], 10)
    assert second.num_restored_tokens == 0
    assert third.num_cached_tokens == 48, "what was recomputed serves from the local cache"
    if fault in ("tampered", "short"):
        assert sum(stats.refused.values()) == 1


async def test_refused_blocks_are_replaced_by_recomputed_ones() -> None:
    store = FlakyStore(LAYOUT)
    async with _shard(store) as (engine, _):
        await _turn(engine, PROMPT)
    victim = store.puts[0][1][2]
    store.inner.values[victim] = store.inner.values[victim][:-1] + b"?"
    async with _shard(store) as (engine, _):
        second = await _turn(engine, PROMPT)
        assert second.num_restored_tokens == 8
    async with _shard(store) as (engine, _):
        assert (await _turn(engine, PROMPT)).num_restored_tokens == 48


async def test_a_full_queue_loses_blocks_and_no_tokens() -> None:
    store = FlakyStore(LAYOUT)
    async with _shard(store, queue_bytes=1500) as (engine, tier):
        store.delay_s = 0.2
        completion = await _turn(engine, PROMPT)
        assert completion.token_ids == greedy_tokens(PROMPT, 10)
        assert tier.stats().num_dropped > 0
        store.delay_s = 0.0


async def test_a_request_that_waits_for_its_restore_can_be_aborted() -> None:
    store = FlakyStore(LAYOUT)
    async with _shard(store) as (engine, _):
        store.delay_s = 0.2
        reader = asyncio.ensure_future(_turn(engine, PROMPT))
        await eventually(lambda: engine.stats().num_waiting == 1)
        reader.cancel()
        await eventually(lambda: engine.stats().num_waiting == 0)
        store.delay_s = 0.0
        assert (await _turn(engine, [1, 2])).token_ids == greedy_tokens([1, 2], 10)


async def test_others_are_served_while_a_session_is_fetched() -> None:
    store = FlakyStore(LAYOUT)
    async with _shard(store) as (engine, _):
        store.delay_s = 3600.0
        waiting = asyncio.ensure_future(_turn(engine, PROMPT))
        await eventually(lambda: engine.stats().num_waiting == 1)
        other = await _turn(engine, [1, 2], session_id=None)
        assert other.token_ids == greedy_tokens([1, 2], 10)
        assert not waiting.done()
        store.delay_s = 0.0
        assert (await waiting).token_ids == greedy_tokens(PROMPT, 10)


async def test_restoring_under_eviction_changes_no_token() -> None:
    store = FlakyStore(LAYOUT)
    prompts = [[i, *PROMPT[:20]] for i in range(5)]
    async with _shard(store) as (engine, _):
        for i, prompt in enumerate(prompts):
            await _turn(engine, prompt, session_id=f"s{i}")

    async def until_all_are_restored(*_: object) -> None:
        """The first one does not go on alone: two are admitted, and outgrow the 14 blocks."""
        while engine._scheduler._held:  # noqa: ASYNC110 - there is no event of it
            await asyncio.sleep(0)

    decoder = FakeDecoder(4, before=until_all_are_restored)
    async with _shard(store, num_blocks=14, max_imports_per_step=2, decoder=decoder) as (engine, _):
        asking = [_turn(engine, p, 30, session_id=f"s{i}") for i, p in enumerate(prompts)]
        completions = await all_at_once(engine, asking)
        assert engine.stats().num_preemptions > 0
        assert engine.stats().num_restored_tokens > 0
    assert [item.token_ids for item in completions] == [greedy_tokens(p, 30) for p in prompts]


def test_a_block_survives_the_way_to_bytes_and_back() -> None:
    source, target = FakeKVCache(2, 4), FakeKVCache(2, 4)
    source.tensor[:, :, 1] = 3.5
    payload = BlockTransfer(source, LAYOUT).export_block(1)
    assert payload is not None
    assert len(payload) == LAYOUT.payload_bytes
    BlockTransfer(target, LAYOUT).import_block(0, bytes(payload))
    assert target.tensor[:, :, 0].equal(source.tensor[:, :, 1])


def test_a_block_with_nan_is_not_exported() -> None:
    assert BlockTransfer(FakeKVCache(2, 4), LAYOUT).export_block(0) is None
