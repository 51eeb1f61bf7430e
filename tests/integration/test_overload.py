"""More is asked of a shard than it can do: an engine of known speed, gRPC, and a gateway."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from router_service.engine.engine import Engine
from router_service.shard_server import ShardServer
from services.core.generation import GenerateRequest, SessionInfo
from services.core.memory_registry import MemoryRegistry
from services.core.settings import load_settings
from services.gateway.app import create_app
from services.gateway.shard_pool import ShardPool
from tests.support.fake_decoder import FakeDecoder, fake_engine
from tests.support.records import shard_record
from tests.unit.gateway.tiny_models import write_model_folder

STEP_S = 0.04
PROMPT_TOKENS = 20
BOUND_S = 1.0
"""Steps of 32 tokens every 40 ms: 800 prompt tokens, so 40 prompts, a second at best."""


class EngineShard:
    """An engine as a shard without sessions."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def generate(self, request: GenerateRequest) -> AsyncIterator[Any]:
        return self._engine.generate(request)

    async def get_session(self, tenant: str, session_id: str) -> SessionInfo | None:
        return None

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        return False

    async def check_ready(self) -> None:
        self._engine.check_ready()


@dataclass(slots=True)
class Answers:
    """What clients got; seconds from request to answer of those that were served."""

    served_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    retry_after_s: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny", None)


@asynccontextmanager
async def _gateway(folder: Path, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    decoder = FakeDecoder(4, before=lambda *_: asyncio.sleep(STEP_S))
    engine = fake_engine(num_blocks=512, decoder=decoder, max_num_batched_tokens=32, **options)
    engine.start()
    server = ShardServer(EngineShard(engine), host="127.0.0.1")
    port = await asyncio.to_thread(server.start)
    registry = MemoryRegistry()
    await registry.publish(shard_record("a", endpoint=f"127.0.0.1:{port}"), 60)
    pool = ShardPool(registry, refresh_s=0.05)
    app = create_app(load_settings(model="org/tiny"), pool, registry, model_folder=folder)
    transport = httpx.ASGITransport(app)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            yield client
    finally:
        await pool.close()
        await server.stop()
        await engine.stop(1.0)


async def _ask(client: httpx.AsyncClient, answers: Answers, number: int, priority: int = 0) -> None:
    prompt = [(number * 7 + position) % 100 for position in range(PROMPT_TOKENS)]
    began = time.perf_counter()
    body = {"prompt": prompt, "max_tokens": 2, "ignore_eos": True, "priority": priority}
    response = await client.post("/v1/completions", json=body)
    elapsed_s = time.perf_counter() - began
    if response.status_code == 200:
        answers.served_s.append(elapsed_s)
        answers.order.append(priority)
    else:
        assert response.status_code == 429, response.text
        answers.refused_s.append(elapsed_s)
        answers.retry_after_s.append(int(response.headers["retry-after"]))


async def test_what_would_wait_too_long_is_refused_at_once_and_the_rest_is_served_in_time(
    folder: Path,
) -> None:
    answers = Answers()
    async with _gateway(folder, max_ttft_s=BOUND_S) as client:
        async with asyncio.TaskGroup() as group:
            for wave in range(25):
                for number in range(8):
                    group.create_task(_ask(client, answers, wave * 8 + number))
                await asyncio.sleep(0.05)
        again = Answers()
        await _ask(client, again, 7)
    assert len(answers.served_s) + len(answers.refused_s) == 200
    assert len(answers.served_s) > 20, "it goes on serving"
    assert len(answers.refused_s) > 40
    assert set(answers.retry_after_s) <= set(range(1, 10))
    assert statistics.median(answers.refused_s) < BOUND_S / 2
    assert max(answers.served_s) < 4 * BOUND_S
    assert len(again.served_s) == 1, "the overload is over"


async def test_urgent_requests_are_served_before_those_that_came_earlier(folder: Path) -> None:
    answers = Answers()
    async with _gateway(folder, max_num_seqs=4) as client, asyncio.TaskGroup() as group:
        for number in range(60):
            group.create_task(_ask(client, answers, number, priority=1))
        await asyncio.sleep(5 * STEP_S)
        for number in range(60, 70):
            group.create_task(_ask(client, answers, number, priority=-1))
    assert len(answers.order) == 70
    assert answers.order[-20:] == [1] * 20, "the urgent ones were done long before"
