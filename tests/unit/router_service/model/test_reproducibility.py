"""Logits of a prompt are the same bits alone, in a batch, in any chunks, after a cached prefix."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import router_service.model.reproducibility as reproducibility
from router_service.dispatch.local_experts import LocalExperts
from router_service.model.decoder import MixtralDecoder
from router_service.model.reproducibility import resolve_reproducible
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.errors import ConfigurationError
from services.core.kernels.choice import native_kernels_for
from tests.support.checkpoints import fresh_seed, make_checkpoint
from tests.support.forward import TINY_CONFIG, HandEngine, HandSequence, Part

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(
    native_kernels_for(torch.bfloat16, CPU) is None, reason="kernels are not built"
)
SHAPES = {
    "top-2": {"num_local_experts": 8},
    "top-4, sliding window": {
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "sliding_window": 21,
        "head_dim": 32,
    },
    "dense": {"dense": True},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For torch, whose small operations are slower on several."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


class Model:
    """Engines over one checkpoint, each with an empty cache."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        checkpoint = Checkpoint.open(str(folder))
        self._decoder = MixtralDecoder.load(checkpoint, dtype=dtype, device=CPU)
        self._experts = LocalExperts.load(checkpoint, dtype=dtype, device=CPU)

    def engine(self) -> HandEngine:
        return HandEngine(self._decoder, self._experts, num_blocks=800)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    dtype: torch.dtype = request.param
    return dtype


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def model(request: pytest.FixtureRequest, dtype: torch.dtype, tmp_path: Path) -> Model:
    return Model(make_checkpoint(tmp_path, **request.param), dtype)


def random_prompt(length: int) -> list[int]:
    generator = random.Random(fresh_seed())
    return [generator.randrange(3, 256) for _ in range(length)]


@needs_native
async def test_logits_have_the_same_bits_in_any_chunks(model: Model) -> None:
    prompt = random_prompt(77)
    whole = await model.engine().score(prompt)
    for chunks in ([1] * 76, [24, 24, 24], [5, 1, 40, 1]):
        assert torch.equal(await model.engine().score(prompt, chunks), whole)


@needs_native
async def test_logits_have_the_same_bits_in_a_batch_of_32(model: Model) -> None:
    prompts = [random_prompt(length) for length in (40, 3, 17, 1, *range(20, 48))]
    alone = [await model.engine().score(prompt) for prompt in prompts]
    engine = model.engine()
    sequences = [HandSequence(token_ids=prompt) for prompt in prompts]
    cuts = [min(len(prompt) - 1, 2 + 3 * (i % 9)) for i, prompt in enumerate(prompts)]
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    for counts in (cuts, [len(p) - c for p, c in zip(prompts, cuts, strict=True)]):
        parts = [
            Part(sequence, count, range(count))
            for sequence, count in zip(sequences, counts, strict=True)
            if count
        ]
        rows = iter(torch.split(await engine.step(parts), [part.num_tokens for part in parts]))
        for index, count in enumerate(counts):
            if count:
                logits[index].append(next(rows))
    assert len(sequences) == 32
    for together, expected in zip(logits, alone, strict=True):
        assert torch.equal(torch.cat(together), expected)


@needs_native
async def test_logits_have_the_same_bits_after_a_cached_prefix(model: Model) -> None:
    prompt = random_prompt(50)
    engine = model.engine()
    first = HandSequence(token_ids=prompt)
    whole = await engine.step([Part(first, 50, range(50))])
    second = HandSequence(token_ids=prompt, num_computed=32, block_ids=first.block_ids[:8])
    assert torch.equal(await engine.step([Part(second, 18, range(18))]), whole[32:])


@needs_native
@pytest.mark.parametrize("requested", [None, True])
def test_native_kernels_make_it_the_default(requested: bool | None, dtype: torch.dtype) -> None:
    assert resolve_reproducible(requested, TINY_CONFIG, dtype=dtype, device=CPU)
    assert not resolve_reproducible(False, TINY_CONFIG, dtype=dtype, device=CPU)


@pytest.mark.parametrize(
    ("dtype", "device", "head_dim", "reason"),
    [
        (torch.float16, "cpu", 8, "float16"),
        (torch.bfloat16, "cuda:1", 8, "device cuda:1"),
        (torch.bfloat16, "cpu", 20, "head_dim"),
    ],
)
def test_where_it_cannot_be_had_asking_for_it_is_refused_with_the_reason(
    dtype: torch.dtype, device: str, head_dim: int, reason: str
) -> None:
    config = replace(TINY_CONFIG, head_dim=head_dim)
    where = torch.device(device)
    assert not resolve_reproducible(None, config, dtype=dtype, device=where)
    with pytest.raises(ConfigurationError, match=reason) as raised:
        resolve_reproducible(True, config, dtype=dtype, device=where)
    assert raised.value.details["setting"] == "reproducible"


def test_without_built_kernels_asking_for_it_says_how_to_build_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reproducibility, "native_kernels_for", lambda *_: None)
    assert not resolve_reproducible(None, TINY_CONFIG, dtype=torch.float32, device=CPU)
    with pytest.raises(ConfigurationError, match=r"python -m services\.core\.kernels\.build"):
        resolve_reproducible(True, TINY_CONFIG, dtype=torch.float32, device=CPU)
