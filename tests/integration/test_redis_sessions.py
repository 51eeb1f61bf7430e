from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis

from services.core.errors import ConfigurationError, UnavailableError
from services.core.store_server import StoreServer, start_server
from services.sessions.redis_store import RedisSessionStore
from services.sessions.store import SessionRef
from tests.support.eventually import eventually
from tests.support.redis_server import running_redis
from tests.support.session_blocks import (
    ALICE,
    LAYOUT,
    OTHER_MODEL,
    as_bytes,
    hashes_of,
    payloads_of,
    random_blocks,
)
from tests.support.session_contract import SessionStoreContract, StoreHarness

PATIENT_S = 30.0
"""Of stores whose server is there: how slow the machine is must not matter."""
HANG_S = 0.5
"""Of a server that hangs: 50 calls would take 25 s if each waited."""

_fleets = (f"fleet-{number}" for number in itertools.count())


@pytest.fixture(scope="module", params=["tcp", "unix"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StoreServer]:
    folder = tmp_path_factory.mktemp("store")
    with running_redis(folder, unix_socket=request.param == "unix") as started:
        yield started


class RedisHarness:
    def __init__(self, url: str) -> None:
        self.fleet = next(_fleets)
        self.store = RedisSessionStore(
            url, fleet=self.fleet, layout=LAYOUT, round_trip_timeout_s=PATIENT_S
        )
        self.client = Redis.from_url(url)

    def key(self, block_hash: bytes, kind: str = "kv") -> str:
        return f"expertfleet:{self.fleet}:{kind}:00010203:{block_hash.hex()}"

    async def read(self, block_hash: bytes) -> bytes | None:
        value = await self.client.get(self.key(block_hash))
        assert not isinstance(value, str)
        return value

    async def write(self, block_hash: bytes, value: bytes) -> None:
        await self.client.set(self.key(block_hash), value, keepttl=True)

    async def write_checkpoint(self, block_hash: bytes, value: bytes) -> None:
        await self.client.set(self.key(block_hash, "ckpt"), value, keepttl=True)

    async def close(self) -> None:
        await self.store.close()
        await self.client.aclose()


@pytest.fixture
async def redis_harness(server: StoreServer) -> AsyncIterator[RedisHarness]:
    harness = RedisHarness(server.url)
    yield harness
    await harness.close()


class TestRedisSessionStore(SessionStoreContract):
    @pytest.fixture
    async def harness(self, redis_harness: RedisHarness) -> AsyncIterator[StoreHarness]:
        yield redis_harness


async def test_every_key_is_of_the_fleet_and_has_a_time_to_live(
    redis_harness: RedisHarness,
) -> None:
    harness = redis_harness
    blocks = random_blocks(3)
    await harness.store.put(ALICE, blocks, num_tokens=12, ttl_s=60)
    await harness.store.put_checkpoint(blocks[1:], ttl_s=60)
    await harness.write(blocks[2].hash, b"torn")
    await harness.store.fetch(hashes_of(blocks))
    keys = await harness.client.keys(f"expertfleet:{harness.fleet}:*")
    assert len(keys) == 3 + 2 + 2 + 1, "blocks, checkpoints, the session, its index and all's"
    for key in keys:
        assert 55_000 < await harness.client.pttl(key) <= 60_000


async def test_shards_of_a_fleet_share_and_fleets_do_not(server: StoreServer) -> None:
    one = RedisSessionStore(
        server.url, fleet="shared", layout=LAYOUT, round_trip_timeout_s=PATIENT_S
    )
    same = RedisSessionStore(
        server.url, fleet="shared", layout=LAYOUT, round_trip_timeout_s=PATIENT_S
    )
    other = RedisSessionStore(
        server.url, fleet="other", layout=LAYOUT, round_trip_timeout_s=PATIENT_S
    )
    blocks = random_blocks(2)
    await one.put(ALICE, blocks, num_tokens=8, ttl_s=60)
    assert as_bytes(await same.fetch(hashes_of(blocks))) == payloads_of(blocks)
    assert (await other.count_prefix(hashes_of(blocks))).num_restorable == 0
    assert await other.get_session("alice", "s1") is None
    for store in (one, same, other):
        await store.close()


async def test_a_model_whose_fingerprint_begins_alike_refuses_the_others_blocks(
    server: StoreServer,
) -> None:
    fleet = next(_fleets)
    one = RedisSessionStore(server.url, fleet=fleet, layout=LAYOUT, round_trip_timeout_s=PATIENT_S)
    other = RedisSessionStore(
        server.url, fleet=fleet, layout=OTHER_MODEL, round_trip_timeout_s=PATIENT_S
    )
    blocks = random_blocks(2)
    await one.put(ALICE, blocks, num_tokens=8, ttl_s=60)
    assert await other.fetch(hashes_of(blocks)) == [None, None]
    assert other.refusals() == {"foreign": 1}
    await one.close()
    await other.close()


async def test_a_key_that_holds_another_type_is_refused(redis_harness: RedisHarness) -> None:
    harness = redis_harness
    first, second = random_blocks(2)
    await harness.store.put(ALICE, [first], num_tokens=8, ttl_s=60)
    await harness.client.rpush(harness.key(second.hash), "no", "block")
    found = await harness.store.fetch([first.hash, second.hash])
    assert as_bytes(found) == [first.payload, None]
    assert harness.store.refusals() == {"foreign": 1}
    assert not await harness.client.exists(harness.key(second.hash))


@pytest.mark.parametrize("damage", [b"soon", b"nan", b"\xff\x00"])
async def test_a_session_whose_index_holds_no_numbers_is_unknown_and_its_blocks_live_on(
    redis_harness: RedisHarness, damage: bytes
) -> None:
    harness = redis_harness
    blocks = random_blocks(2)
    await harness.store.put(ALICE, blocks, num_tokens=8, ttl_s=60)
    (key,) = [key async for key in harness.client.scan_iter(f"*:{harness.fleet}:session:*[0-9a-f]")]
    for field in ("blocks_live_until", "num_tokens", "created_at", "updated_at", "expires_at"):
        await harness.client.hset(key, field, damage)
    assert await harness.store.get_session(ALICE.tenant, ALICE.session_id) is None
    await harness.store.put(ALICE, blocks, num_tokens=8, ttl_s=60)
    live_until = await harness.client.hget(key, "blocks_live_until")
    assert live_until is not None
    assert float(live_until) > time.time()
    assert as_bytes(await harness.store.fetch(hashes_of(blocks))) == payloads_of(blocks)


@pytest.mark.parametrize("kind", ["kv", "ckpt"])
async def test_a_key_of_another_type_gives_way_to_the_sound_one(
    redis_harness: RedisHarness, kind: str
) -> None:
    harness = redis_harness
    (block,) = random_blocks(1)
    key = harness.key(block.hash, kind)
    await harness.store.put(ALICE, [block], num_tokens=4, ttl_s=60)
    await harness.store.put_checkpoint([block], ttl_s=60)
    await harness.client.delete(key)
    await harness.client.rpush(key, "no", "block")
    assert as_bytes(await harness.store.fetch([block.hash])) == [block.payload]
    if kind == "kv":
        assert await harness.client.type(key) == b"string"
        assert 0 < await harness.client.pttl(key) <= 60_000


@pytest.mark.parametrize("suffix", ["", ":blocks"])
async def test_garbage_over_a_sessions_index_gives_way_to_the_next_write(
    redis_harness: RedisHarness, suffix: str
) -> None:
    harness = redis_harness
    first, second = random_blocks(2)
    await harness.store.put(ALICE, [first], num_tokens=4, ttl_s=60)
    pattern = f"expertfleet:{harness.fleet}:session:*"
    (index,) = await harness.client.keys(pattern + ":blocks")
    assert isinstance(index, bytes)
    key = index.decode().removesuffix(":blocks") + suffix
    await harness.client.delete(key)
    await harness.client.rpush(key, "no", "session")
    await harness.store.put(ALICE, [second], num_tokens=8, ttl_s=60)
    info = await harness.store.get_session("alice", "s1")
    assert info is not None
    assert (info.num_tokens, info.num_blocks) == (8, 1)
    assert as_bytes(await harness.store.fetch([second.hash])) == [second.payload]
    for found in await harness.client.keys(pattern):
        assert 0 < await harness.client.pttl(found) <= 60_000


async def test_blocks_of_real_size_come_back_in_many_batches(server: StoreServer) -> None:
    layout = replace(LAYOUT, num_layers=16, block_size=16, num_kv_heads=8, head_dim=128)
    assert layout.payload_bytes == 1 << 20
    store = RedisSessionStore(
        server.url, fleet=next(_fleets), layout=layout, round_trip_timeout_s=PATIENT_S
    )
    blocks = random_blocks(20, layout)
    await store.put(ALICE, blocks, num_tokens=320, ttl_s=60)
    assert as_bytes(await store.fetch(hashes_of(blocks))) == payloads_of(blocks)
    await store.delete_session("alice", "s1")
    await store.close()


async def test_a_full_server_drops_blocks_and_goes_on(tmp_path: Path) -> None:
    layout = replace(LAYOUT, num_layers=16, block_size=16, num_kv_heads=8, head_dim=128)
    with running_redis(tmp_path, maxmemory_bytes=24 << 20) as server:
        store = RedisSessionStore(
            server.url, fleet="full", layout=layout, round_trip_timeout_s=PATIENT_S
        )
        blocks = random_blocks(40, layout)
        for number, block in enumerate(blocks):
            session = SessionRef(tenant="t", session_id=str(number))
            await store.put(session, [block], num_tokens=16, ttl_s=60)
        found = [(await store.fetch([block.hash]))[0] for block in blocks]
        kept = [number for number, payload in enumerate(found) if payload is not None]
        assert 5 < len(kept) < 25
        assert all(found[number] == blocks[number].payload for number in kept)
        assert store.refusals() == {}
        await store.close()


async def test_a_server_that_refuses_writes_still_serves_reads(tmp_path: Path) -> None:
    with running_redis(tmp_path) as server:
        store = RedisSessionStore(
            server.url, fleet="noeviction", layout=LAYOUT, round_trip_timeout_s=PATIENT_S
        )
        blocks = random_blocks(2)
        await store.put(ALICE, blocks, num_tokens=8, ttl_s=60)
        async with Redis.from_url(server.url) as client:
            await client.config_set("maxmemory-policy", "noeviction")
            await client.config_set("maxmemory", "1mb")
        for _ in range(4):
            with pytest.raises(UnavailableError, match="maxmemory"):
                await store.put(ALICE, random_blocks(1), num_tokens=12, ttl_s=60)
        assert as_bytes(await store.fetch(hashes_of(blocks))) == payloads_of(blocks)
        await store.close()


async def test_a_server_that_died_costs_little_and_is_used_again_when_it_is_back(
    tmp_path: Path,
) -> None:
    first = start_server(tmp_path, port=0)
    store = RedisSessionStore(
        first.url, fleet="dead", layout=LAYOUT, round_trip_timeout_s=PATIENT_S
    )
    blocks = random_blocks(2)
    await store.put(ALICE, blocks, num_tokens=8, ttl_s=60)
    first.process.kill()
    first.stop()
    assert await unavailable_s(store, calls=50) < 10.0
    second = start_server(tmp_path, port=first.port)
    try:
        await eventually(lambda: is_answering(store))
        await store.put(ALICE, blocks, num_tokens=8, ttl_s=60)
        assert as_bytes(await store.fetch(hashes_of(blocks))) == payloads_of(blocks)
    finally:
        await store.close()
        second.stop()


async def test_a_server_that_was_restarted_meanwhile_is_not_noticed(tmp_path: Path) -> None:
    first = start_server(tmp_path, port=0)
    store = RedisSessionStore(
        first.url, fleet="restart", layout=LAYOUT, round_trip_timeout_s=PATIENT_S
    )
    blocks = random_blocks(2)
    await asyncio.gather(*(store.put(ALICE, blocks, num_tokens=8, ttl_s=60) for _ in range(4)))
    first.stop()
    second = start_server(tmp_path, port=first.port)
    try:
        for _ in range(4):
            assert (await store.count_prefix(hashes_of(blocks))).num_restorable == 0
    finally:
        await store.close()
        second.stop()


async def test_a_server_that_hangs_costs_little_and_is_used_again_when_it_answers(
    tmp_path: Path,
) -> None:
    with running_redis(tmp_path) as server:
        patient = RedisSessionStore(
            server.url, fleet="hang", layout=LAYOUT, round_trip_timeout_s=PATIENT_S
        )
        store = RedisSessionStore(
            server.url, fleet="hang", layout=LAYOUT, round_trip_timeout_s=HANG_S
        )
        blocks = random_blocks(2)
        await patient.put(ALICE, blocks, num_tokens=8, ttl_s=60)
        await eventually(lambda: is_answering(store))
        server.process.send_signal(signal.SIGSTOP)
        try:
            assert await unavailable_s(store, calls=50) < 10.0
        finally:
            server.process.send_signal(signal.SIGCONT)
        await eventually(lambda: is_answering(store))
        assert as_bytes(await patient.fetch(hashes_of(blocks))) == payloads_of(blocks)
        await patient.close()
        await store.close()


async def test_an_address_that_swallows_connections_costs_little() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        url = f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
        store = RedisSessionStore(url, fleet="f", layout=LAYOUT, round_trip_timeout_s=HANG_S)
        assert await unavailable_s(store, calls=50) < 10.0
        await store.close()


async def test_a_server_that_speaks_no_redis_is_unavailable() -> None:
    async def speak_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(speak_http, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    store = RedisSessionStore(url, fleet="f", layout=LAYOUT)
    with pytest.raises(UnavailableError, match="REDIS_URL"):
        await store.fetch([os.urandom(16)])
    await store.close()
    server.close()


def test_a_url_of_another_kind_is_refused_at_start() -> None:
    with pytest.raises(ConfigurationError, match="REDIS_URL"):
        RedisSessionStore("http://localhost:6379", fleet="f", layout=LAYOUT)


async def test_a_wrong_password_is_unavailable(tmp_path: Path) -> None:
    with running_redis(tmp_path) as server:
        async with Redis.from_url(server.url) as client:
            await client.config_set("requirepass", "secret")
        store = RedisSessionStore(
            server.url, fleet="f", layout=LAYOUT, round_trip_timeout_s=PATIENT_S
        )
        with pytest.raises(UnavailableError, match=r"(?i)auth"):
            await store.fetch([os.urandom(16)])
        await store.close()


async def test_a_failure_half_way_keeps_the_prefix_that_was_fetched(tmp_path: Path) -> None:
    layout = replace(LAYOUT, num_layers=16, block_size=16, num_kv_heads=8, head_dim=128)
    with running_redis(tmp_path) as server:
        store = RedisSessionStore(
            server.url, fleet="half", layout=layout, round_trip_timeout_s=PATIENT_S
        )
        blocks = random_blocks(12, layout)
        await store.put(ALICE, blocks, num_tokens=192, ttl_s=60)
        run, calls = store._redis.run, itertools.count()

        async def killing(*args: object, **kwargs: object) -> list[object]:
            if next(calls) == 1:
                server.process.kill()
                server.process.wait()
            return await run(*args, **kwargs)  # type: ignore[arg-type]

        store._redis.run = killing  # type: ignore[method-assign]
        found = as_bytes(await store.fetch(hashes_of(blocks)))
        count = found.index(None)
        assert 0 < count < 12
        assert found == [*payloads_of(blocks[:count]), *[None] * (12 - count)]
        await store.close()


async def test_a_cancelled_fetch_leaves_no_answer_behind_for_the_next(server: StoreServer) -> None:
    layout = replace(LAYOUT, num_layers=16, block_size=16, num_kv_heads=8, head_dim=128)
    store = RedisSessionStore(
        server.url, fleet=next(_fleets), layout=layout, round_trip_timeout_s=PATIENT_S
    )
    blocks = random_blocks(8, layout)
    await store.put(ALICE, blocks, num_tokens=128, ttl_s=60)
    for turns in range(30):
        fetching = asyncio.create_task(store.fetch(hashes_of(blocks[:4])))
        for _ in range(turns):
            await asyncio.sleep(0)
        fetching.cancel()
        await asyncio.gather(fetching, return_exceptions=True)
        (payload,) = await store.fetch([blocks[4 + turns % 4].hash])
        assert payload == blocks[4 + turns % 4].payload
    assert store.refusals() == {}
    await store.close()


async def unavailable_s(store: RedisSessionStore, *, calls: int) -> float:
    """How long `calls` calls took in all, every one of which must fail clearly."""
    started = time.monotonic()
    for _ in range(calls):
        with pytest.raises(UnavailableError, match="REDIS_URL"):
            await store.fetch([os.urandom(16)])
    return time.monotonic() - started


async def is_answering(store: RedisSessionStore) -> bool:
    try:
        await store.count_prefix([os.urandom(16)])
    except UnavailableError:
        return False
    return True
