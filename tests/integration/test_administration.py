"""The gateway's administration over real workers: their replicas, and their end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.core.placement import WorkerSlots
from services.core.registry import WorkerRecord
from services.core.settings import load_settings
from services.core.static_registry import StaticRegistry
from services.gateway.app import create_app
from tests.support.checkpoints import make_checkpoint
from tests.support.eventually import eventually
from tests.support.fake_shard import FakeShard, repeats
from tests.support.fleet import running_workers

TIMEOUT_S = 60.0
LAYERS = range(2)
PLACEMENT = [
    WorkerSlots(experts=(0, 1), layers=LAYERS),
    WorkerSlots(experts=(2, 3), layers=LAYERS),
]
SLOT = (1, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@asynccontextmanager
async def administered(
    model: Path,
) -> AsyncIterator[tuple[httpx.AsyncClient, StaticRegistry]]:
    async with running_workers(model, PLACEMENT) as endpoints:
        registry = StaticRegistry(endpoints, timeout_s=TIMEOUT_S)
        app = create_app(
            load_settings(model=str(model), admin_key="root"),
            FakeShard(repeats([9])),
            registry,
            model_folder=model,
        )
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://gateway",
            headers={"authorization": "Bearer root"},
        ) as client:
            yield client, registry
        await registry.close()


async def scale(client: httpx.AsyncClient, replicas: int, **body: Any) -> httpx.Response:
    path = f"/admin/experts/{SLOT[0]}/{SLOT[1]}/replicas"
    return await client.post(path, json={"replicas": replicas, **body})


async def holders(registry: StaticRegistry) -> list[str]:
    workers = (await registry.snapshot()).workers
    return [worker.worker_id for worker in workers if SLOT in worker.slots]


async def worker(registry: StaticRegistry, worker_id: str) -> WorkerRecord | None:
    found = [w for w in (await registry.snapshot()).workers if w.worker_id == worker_id]
    return found[0] if found else None


async def test_an_expert_gets_a_replica_and_gives_it_up_and_a_worker_is_drained(
    model: Path,
) -> None:
    async with administered(model) as (client, registry):
        assert await holders(registry) == ["worker-1"]
        loaded = await scale(client, 2)
        assert (loaded.status_code, loaded.json()["replicas"]) == (200, 2), loaded.text
        assert await holders(registry) == ["worker-0", "worker-1"]
        told = {each["worker_id"]: each for each in loaded.json()["workers"]}
        assert (told["worker-0"]["action"], told["worker-1"]["action"]) == ("load", None)
        held = await worker(registry, "worker-0")
        assert held is not None
        assert told["worker-0"]["slots"] == [list(slot) for slot in sorted(held.slots)]
        view = (await client.get("/v1/experts/view")).json()
        assert view["load"]["layers"][SLOT[0]]["replicas"][SLOT[1]] == 2

        refused = await scale(client, 3)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "worker_refused")
        given_up = await scale(client, 1, worker_id="worker-1")
        assert given_up.status_code == 200, given_up.text
        assert await holders(registry) == ["worker-0"]

        drained = await client.post("/admin/workers/worker-1/drain")
        assert drained.status_code == 200, drained.text
        assert drained.json()["unserved"] == [[0, 2], [0, 3], [1, 3]]

        async def is_leaving() -> bool:
            left = await worker(registry, "worker-1")
            return left is None or left.state == "draining"

        await eventually(is_leaving, timeout_s=TIMEOUT_S)
