from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from router_service.session_tier.restore_policy import RestorePolicy
from router_service.session_tier.session_tier import RestoreRequest, RestoreResult, SessionTier
from services.sessions.store import SessionRef, StoredBlock
from tests.support.fake_decoder import fake_layout
from tests.support.flaky_store import FlakyStore

LAYOUT = fake_layout(block_size=4)
HASHES = [bytes([number]) * 16 for number in range(8)]


def _payload(number: int) -> bytes:
    return bytes([number]) * LAYOUT.payload_bytes


@asynccontextmanager
async def _tier(
    store: FlakyStore, num_stored: int = 8, **policy: float
) -> AsyncIterator[SessionTier]:
    await store.inner.put(
        SessionRef(tenant="t", session_id="s"),
        [StoredBlock(hash=HASHES[i], payload=_payload(i)) for i in range(num_stored)],
        num_tokens=32,
        ttl_s=60.0,
    )
    tier = SessionTier(
        store,
        layout=LAYOUT,
        queue_bytes=1 << 20,
        default_ttl_s=60.0,
        policy=RestorePolicy(block_size=4, block_bytes=LAYOUT.payload_bytes, **policy),
    )
    tier.start()
    try:
        yield tier
    finally:
        await tier.stop(1.0)


async def _restore(tier: SessionTier, *, num_local: int = 0, max_blocks: int = 8) -> RestoreResult:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[RestoreResult] = loop.create_future()
    request = RestoreRequest(hashes=HASHES, num_local=num_local, max_blocks=max_blocks)
    tier.restore(request, lambda result: loop.call_soon_threadsafe(future.set_result, result))
    async with asyncio.timeout(60):
        return await future


async def test_what_is_stored_and_not_here_is_fetched() -> None:
    store = FlakyStore(LAYOUT)
    async with _tier(store, num_stored=6) as tier:
        result = await _restore(tier, num_local=2)
    assert [bytes(payload) for payload in result.payloads] == [_payload(i) for i in range(2, 6)]
    assert (result.num_stored, result.num_restorable) == (6, 6)
    assert result.start_ns <= result.end_ns
    assert store.is_closed


async def test_checkpoints_are_fetched_but_not_taken_for_what_a_session_has() -> None:
    store = FlakyStore(LAYOUT)
    checkpoints = [StoredBlock(hash=HASHES[i], payload=_payload(i)) for i in (3, 4, 5)]
    await store.inner.put_checkpoint(checkpoints, ttl_s=60.0)
    async with _tier(store, num_stored=4) as tier:
        result = await _restore(tier, num_local=2)
        assert [bytes(payload) for payload in result.payloads] == [_payload(i) for i in range(2, 6)]
        assert (result.num_stored, result.num_restorable) == (4, 6)
        store.inner.checkpoint_values[HASHES[4]] = b"torn"
        result = await _restore(tier, num_local=2)
        assert len(result.payloads) == 2
        assert (result.num_stored, result.num_restorable) == (4, 4)


async def test_no_more_blocks_are_fetched_than_memory_is_left_for() -> None:
    store = FlakyStore(LAYOUT)
    async with _tier(store) as tier:
        result = await _restore(tier, max_blocks=3)
    assert len(result.payloads) == 3
    assert result.num_stored == 8


async def test_room_for_fetched_payloads_comes_back_when_the_fetch_has_ended() -> None:
    store = FlakyStore(LAYOUT)
    async with _tier(store) as tier:
        room = tier.max_blocks_to_fetch(0)
        assert tier.max_blocks_to_fetch(5 * LAYOUT.payload_bytes) == room - 5
        store.delay_s = 0.1
        waiting = asyncio.ensure_future(_restore(tier))
        await asyncio.sleep(0)
        assert tier.max_blocks_to_fetch(0) == room - 8
        await waiting
        assert tier.max_blocks_to_fetch(0) == room


async def test_a_store_that_is_down_costs_nothing_but_the_question() -> None:
    store = FlakyStore(LAYOUT)
    async with _tier(store) as tier:
        store.is_down = True
        result = await _restore(tier)
        assert (result.num_stored, result.payloads) == (0, ())
        store.is_down = False
        assert len((await _restore(tier)).payloads) == 8


async def test_a_slow_store_costs_no_more_than_the_deadline() -> None:
    store = FlakyStore(LAYOUT)
    async with _tier(store, max_wait_s=1.5) as tier:
        store.delay_s = 0.01
        assert len((await _restore(tier)).payloads) == 8
        store.fetch_delay_s = 3600.0
        start = time.monotonic()
        result = await _restore(tier)
        assert result.payloads == ()
        assert result.num_stored == 8
        assert time.monotonic() - start < 20.0


async def test_where_computing_was_measured_to_be_faster_nothing_is_fetched() -> None:
    store = FlakyStore(LAYOUT)
    async with _tier(store) as tier:
        store.delay_s = 0.05
        await _restore(tier)
        tier.observe_prefill(100_000, 1.0)
        fetched = store.num_fetched
        result = await _restore(tier)
    assert result.payloads == ()
    assert result.num_stored == 8
    assert store.num_fetched == fetched


async def test_a_payload_of_another_length_is_refused_and_will_be_written_again() -> None:
    store = FlakyStore(LAYOUT)
    store.payload_limit = LAYOUT.payload_bytes - 1
    async with _tier(store) as tier:
        result = await _restore(tier, num_local=1)
        assert (result.num_stored, result.payloads) == (1, ())
        assert tier.stats().refused == {"layout": 1}


async def test_a_block_the_store_refused_ends_the_prefix_and_will_be_written_again() -> None:
    store = FlakyStore(LAYOUT)
    async with _tier(store) as tier:
        value = store.inner.values[HASHES[3]]
        store.inner.values[HASHES[3]] = value[:-1] + bytes([value[-1] ^ 1])
        result = await _restore(tier)
        assert (result.num_stored, len(result.payloads)) == (3, 3)
        assert sum(tier.stats().refused.values()) == 1


async def test_sessions_are_looked_up_and_deleted_from_any_loop() -> None:
    async with _tier(FlakyStore(LAYOUT)) as tier:
        info = await tier.get_session("t", "s")
        assert info is not None
        assert info.num_blocks == 8
        assert await tier.delete_session("t", "s")
        assert await tier.get_session("t", "s") is None


async def test_a_tier_that_was_stopped_answers_that_nothing_is_there() -> None:
    async with _tier(FlakyStore(LAYOUT)) as tier:
        pass
    result = await _restore(tier)
    assert (result.num_stored, result.payloads) == (0, ())


@pytest.mark.parametrize("delay_s", [0.0, 0.3])
async def test_many_restores_go_on_at_the_same_time(delay_s: float) -> None:
    store = FlakyStore(LAYOUT)
    async with _tier(store) as tier:
        store.delay_s = delay_s
        start = time.monotonic()
        results = await asyncio.gather(*(_restore(tier) for _ in range(20)))
        assert time.monotonic() - start < 6.0, (
            "20 times two questions, one after the other, take 12 s"
        )
    assert all(len(result.payloads) == 8 for result in results)
