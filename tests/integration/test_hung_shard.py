"""Shards that hang: real processes, stopped and continued."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress

import pytest

from services.core.errors import ShardLostError
from services.core.generation import GenerateRequest, SamplingParams
from services.core.memory_registry import MemoryRegistry
from services.gateway.resubmission import EmittedTokens, Resubmission, ResubmittingShards
from services.gateway.shard_pool import ShardPool
from tests.support.eventually import eventually
from tests.support.records import shard_record
from tests.support.shard_process import HELD, NUM_BEFORE_HOLD, ShardProcess, running_shard

NUM_TOKENS = 30
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def shards() -> Iterator[list[ShardProcess]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running_shard(holds=holds)) for holds in (True, False)]


@asynccontextmanager
async def pool_of(shards: list[ShardProcess]) -> AsyncIterator[ShardPool]:
    registry = MemoryRegistry()
    for number, shard in enumerate(shards):
        shard.endings.clear()
        record = shard_record(
            f"s{number}", endpoint=shard.endpoint, num_running=0, waiting_tokens=0
        )
        await registry.publish(record, 600)
    pool = ShardPool(registry, refresh_s=0.02)
    try:
        with suppress(ShardLostError):
            await pool.check_ready()  # begins to look for them
        await eventually(lambda: len(pool.joined) == len(shards), timeout_s=TIMEOUT_S)
        await eventually(
            lambda: all(member.beats.has_beaten for member in pool._members.values()),
            timeout_s=TIMEOUT_S,
        )
        yield pool
    finally:
        await pool.close()


@contextmanager
def stopped(shard: ShardProcess) -> Iterator[None]:
    shard.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        shard.process.send_signal(signal.SIGCONT)


async def test_a_shard_that_hangs_loses_its_requests_to_the_other_and_is_used_again(
    shards: list[ShardProcess],
) -> None:
    async with pool_of(shards) as pool:
        asked = [_Asked(pool, HELD) for _ in range(6)]
        await eventually(
            lambda: all(len(one.tokens) >= NUM_BEFORE_HOLD for one in asked), timeout_s=TIMEOUT_S
        )
        with stopped(shards[0]):
            await eventually(lambda: pool.joined == ["s1"], timeout_s=TIMEOUT_S)
            for one in asked:
                await asyncio.wait_for(one.task, TIMEOUT_S)
            # Its connection may well be open; nothing new goes there all the same.
            for _ in range(4):
                one = _Asked(pool, HELD)
                await asyncio.wait_for(one.task, TIMEOUT_S)
                assert not one.resubmissions
            assert pool.joined == ["s1"]
        resubmitted = [one for one in asked if one.resubmissions]
        assert resubmitted
        assert {each.reason for one in resubmitted for each in one.resubmissions} == {"hung"}
        assert all(one.tokens == list(range(NUM_TOKENS)) for one in asked)
        # Once it goes on it is told that nobody waits any more, and takes part again.
        await eventually(lambda: "aborted" in shards[0].endings, timeout_s=TIMEOUT_S)
        await eventually(lambda: "s0" in pool.joined, timeout_s=TIMEOUT_S)
        while "finished" not in shards[0].endings:
            await asyncio.gather(*(_Asked(pool, HELD + 1).task for _ in range(2)))


async def test_a_shard_that_is_alone_is_waited_for(shards: list[ShardProcess]) -> None:
    async with pool_of(shards[:1]) as pool:
        asked = _Asked(pool, HELD + 1)
        await eventually(lambda: len(asked.tokens) > 1, timeout_s=TIMEOUT_S)
        (member,) = pool._members.values()
        with stopped(shards[0]):
            bound_s = member.beats.bound_s
            await eventually(lambda: member.beats.silent_s > 2 * bound_s, timeout_s=TIMEOUT_S)
            assert member.beats.is_silent
            assert pool.joined == ["s0"]
        await asyncio.wait_for(asked.task, TIMEOUT_S)
        assert asked.tokens == list(range(NUM_TOKENS))
        assert not asked.resubmissions


class _Asked:
    """A request on its way, sent again where need be."""

    def __init__(self, pool: ShardPool, first_token: int) -> None:
        self._first_token = first_token
        self.tokens: list[int] = []
        self.resubmissions: list[Resubmission] = []
        self._shards = ResubmittingShards(pool, shard_wait_s=TIMEOUT_S)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        request = GenerateRequest(
            request_id="r",
            prompt_token_ids=(self._first_token, 2, 3),
            sampling=SamplingParams(max_tokens=NUM_TOKENS),
        )
        async for deltas in self._shards.generate(
            request, EmittedTokens(1), self.resubmissions.append
        ):
            self.tokens += [token for delta in deltas for token in delta.token_ids]
