"""How many sessions are stored, as the gateway counts what the shards' stores wrote."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from redis.asyncio import Redis

from services.core.session_count import RedisSessionCount, session_index_key
from services.core.store_server import StoreServer
from services.sessions.redis_store import RedisSessionStore
from services.sessions.store import SessionRef
from tests.support.redis_server import running_redis
from tests.support.session_blocks import LAYOUT, random_blocks

PATIENT_S = 30.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with running_redis(tmp_path_factory.mktemp("store")) as running:
        yield running


def session(name: str) -> SessionRef:
    return SessionRef(tenant="alice", session_id=name)


async def test_sessions_count_from_their_first_block_until_they_end(server: StoreServer) -> None:
    now, fleet = 1000.0, f"fleet-{secrets.token_hex(4)}"
    store = RedisSessionStore(
        server.url,
        fleet=fleet,
        layout=LAYOUT,
        round_trip_timeout_s=PATIENT_S,
        clock=lambda: now,
    )
    count = RedisSessionCount(server.url, fleet=fleet, timeout_s=PATIENT_S, clock=lambda: now)
    assert await count() == 0
    for name, ttl_s in (("short", 600.0), ("long", 3600.0), ("deleted", 3600.0)):
        await store.put(session(name), random_blocks(2), num_tokens=8, ttl_s=ttl_s)
    await store.put(session("long"), random_blocks(1), num_tokens=12, ttl_s=3600.0)
    assert await count() == 3
    await store.delete_session("alice", "deleted")
    assert await count() == 2
    now = 1601.0
    assert await count() == 1
    async with Redis.from_url(server.url) as client:
        index = session_index_key(fleet)
        assert await client.zcard(index) == 2, "who ended is counted no more, and still noted"
        await store.put(session("long"), random_blocks(1), num_tokens=16, ttl_s=3600.0)
        assert await client.zcard(index) == 1
        await client.delete(index)
        await client.set(index, "no index")
        assert await count() is None
        await store.put(session("long"), random_blocks(1), num_tokens=20, ttl_s=3600.0)
        assert await count() == 1
    await count.close()
    await store.close()


async def test_a_store_that_is_away_counts_nothing(server: StoreServer) -> None:
    count = RedisSessionCount("redis://127.0.0.1:1/0", fleet="none", timeout_s=PATIENT_S)
    assert await count() is None
    await count.close()
