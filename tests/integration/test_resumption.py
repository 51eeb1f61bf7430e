"""Requests that change the engine half-way, on fresh random models with real workers and store.

In reproducible arithmetic (native kernels) the continuation must be the same bits, whether the KV
of what was emitted is computed again, in other pieces than before, or comes from the store.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from router_service.engine.engine import Engine
from router_service.session_tier import checkpoint_writer
from router_service.session_tier.session_tier import SessionTier
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.errors import ShardLostError
from services.core.generation import GenerateRequest, ResumedChoice, SamplingParams
from services.core.kernels.library import native_library
from services.core.placement import plan_placement
from services.core.tensor_codec import dtype_name
from services.sessions.redis_store import RedisSessionStore
from services.sessions.store import BlockLayout
from tests.support.checkpoints import fresh_seed, make_checkpoint
from tests.support.fleet import running_engine, running_workers
from tests.support.redis_server import running_redis

pytestmark = pytest.mark.skipif(native_library() is None, reason="needs the native kernels")

BLOCK = 4
NEW_TOKENS = 40
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 224, "num_hidden_layers": 2}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "penalties": {
        "temperature": 0.9,
        "top_p": 0.95,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
    },
}

Token = tuple[int, float, tuple[tuple[int, float], ...]]
"""Its id, its log-probability, and the two best."""


async def _answer(
    engine: Engine, request: GenerateRequest, *, hand_back_after: int | None = None
) -> dict[int, list[Token]]:
    """By choice; what there was when the shard was lost. `hand_back_after` so many tokens of the
    first choice, the engine gives up what it has."""
    answer: dict[int, list[Token]] = {}
    try:
        async for deltas in engine.generate(request):
            for delta in deltas:
                told = [
                    (entry.token_id, entry.logprob, entry.top) for entry in delta.logprobs or ()
                ]
                answer.setdefault(delta.index, []).extend(told)
            if hand_back_after is not None and len(answer.get(0, ())) >= hand_back_after:
                hand_back_after = None
                await engine.hand_back()
    except ShardLostError as error:
        assert error.reason == "drained"
    return answer


def _request(prompt: Sequence[int], sampling: str, seed: int, n: int = 1) -> GenerateRequest:
    return GenerateRequest(
        request_id="request",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(
            max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=2, seed=seed, **SAMPLINGS[sampling]
        ),
        n=n,
    )


def _resumed(request: GenerateRequest, answer: dict[int, list[Token]]) -> GenerateRequest:
    choices = tuple(
        ResumedChoice(token_ids=tuple(token[0] for token in answer.get(index, ())))
        for index in range(request.n)
    )
    return replace(request, resumed=choices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
async def test_another_engine_goes_on_with_the_same_bits(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    seed = fresh_seed()
    generator = random.Random(seed)
    make_checkpoint(tmp_path / "model", seed=seed, dtype=dtype, **SIZES)
    requests = [
        _request(
            [generator.randrange(3, 256) for _ in range(generator.randint(1, 60))],
            sampling,
            generator.randrange(2**63),
            n,
        )
        for sampling in SAMPLINGS
        for n in (1, 2)
    ]
    async with running_workers(tmp_path / "model", plan_placement(2, 4, 2)) as endpoints:

        def engine() -> Any:
            return running_engine(tmp_path / "model", endpoints, dtype=dtype, num_blocks=256)

        async with engine() as first:
            whole = [await _answer(first, request) for request in requests]
        async with engine() as second:
            for cut in (0, 1, 7, 8, 23, NEW_TOKENS - 1):
                # All at once, and each of another tenant, who finds nothing cached.
                cuts = [
                    {index: tokens[:cut] for index, tokens in answer.items()} for answer in whole
                ]
                again = await asyncio.gather(
                    *(
                        _answer(second, replace(_resumed(*pair), tenant=f"tenant-{cut}-{number}"))
                        for number, pair in enumerate(zip(requests, cuts, strict=True))
                    )
                )
                for answer, rest in zip(whole, again, strict=True):
                    expected = {index: tokens[cut:] for index, tokens in answer.items()}
                    assert rest == expected, f"seed {seed}, cut at {cut}"


@asynccontextmanager
async def _tier(url: str, folder: Path) -> AsyncIterator[SessionTier]:
    checkpoint = Checkpoint.open(str(folder))
    config = checkpoint.config
    layout = BlockLayout(
        model_fingerprint=checkpoint.non_expert_digest(),
        num_layers=config.num_hidden_layers,
        block_size=BLOCK,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype="bfloat16",
    )
    yield SessionTier(
        RedisSessionStore(url, fleet="fleet", layout=layout, round_trip_timeout_s=60.0),
        layout=layout,
        queue_bytes=1 << 24,
        default_ttl_s=60.0,
        checkpoint_kv="all",
    )


async def test_the_kv_of_a_lost_shard_comes_back_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "TIME_SHARE", 1.0)  # the model's steps are so short
    seed = fresh_seed()
    folder, generator = tmp_path / "model", random.Random(seed)
    make_checkpoint(folder, seed=seed, dtype=torch.bfloat16, **SIZES)
    prompt = [generator.randrange(3, 256) for _ in range(150)]
    request = _request(prompt, "penalties", seed)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "block_size": BLOCK, "num_blocks": 256}
    with running_redis(tmp_path) as server:
        async with running_workers(folder, plan_placement(2, 4, 1)) as endpoints:
            async with running_engine(folder, endpoints, **options) as engine:
                whole = (await _answer(engine, request))[0]
            async with (
                _tier(server.url, folder) as tier,
                running_engine(folder, endpoints, session_tier=tier, **options) as engine,
            ):
                emitted = (await _answer(engine, request, hand_back_after=10))[0]
                engine.check_alive = lambda: None  # type: ignore[method-assign]
            async with (
                _tier(server.url, folder) as tier,
                running_engine(folder, endpoints, session_tier=tier, **options) as engine,
            ):
                rest = (await _answer(engine, _resumed(request, {0: emitted})))[0]
                stats = engine.stats()
                await tier.flush(60)
                assert tier.stats().refused == {}
    assert 10 <= len(emitted) < NEW_TOKENS
    assert emitted + rest == whole, f"seed {seed}"
    assert stats.num_restored_tokens >= 148, "the prompt at least"
    assert stats.num_recomputed_tokens == len(prompt) + len(emitted) - stats.num_restored_tokens
