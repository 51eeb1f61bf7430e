"""Gateways find shards by their leases and send them requests over real gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from router_service.shard_server import ShardServer
from services.core.errors import (
    DrainingError,
    ExpertUnavailableError,
    OverloadedError,
    ShardLostError,
    UnavailableError,
)
from services.core.generation import (
    GenerateRequest,
    SamplingParams,
    SessionInfo,
    TokenLogprob,
)
from services.core.memory_registry import MemoryRegistry
from services.gateway.shard_pool import ShardPool
from tests.support.eventually import eventually
from tests.support.fake_shard import FakeShard, Script, Step, repeats, says
from tests.support.records import shard_record

TOKENS = (5, 6, 7)


@dataclass(slots=True)
class Fleet:
    registry: MemoryRegistry
    shards: dict[str, FakeShard]
    servers: dict[str, ShardServer]
    pool: ShardPool

    async def add(self, shard_id: str, script: Script | None = None) -> FakeShard:
        shard = self.shards[shard_id] = FakeShard(script or repeats(TOKENS))
        server = self.servers[shard_id] = ShardServer(shard, host="127.0.0.1")
        port = await asyncio.to_thread(server.start)
        record = shard_record(
            shard_id, endpoint=f"127.0.0.1:{port}", num_running=0, waiting_tokens=0
        )
        await self.registry.publish(record, 60)
        return shard

    async def lose(self, shard_id: str) -> None:
        await self.servers.pop(shard_id).stop()

    async def has_joined(self, count: int) -> None:
        await eventually(lambda: len(self.pool.joined) == count)


@asynccontextmanager
async def running_fleet() -> AsyncIterator[Fleet]:
    registry = MemoryRegistry()
    fleet = Fleet(registry, {}, {}, ShardPool(registry, refresh_s=0.02))
    try:
        yield fleet
    finally:
        await fleet.pool.close()
        for server in fleet.servers.values():
            await server.stop()


async def test_everything_a_request_says_reaches_the_shard_and_comes_back_as_it_was() -> None:
    logprobs = [
        TokenLogprob(token_id=token, logprob=-0.1, top=((token, -0.1),)) for token in TOKENS
    ]
    sampling = SamplingParams(
        max_tokens=9,
        min_tokens=1,
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        seed=-3,
        stop_token_ids=(2, 3),
        ignore_eos=True,
        logit_bias={7: -2.5},
        logprobs=1,
    )
    request = GenerateRequest(
        request_id="r",
        prompt_token_ids=(1, 2, 3),
        sampling=sampling,
        tenant="t",
        session_id="s",
        session_ttl_s=12.5,
        trace_context={"traceparent": "00-1"},
        priority=-3,
    )
    wanted = says(TOKENS, stop_token_id=9, num_cached_tokens=16, logprobs=logprobs)
    async with running_fleet() as fleet:
        shard = await fleet.add("a", lambda _: wanted)
        deltas = [delta async for step in fleet.pool.generate(request) for delta in step]
    assert deltas == [delta for step in wanted for delta in step]
    sent = dataclasses.replace(sampling, seed=-3 % 2**64)
    assert shard.requests == [dataclasses.replace(request, sampling=sent)]


@pytest.mark.parametrize(
    "error",
    [
        OverloadedError("full", retry_after_s=3.5),
        ExpertUnavailableError("no expert 3", layer=1, expert=3, experts=[3]),
        ShardLostError("handed back", reason="drained"),
    ],
)
async def test_an_error_arrives_with_its_class_message_and_details(error: UnavailableError) -> None:
    async with running_fleet() as fleet:
        await fleet.add("a", _then([*says(TOKENS)[:2], error]))
        tokens: list[int] = []
        with pytest.raises(type(error)) as raised:
            async for step in fleet.pool.generate(_request()):
                tokens += [token for delta in step for token in delta.token_ids]
    assert tokens == [5, 6]
    assert type(raised.value) is type(error)
    assert raised.value.message == error.message
    assert raised.value.details == error.details


async def test_a_shard_that_goes_away_loses_its_streams_and_nothing_else() -> None:
    never = asyncio.Event()
    async with running_fleet() as fleet:
        await fleet.add("a", _then([*says(TOKENS)[:1], never]))
        stream = fleet.pool.generate(_request())
        assert (await anext(stream))[0].token_ids == (5,)
        await fleet.lose("a")
        with pytest.raises(ShardLostError) as raised:
            await anext(stream)
        assert raised.value.reason == "died"
        await fleet.add("b")
        await fleet.has_joined(1)
        assert await _tokens(fleet.pool, _request()) == list(TOKENS)


async def test_closing_a_stream_aborts_its_request_on_the_shard() -> None:
    never = asyncio.Event()
    async with running_fleet() as fleet:
        shard = await fleet.add("a", _then([*says(TOKENS)[:1], never]))
        stream = fleet.pool.generate(_request())
        await anext(stream)
        await stream.aclose()
        await eventually(lambda: shard.num_aborted == 1)


async def test_a_session_keeps_to_its_shard_and_few_move_when_one_comes() -> None:
    async with running_fleet() as fleet:
        for name in "abc":
            await fleet.add(name)
        homes = await _homes(fleet, 3)
        assert set(homes.values()) == set("abc")
        assert await _homes(fleet, 3) == homes
        await fleet.add("d")
        moved = [key for key, home in (await _homes(fleet, 4)).items() if home != homes[key]]
        assert 0 < len(moved) < 24
        homes = await _homes(fleet, 4)
        assert {homes[key] for key in moved} == {"d"}


async def test_a_prefix_goes_where_it_is_cached_and_other_work_where_there_is_least() -> None:
    never = asyncio.Event()
    prefix = tuple(range(640))
    async with running_fleet() as fleet:
        for name in "ab":
            await fleet.add(name, _then([*says(TOKENS)[:1], never]))
        streams = [fleet.pool.generate(_request(prompt=prefix))]
        await anext(streams[0])
        first = _shard_that_has(fleet, 1)
        for number in range(3):
            streams.append(fleet.pool.generate(_request(prompt=(*prefix, number))))
            await anext(streams[-1])
        assert _shard_that_has(fleet, 4) == first
        streams.append(fleet.pool.generate(_request(prompt=(9, 9))))
        await anext(streams[-1])
        assert _shard_that_has(fleet, 1) != first
        for stream in streams:
            await stream.aclose()


async def test_a_draining_shard_is_passed_over_and_its_refusal_names_no_fault() -> None:
    async with running_fleet() as fleet:
        await fleet.add("a", _then([DrainingError("going")]))
        with pytest.raises(ShardLostError) as raised:
            await _tokens(fleet.pool, _request())
        assert raised.value.reason == "drained"
        await fleet.add("b")
        await fleet.has_joined(1)
        for _ in range(4):
            assert await _tokens(fleet.pool, _request()) == list(TOKENS)


async def test_a_shard_whose_lease_was_lost_is_kept_as_long_as_it_answers() -> None:
    async with running_fleet() as fleet:
        await fleet.add("a")
        await fleet.pool.check_ready()
        await fleet.registry.remove("a")
        await fleet.add("b")
        await fleet.has_joined(2)
        await fleet.lose("a")
        await fleet.has_joined(1)
        assert fleet.pool.joined == ["b"]
        assert await _tokens(fleet.pool, _request()) == list(TOKENS)


async def test_sessions_and_readiness_are_asked_of_a_shard() -> None:
    info = SessionInfo(
        session_id="s",
        tenant="t",
        num_tokens=32,
        num_blocks=2,
        stored_bytes=64,
        created_at=1.5,
        updated_at=2.5,
        expires_at=3.5,
    )
    async with running_fleet() as fleet:
        with pytest.raises(UnavailableError, match="no attention shard"):
            await fleet.pool.check_ready()
        shard = await fleet.add("a")
        await fleet.has_joined(1)
        await fleet.pool.check_ready()
        shard.not_ready = UnavailableError("expert 3 is missing")
        with pytest.raises(UnavailableError, match="expert 3 is missing"):
            await fleet.pool.check_ready()
        shard.sessions["t", "s"] = info
        assert await fleet.pool.get_session("t", "s") == info
        assert await fleet.pool.delete_session("t", "s")
        assert not await fleet.pool.delete_session("t", "s")
        assert await fleet.pool.get_session("t", "s") is None


def _shard_that_has(fleet: Fleet, num_requests: int) -> str:
    (name,) = [name for name, shard in fleet.shards.items() if len(shard.requests) == num_requests]
    return name


async def _homes(fleet: Fleet, num_shards: int) -> dict[str, str]:
    await fleet.pool.check_ready()
    await fleet.has_joined(num_shards)
    homes = {}
    for number in range(24):
        session = f"session-{number}"
        await _tokens(fleet.pool, _request(session_id=session))
        (homes[session],) = [
            name
            for name, shard in fleet.shards.items()
            if shard.requests and shard.requests[-1].session_id == session
        ]
        for shard in fleet.shards.values():
            shard.requests.clear()
    return homes


async def _tokens(pool: ShardPool, request: GenerateRequest) -> list[int]:
    return [
        token
        async for step in pool.generate(request)
        for delta in step
        for token in delta.token_ids
    ]


def _request(prompt: Sequence[int] = (1, 2, 3), session_id: str | None = None) -> GenerateRequest:
    return GenerateRequest(
        request_id="r",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=16),
        session_id=session_id,
    )


def _then(steps: Sequence[Step]) -> Callable[[GenerateRequest], Sequence[Step]]:
    return lambda _: steps
