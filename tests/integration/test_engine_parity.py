"""The whole engine over expert workers against transformers, on fresh random checkpoints.

Tokens go through the real scheduler with chunked prefill, evictions and reused prefixes, and
through real gRPC to real workers. In float32 every greedy token must be transformers' own: prompts
are drawn such that rounding cannot decide a token or an expert (see `tests.support.separated`), so
no difference is forgiven.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from router_service.engine.engine import Engine
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.model_config import ModelConfig
from services.core.placement import plan_placement
from tests.support.checkpoints import fresh_seed, load_oracle, make_model, save_model
from tests.support.fleet import greedy, running_engine, running_workers
from tests.support.separated import separated_prompts
from tests.support.worker_process import running_worker

SHAPES: dict[str, dict[str, Any]] = {
    "2 experts top-1, tied": {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 4,
        "tie_word_embeddings": True,
    },
    "4 experts top-2, sliding window, fused layout": {"sliding_window": 24, "layout": "fused"},
    "8 experts top-2, shards": {"num_local_experts": 8, "sharded": 3},
    "8 experts top-4, tied, sliding window, fused layout": {
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "tie_word_embeddings": True,
        "sliding_window": 37,
        "layout": "fused",
    },
    "16 experts top-4, one key-value head": {
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 1,
        "rope_theta": 1e6,
    },
    "16 experts top-1, sliding window, fused layout, shards": {
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "sliding_window": 16,
        "layout": "fused",
        "sharded": 3,
    },
    "4 experts top-4, Mistral's layout": {"num_experts_per_tok": 4, "layout": "mistral"},
}
PROMPT_LENGTHS = (131, 3, 70, 1, 17, 96, 40, 9)
NEW_TOKENS = 16
MICRO_BATCHES: dict[int, int | Literal["auto"]] = {1: 1, 2: 2, 4: "auto", 8: 3}
"""By number of workers."""
NUM_BLOCKS = 64
"""Of 4 tokens: the prompts alone are 367 tokens, with their completions 495."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint, prompts, and what transformers continues them with."""

    folder: Path
    config: ModelConfig
    seed: int
    prompts: Sequence[Sequence[int]]
    expected: Sequence[Sequence[int]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products are slower on several threads, more so beside busy workers."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=list(SHAPES), ids=list(SHAPES))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> Case:
    return make_case(SHAPES[request.param], tmp_path_factory.mktemp("case"))


def make_case(shape: Mapping[str, Any], folder: Path) -> Case:
    """The oracle reads a plain copy of the checkpoint, as it does not know every layout."""
    sizes = dict(shape)
    stored = {key: sizes.pop(key) for key in ("layout", "sharded") if key in sizes}
    seed = fresh_seed()
    network = make_model(seed=seed, **sizes)
    save_model(network, folder / "model", **stored)
    save_model(network, folder / "oracle")
    prompts, expected = separated_prompts(
        load_oracle(folder / "oracle"), PROMPT_LENGTHS, NEW_TOKENS, random.Random(seed)
    )
    return Case(
        folder=folder / "model",
        config=Checkpoint.open(str(folder / "model")).config,
        seed=seed,
        prompts=prompts,
        expected=expected,
    )


async def check_tokens(engine: Engine, case: Case) -> None:
    """All prompts at once, with fewer blocks than they need together; then all again, last first,
    so that some are asked for while their blocks are still there. Lengths and order decide who is
    evicted and what is found again, so that is the same in every run."""
    tokens = await greedy(engine, case.prompts, NEW_TOKENS)
    assert tokens == case.expected, f"seed {case.seed}"
    tokens = await greedy(engine, case.prompts[::-1], NEW_TOKENS)
    assert tokens == case.expected[::-1], f"seed {case.seed}, again"
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_cached_tokens > 0


@pytest.mark.parametrize("num_workers", MICRO_BATCHES)
async def test_greedy_tokens_equal_those_of_transformers(case: Case, num_workers: int) -> None:
    config = case.config
    placement = plan_placement(config.num_hidden_layers, config.num_local_experts, num_workers)
    async with (
        running_workers(case.folder, placement) as endpoints,
        running_engine(
            case.folder,
            endpoints,
            num_blocks=NUM_BLOCKS,
            num_micro_batches=MICRO_BATCHES[num_workers],
        ) as engine,
    ):
        await check_tokens(engine, case)


async def test_workers_in_processes_of_their_own_give_the_same_tokens(tmp_path: Path) -> None:
    case = make_case(SHAPES["8 experts top-2, shards"], tmp_path)
    with (
        running_worker(case.folder, "0,2,3,7", wait_ready=False) as first,
        running_worker(case.folder, "1,4-6", wait_ready=False) as second,
    ):
        endpoints = [first.endpoint, second.endpoint]
        async with running_engine(case.folder, endpoints, num_blocks=NUM_BLOCKS) as engine:
            await check_tokens(engine, case)
