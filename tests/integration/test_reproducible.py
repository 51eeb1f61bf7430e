"""Reproducible answers: tokens and log-probabilities are the same bits whatever is beside a prompt.

Fresh random models in bfloat16. Each prompt is first answered alone, its prompt computed at once,
by one worker; then everything that may differ in service does: what else is in the batch, how
prompts are cut into chunks, reused and evicted prefixes, micro-batches, number of workers and
placement, a worker's death, a new engine.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from router_service.engine.engine import Engine
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.generation import GenerateRequest, SamplingParams
from services.core.kernels.library import native_library
from services.core.model_config import ModelConfig
from services.core.placement import WorkerSlots, plan_placement
from services.core.quantization.formats import WeightsSetting
from tests.support.at_once import all_at_once
from tests.support.checkpoints import fresh_seed, make_checkpoint
from tests.support.eventually import eventually
from tests.support.fleet import random_placement, running_engine, running_workers
from tests.support.worker_process import running_worker

pytestmark = pytest.mark.skipif(native_library() is None, reason="needs the native kernels")

NEW_TOKENS = 12
NUM_PROMPTS = 24
NUM_ALIKE, ALIKE_TOKENS = 8, 20
"""The first prompts have one length, so that it can be told how many blocks they come to."""
DTYPE = torch.bfloat16
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 224, "num_hidden_layers": 3}
SHAPES: dict[str, dict[str, Any]] = {
    "8 experts top-2": {"num_local_experts": 8},
    "4 experts top-4, sliding window": {"num_experts_per_tok": 4, "sliding_window": 24},
}

Answer = tuple[tuple[int, float, tuple[tuple[int, float], ...]], ...]
"""Per token: its id, its log-probability, and the two best."""


@dataclass(frozen=True, kw_only=True)
class Case:
    folder: Path
    config: ModelConfig
    seed: int
    weights: WeightsSetting
    prompts: Sequence[Sequence[int]]
    alone: Sequence[Answer]


@pytest.fixture(
    scope="module",
    params=[(shape, weights) for shape in SHAPES for weights in ("auto", "int8")],
    ids=lambda param: ", ".join(param),
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, weights = request.param
    seed = fresh_seed()
    generator = random.Random(seed)
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, seed=seed, dtype=DTYPE, **SIZES, **SHAPES[name])
    lengths = [ALIKE_TOKENS] * NUM_ALIKE
    lengths += [generator.randint(1, 110) for _ in range(NUM_PROMPTS - NUM_ALIKE)]
    case = Case(
        folder=folder,
        config=Checkpoint.open(str(folder)).config,
        seed=seed,
        weights=weights,
        prompts=[[generator.randrange(3, 256) for _ in range(length)] for length in lengths],
        alone=(),
    )
    return replace(case, alone=asyncio.run(answer_each_alone(case)))


@asynccontextmanager
async def serving(
    case: Case,
    placement: Sequence[WorkerSlots],
    *,
    chunk: int = 256,
    num_blocks: int = 2048,
    num_micro_batches: int = 1,
) -> AsyncIterator[Engine]:
    async with (
        running_workers(case.folder, placement, expert_weights=case.weights) as endpoints,
        running_engine(
            case.folder,
            endpoints,
            dtype=DTYPE,
            num_blocks=num_blocks,
            max_num_batched_tokens=chunk,
            num_micro_batches=num_micro_batches,
            shard_weights=case.weights,
        ) as engine,
    ):
        yield engine


async def answer(engine: Engine, request_id: str, prompt: Sequence[int]) -> Answer:
    request = GenerateRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(
            max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=2
        ),
    )
    return tuple(
        [
            (item.token_id, item.logprob, item.top)
            async for deltas in engine.generate(request)
            for delta in deltas
            for item in delta.logprobs or ()
        ]
    )


async def answer_each_alone(case: Case) -> list[Answer]:
    one_worker = plan_placement(case.config.num_hidden_layers, case.config.num_local_experts, 1)
    async with serving(case, one_worker) as engine:
        return [await answer(engine, f"a-{n}", prompt) for n, prompt in enumerate(case.prompts)]


async def answer_all(engine: Engine, case: Case) -> list[Answer]:
    asked = [answer(engine, f"r-{n}", prompt) for n, prompt in enumerate(case.prompts)]
    return await all_at_once(engine, asked)


async def test_answers_do_not_depend_on_batch_chunks_cache_micro_batches_or_workers(
    case: Case,
) -> None:
    layers, experts = case.config.num_hidden_layers, case.config.num_local_experts
    generator = random.Random(case.seed)
    for name, placement, chunk, num_micro_batches in (
        ("together", plan_placement(layers, experts, 1), 256, 1),
        ("4 workers, chunks of 24", plan_placement(layers, experts, 4), 24, 2),
        ("random placement, chunks of 7", random_placement(case.config, generator), 7, 3),
    ):
        async with serving(
            case, placement, chunk=chunk, num_micro_batches=num_micro_batches
        ) as engine:
            assert await answer_all(engine, case) == case.alone, f"{name}, seed {case.seed}"
            before = engine.stats().num_cached_tokens
            assert await answer_all(engine, case) == case.alone, f"{name} again, seed {case.seed}"
            assert engine.stats().num_cached_tokens > before


async def test_answers_do_not_depend_on_evictions(case: Case) -> None:
    """Of the prompts alike, 6 are admitted: 5 blocks each, and one more of the 36 for each that
    runs. They go in step and come to 8 blocks each, 48 in all."""
    placement = plan_placement(case.config.num_hidden_layers, case.config.num_local_experts, 2)
    async with serving(case, placement, chunk=48, num_blocks=36) as engine:
        assert await answer_all(engine, case) == case.alone, f"seed {case.seed}"
        assert engine.stats().num_preemptions > 0


async def test_answers_do_not_depend_on_a_workers_death(tmp_path: Path) -> None:
    """Two processes hold all experts; one is killed while answers are under way."""
    seed = fresh_seed()
    folder = make_checkpoint(tmp_path / "model", seed=seed, dtype=DTYPE, num_hidden_layers=4)
    generator = random.Random(seed)
    prompts = [[generator.randrange(3, 256) for _ in range(40)] for _ in range(16)]
    with (
        running_worker(folder, "0-3", wait_ready=False) as first,
        running_worker(folder, "0-3", wait_ready=False) as second,
    ):
        endpoints = [first.endpoint, second.endpoint]
        async with running_engine(folder, endpoints, dtype=DTYPE, num_blocks=1024) as engine:
            undisturbed = [await answer(engine, f"a{n}", p) for n, p in enumerate(prompts)]
        async with running_engine(
            folder, endpoints, dtype=DTYPE, num_blocks=1024, max_num_batched_tokens=16
        ) as engine:
            running = asyncio.gather(*(answer(engine, f"b{n}", p) for n, p in enumerate(prompts)))
            await eventually(lambda: engine.stats().num_generated_tokens >= 20, timeout_s=60)
            first.process.kill()
            assert await running == undisturbed, f"seed {seed}"
