"""The experts that answers tell of are those of transformers' own gates, on a fresh random model.

Through chunked prefill, micro-batches and evictions, over every transport to the experts; and
through the gateway, whose shard is lost again and again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from router_service.engine.engine import Engine
from router_service.shard_server import ShardServer
from services.core.errors import ShardLostError
from services.core.generation import GenerateRequest, GenerationDelta, SamplingParams
from services.core.kernels.library import native_library
from services.core.memory_registry import MemoryRegistry
from services.core.placement import plan_placement
from services.core.settings import DispatchTransportName, load_settings
from services.gateway.app import create_app
from services.gateway.shard_pool import ShardPool
from tests.support.checkpoints import fresh_seed, load_oracle, make_checkpoint
from tests.support.engine_shard import EngineShard
from tests.support.eventually import eventually
from tests.support.fake_shard import FakeShard
from tests.support.fleet import running_engine, running_workers
from tests.support.records import shard_record
from tests.support.separated import ROUTER_MARGIN, separated_prompts

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2
PROMPT_LENGTHS = (61, 3, 33, 1, 17)
NEW_TOKENS = 14
NUM_BLOCKS = 36
"""Of 4 tokens: the sequences are 185 tokens in the end."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Prompts, transformers' continuations, and per sequence its gates' favourites [t, layers, k]
    and where their order is beyond doubt [t, layers]."""

    folder: Path
    seed: int
    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    choices: Sequence[NDArray[np.int64]]
    is_ordered: Sequence[NDArray[np.bool_]]

    def check(self, number: int, told: NDArray[Any]) -> None:
        """`told` [t, layers, k] of sequence `number`: the same sets, in the same order where two
        correct programs cannot round to another one."""
        expected, is_ordered = self.choices[number], self.is_ordered[number]
        assert told.shape == expected.shape, f"seed {self.seed}"
        assert (np.sort(told) == np.sort(expected)).all(), f"seed {self.seed}, prompt {number}"
        assert (told == expected)[is_ordered].all(), f"seed {self.seed}, prompt {number}"
        assert is_ordered.mean() > 0.95


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products are slower on several threads, more so beside busy workers."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Case:
    seed = fresh_seed()
    folder = make_checkpoint(
        tmp_path_factory.mktemp("model"),
        seed=seed,
        num_hidden_layers=NUM_LAYERS,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    oracle = load_oracle(folder)
    prompts, completions = separated_prompts(
        oracle, PROMPT_LENGTHS, NEW_TOKENS, random.Random(seed)
    )
    best = [
        _favourites(oracle, [*prompt, *completion[:-1]])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return Case(
        folder=folder,
        seed=seed,
        prompts=prompts,
        completions=completions,
        choices=[choices for choices, _ in best],
        is_ordered=[is_ordered for _, is_ordered in best],
    )


@torch.no_grad()
def _favourites(
    oracle: Any, token_ids: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    output = oracle(torch.tensor([list(token_ids)]), output_router_logits=True)
    logits = torch.stack(output.router_logits, dim=1)  # [t, layers, experts]
    best = logits.topk(TOP_K, dim=-1)
    gaps = (best.values[..., :-1] - best.values[..., 1:]).min(dim=-1).values
    return best.indices.numpy(), (gaps > ROUTER_MARGIN).numpy()


async def _told(engine: Engine, prompt: Sequence[int]) -> tuple[list[int], NDArray[np.uint8]]:
    request = GenerateRequest(
        request_id="asking",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True),
        return_expert_choices=True,
    )
    deltas = [delta async for batch in engine.generate(request) for delta in batch]
    data = b"".join(delta.expert_choices for delta in deltas)
    tokens = [token for delta in deltas for token in delta.token_ids]
    return tokens, np.frombuffer(data, dtype=np.uint8).reshape(-1, NUM_LAYERS, TOP_K)


@pytest.mark.parametrize(
    ("num_workers", "transport", "num_micro_batches"),
    [(0, "grpc", 1), (4, "grpc", 2), (3, "lane", 3)],
    ids=["in process", "gRPC, two micro-batches", "lanes, three micro-batches"],
)
async def test_choices_are_those_of_transformers(
    case: Case, num_workers: int, transport: DispatchTransportName, num_micro_batches: int
) -> None:
    """All prompts at once, in chunks and with too few blocks for all; then all again."""
    if transport == "lane" and native_library() is None:
        pytest.skip("lanes need the native library")
    placement = plan_placement(NUM_LAYERS, NUM_EXPERTS, num_workers) if num_workers else ()
    async with (
        running_workers(case.folder, placement) as endpoints,
        running_engine(
            case.folder,
            endpoints,
            num_blocks=NUM_BLOCKS,
            num_micro_batches=num_micro_batches,
            transport=transport,
        ) as engine,
    ):
        for _ in range(2):
            answers = await asyncio.gather(*(_told(engine, prompt) for prompt in case.prompts))
            for number, (tokens, told) in enumerate(answers):
                assert tokens == case.completions[number], f"seed {case.seed}"
                case.check(number, told)
        stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_cached_tokens == 0, "nothing asked for was taken from the prefix cache"


class LosingShard(EngineShard):
    """Its requests are all given up after so many tokens, to be sent again."""

    def __init__(self, engine: Engine, after: int) -> None:
        super().__init__(engine)
        self._after = after
        self.requests: list[GenerateRequest] = []

    async def generate(
        self, request: GenerateRequest
    ) -> AsyncGenerator[tuple[GenerationDelta, ...], None]:
        self.requests.append(request)
        num_tokens = 0
        async with aclosing(self.engine.generate(request)) as stream:
            async for deltas in stream:
                yield deltas
                num_tokens += sum(len(delta.token_ids) for delta in deltas)
                if num_tokens >= self._after:
                    raise ShardLostError("given up")


async def test_they_reach_the_client_whole_though_shards_are_lost(case: Case) -> None:
    async with running_engine(case.folder, (), num_blocks=NUM_BLOCKS) as engine:
        shard = LosingShard(engine, after=5)
        server = ShardServer(shard, host="127.0.0.1")
        port = await asyncio.to_thread(server.start)
        registry = MemoryRegistry()
        await registry.publish(shard_record("shard-0", endpoint=f"127.0.0.1:{port}"), 600)
        pool = ShardPool(registry)
        app = create_app(load_settings(model="org/tiny"), pool, None, model_folder=case.folder)
        transport = httpx.ASGITransport(app)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                response = await client.post(
                    "/v1/completions",
                    json={
                        "prompt": case.prompts,
                        "max_tokens": NEW_TOKENS,
                        "temperature": 0,
                        "ignore_eos": True,
                        "return_token_ids": True,
                        "return_expert_choices": True,
                    },
                    timeout=120,
                )
        finally:
            await pool.close()
            await server.stop()
    assert response.status_code == 200, response.text
    assert any(choice.token_ids for request in shard.requests for choice in request.resumed)
    for number, choice in enumerate(response.json()["choices"]):
        told = choice["expert_choices"]
        assert choice["token_ids"] == case.completions[number], f"seed {case.seed}"
        assert told["completion"]["experts"][-1] is None
        experts = told["prompt"]["experts"] + told["completion"]["experts"][:-1]
        case.check(number, np.array(experts))
        _check_repeats(np.array(experts), told["repeats"])


async def test_choices_of_many_long_prompts_at_once_do_not_break_the_stream() -> None:
    """Together they are more than a message may hold."""
    num_requests, size = 68, 1 << 20
    gate = asyncio.Event()
    answer = GenerationDelta(
        index=0, token_ids=(7,), finish_reason="length", expert_choices=bytes(size)
    )
    shard = FakeShard(lambda _: [gate, (answer,)])
    server = ShardServer(shard, host="127.0.0.1")
    port = await asyncio.to_thread(server.start)
    registry = MemoryRegistry()
    await registry.publish(shard_record("shard-0", endpoint=f"127.0.0.1:{port}"), 600)
    pool = ShardPool(registry)

    async def ask(number: int) -> int:
        request = GenerateRequest(
            request_id=str(number),
            prompt_token_ids=(5,),
            sampling=SamplingParams(max_tokens=1),
            return_expert_choices=True,
        )
        return sum(
            [
                len(delta.expert_choices)
                async for deltas in pool.generate(request)
                for delta in deltas
            ]
        )

    try:
        asking = [asyncio.create_task(ask(number)) for number in range(num_requests)]
        await eventually(lambda: len(shard.requests) == num_requests, timeout_s=60)
        server._thread.call_soon(gate.set)
        assert await asyncio.gather(*asking) == [size] * num_requests
    finally:
        await pool.close()
        await server.stop()


def _check_repeats(experts: NDArray[np.int64], repeats: Sequence[dict[str, float]]) -> None:
    """Counted pair by pair."""
    for layer, told in enumerate(repeats):
        pairs = list(zip(experts[:-1, layer], experts[1:, layer], strict=True))
        assert told["layer"] == layer
        assert told["first"] == pytest.approx(np.mean([a[0] == b[0] for a, b in pairs]))
        assert told["any"] == pytest.approx(np.mean([bool(set(a) & set(b)) for a, b in pairs]))
