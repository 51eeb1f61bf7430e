"""More is asked of a shard than it can do: an engine of known speed, gRPC, and a gateway."""

from __future__ import annotations

import asyncio
import statistics
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
from tests.support.eventually import eventually
from tests.support.fake_decoder import FakeDecoder, fake_engine
from tests.support.records import shard_record
from tests.unit.gateway.tiny_models import write_model_folder

STEP_S = 0.04
PROMPT_TOKENS = 20
BOUND_S = 1.0
BOUND_STEPS = round(BOUND_S / STEP_S)
"""Steps of 32 tokens and at least 40 ms: 800 prompt tokens, so 40 prompts, a second at best. Time
is counted in steps, of which a busy machine does fewer and not more."""


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
    """What clients got; steps of the engine from request to answer."""

    served: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    retry_after_s: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny", None)


@dataclass(kw_only=True)
class Gateway:
    """A client of it, and the steps of the engine behind it."""

    client: httpx.AsyncClient
    decoder: FakeDecoder

    @property
    def num_steps(self) -> int:
        return len(self.decoder.batches)

    async def steps(self, count: int) -> None:
        """Return after so many more."""
        goal = self.num_steps + count
        await eventually(lambda: self.num_steps >= goal)


@asynccontextmanager
async def _gateway(folder: Path, **options: Any) -> AsyncIterator[Gateway]:
    decoder = FakeDecoder(4, before=lambda *_: asyncio.sleep(STEP_S))
    engine = fake_engine(num_blocks=512, decoder=decoder, max_num_batched_tokens=32, **options)
    engine.start()
    server = ShardServer(EngineShard(engine), host="127.0.0.1")
    port = await asyncio.to_thread(server.start)
    registry = MemoryRegistry()
    await registry.publish(shard_record("a", endpoint=f"127.0.0.1:{port}"), 600)
    pool = ShardPool(registry, refresh_s=0.05)
    app = create_app(load_settings(model="org/tiny"), pool, registry, model_folder=folder)
    transport = httpx.ASGITransport(app)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            yield Gateway(client=client, decoder=decoder)
    finally:
        await pool.close()
        await server.stop()
        await engine.stop(1.0)


async def _ask(gateway: Gateway, answers: Answers, number: int, priority: int = 0) -> None:
    prompt = [(number * 7 + position) % 100 for position in range(PROMPT_TOKENS)]
    began = gateway.num_steps
    body = {"prompt": prompt, "max_tokens": 2, "ignore_eos": True, "priority": priority}
    response = await gateway.client.post("/v1/completions", json=body)
    num_steps = gateway.num_steps - began
    if response.status_code == 200:
        answers.served.append(num_steps)
        answers.order.append(priority)
    else:
        assert response.status_code == 429, response.text
        answers.refused.append(num_steps)
        answers.retry_after_s.append(int(response.headers["retry-after"]))


async def test_what_would_wait_too_long_is_refused_at_once_and_the_rest_is_served_in_time(
    folder: Path,
) -> None:
    """Every step brings 160 tokens of which it can take 32; without a bound, the last ones would
    wait for 100 steps more than those came in."""
    answers = Answers()
    async with _gateway(folder, max_ttft_s=BOUND_S) as gateway:
        async with asyncio.TaskGroup() as group:
            for wave in range(25):
                for number in range(8):
                    group.create_task(_ask(gateway, answers, wave * 8 + number))
                await gateway.steps(1)
        again = Answers()
        await _ask(gateway, again, 7)
    assert len(answers.served) + len(answers.refused) == 200
    assert len(answers.served) > 20, "it goes on serving"
    assert len(answers.refused) > 40
    assert set(answers.retry_after_s) <= set(range(1, 10))
    assert statistics.median(answers.refused) < BOUND_STEPS / 2
    assert max(answers.served) < 2 * BOUND_STEPS
    assert len(again.served) == 1, "the overload is over"


async def test_urgent_requests_are_served_before_those_that_came_earlier(folder: Path) -> None:
    answers = Answers()
    async with _gateway(folder, max_num_seqs=4) as gateway, asyncio.TaskGroup() as group:
        for number in range(60):
            group.create_task(_ask(gateway, answers, number, priority=1))
        await gateway.steps(5)
        for number in range(60, 70):
            group.create_task(_ask(gateway, answers, number, priority=-1))
    assert len(answers.order) == 70
    assert answers.order[-20:] == [1] * 20, "the urgent ones were done long before"
