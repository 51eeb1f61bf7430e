"""The console's event stream over a real server: pages that stay or go, and a server that drains
under them."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.core.asgi_server import AsgiServer
from services.core.memory_registry import MemoryRegistry
from services.core.settings import load_settings
from services.gateway.app import create_app
from tests.support.eventually import eventually
from tests.support.fake_shard import FakeShard, repeats
from tests.support.records import shard_record, worker_record
from tests.unit.gateway.tiny_models import train_byte_level, write_model_folder

DEADLINE_S = 30.0
LEASE_S = 1000.0
HOT = (1, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny", train_byte_level())


@asynccontextmanager
async def serving(
    folder: Path, registry: MemoryRegistry, **settings: Any
) -> AsyncIterator[tuple[AsgiServer, httpx.AsyncClient]]:
    app = create_app(
        load_settings(model="org/tiny", **settings),
        FakeShard(repeats([9])),
        registry,
        model_folder=folder,
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = AsgiServer(app, listener, drain_timeout_s=DEADLINE_S)
    await server.start()
    try:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{server.port}", timeout=DEADLINE_S
        ) as client:
            yield server, client
    finally:
        await server.stop(0.5)


async def views_of(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    event = ""
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            event = line.removeprefix("event: ")
        elif line.startswith("data: "):
            assert event == "fleet"
            yield json.loads(line.removeprefix("data: "))


async def heartbeat(registry: MemoryRegistry, beat: int, *, hot_tokens: int) -> None:
    """The leases of a shard and a worker as they are written each second."""
    load = {(layer, expert): 10 * beat for layer in range(2) for expert in range(4)}
    load[HOT] += hot_tokens
    slots = list(load)
    at = 1000.0 + beat
    await registry.publish(shard_record(expert_load=load, written_at=at), LEASE_S)
    await registry.publish(worker_record("a", slots, written_at=at), LEASE_S)


async def test_a_hot_expert_shows_with_the_next_lease(folder: Path) -> None:
    registry = MemoryRegistry()
    async with serving(folder, registry) as (_, client), asyncio.timeout(DEADLINE_S):
        for beat in range(1, 3):
            await heartbeat(registry, beat, hot_tokens=0)
        async with client.stream("GET", "/v1/experts/events") as response:
            views = views_of(response)
            while (await anext(views))["load"]["layers"][1]["replicas"] != [1, 1, 1, 1]:
                pass  # the first is what was known before anyone listened
            await heartbeat(registry, 3, hot_tokens=0)
            while (even := await anext(views))["load"]["layers"][1]["now"] is None:
                pass
            assert even["load"]["layers"][1]["imbalance_now"] == 1.0
            await heartbeat(registry, 4, hot_tokens=490)
            while (hot := await anext(views))["load"]["layers"][1]["imbalance_now"] == 1.0:
                pass
            leader = hot["load"]["hottest"][0]
            assert (leader["layer"], leader["expert"]) == HOT
            assert leader["tokens_per_second"] == 500.0


async def test_an_open_page_does_not_hold_up_a_drain(folder: Path) -> None:
    registry = MemoryRegistry()
    async with serving(folder, registry) as (server, client), asyncio.timeout(DEADLINE_S / 2):
        async with client.stream("GET", "/v1/experts/events") as response:
            views = views_of(response)
            await anext(views)
            stopping = asyncio.create_task(server.stop(10 * DEADLINE_S))
            async for _ in views:
                pass
        await stopping


async def test_a_page_that_goes_away_leaves_its_place(folder: Path) -> None:
    registry = MemoryRegistry()
    async with serving(folder, registry) as (_, client), asyncio.timeout(DEADLINE_S):
        for _ in range(3):
            async with client.stream("GET", "/v1/experts/events") as response:
                await anext(views_of(response))
        async with client.stream("GET", "/v1/experts/events") as response:
            await anext(views_of(response))

            async def only_one_listens() -> bool:
                counted = (await client.get("/metrics")).text
                return 'route="/v1/experts/events",status="200"} 3.0' in counted

            await eventually(only_one_listens, timeout_s=DEADLINE_S)
