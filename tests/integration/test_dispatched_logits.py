"""Logits of a forward pass whose experts are on workers: the same bits wherever the experts are.

The decoder is driven by hand, so that every backend sees the same batches: chunks of long prompts,
whole short ones and decodes together. How near the bits are to transformers is in
`test_decoder_parity` and `test_engine_parity`; for bfloat16 over workers it is here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from router_service.dispatch.local_experts import LocalExperts
from router_service.experts import ExpertBackend
from router_service.model.decoder import MixtralDecoder
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.placement import plan_placement
from tests.support.checkpoints import fresh_seed, load_oracle, make_checkpoint
from tests.support.fleet import NUM_THREADS, connected, random_placement, running_workers
from tests.support.forward import HandEngine, HandSequence, Part

CPU = torch.device("cpu")
BFLOAT16_TOLERANCE = 0.03
"""Mean over tokens of |error| / |logits| (2-norms), to float32; transformers has about 0.022."""

PROMPT_LENGTHS = (90, 3, 41, 1, 17)
STEPS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0, 40), (1, 3), (2, 20)),
    ((0, 49), (1, 1), (2, 21), (3, 1), (4, 16)),
    ((0, 1), (1, 1), (2, 1), (3, 1), (4, 1)),
    ((1, 1), (3, 1)),
    ((3, 1),),
)
"""Of every step the (sequence, number of its next tokens)."""


@pytest.fixture(scope="module", autouse=True)
def as_many_threads_as_a_worker() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    yield
    torch.set_num_threads(num_threads)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with 8 experts in 2 layers, and sequences for `STEPS`."""

    folder: Path
    decoder: MixtralDecoder
    sequences: tuple[tuple[int, ...], ...]
    seed: int

    async def forward(self, experts: ExpertBackend) -> tuple[Tensor, Tensor]:
        """Bits of all tokens' logits, and of the KV cache in the end."""
        engine = HandEngine(self.decoder, experts, num_blocks=64, block_size=4)
        sequences = [HandSequence(token_ids=list(tokens)) for tokens in self.sequences]
        logits = [
            await engine.step(
                [Part(sequences[index], count, range(count)) for index, count in step]
            )
            for step in STEPS
        ]
        return bits(torch.cat(logits)), bits(engine.kv_cache.tensor)


def bits(tensor: Tensor) -> Tensor:
    """The numbers' bits as integers: unlike floats, these tell -0 from 0 and compare NaN."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


@pytest.fixture(
    scope="module",
    params=[(dtype, top_k) for dtype in (torch.float32, torch.bfloat16) for top_k in (1, 2, 4)],
    ids=lambda param: f"{param[0]}-top{param[1]}".removeprefix("torch."),
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    dtype, top_k = request.param
    seed = fresh_seed()
    folder = make_checkpoint(
        tmp_path_factory.mktemp("model"),
        seed=seed,
        dtype=dtype,
        num_local_experts=8,
        num_experts_per_tok=top_k,
        sliding_window=50,
    )
    generator = random.Random(seed)
    return Case(
        folder=folder,
        decoder=MixtralDecoder.load(Checkpoint.open(str(folder)), dtype=dtype, device=CPU),
        sequences=tuple(
            tuple(generator.randrange(3, 256) for _ in range(length + 3))
            for length in PROMPT_LENGTHS
        ),
        seed=seed,
    )


async def test_logits_have_the_same_bits_for_every_number_of_workers_and_placement(
    case: Case,
) -> None:
    config, dtype = case.decoder.config, case.decoder.dtype
    generator = random.Random(case.seed)
    placements = [plan_placement(2, 8, num_workers) for num_workers in (1, 2, 4, 8)]
    placements += [tuple(random_placement(config, generator)) for _ in range(3)]
    local = LocalExperts.load(Checkpoint.open(str(case.folder)), dtype=dtype, device=CPU)
    with torch.inference_mode():
        logits, cache = await case.forward(local)
        assert len(torch.unique(logits)) > logits.shape[1]
        for placement in placements:
            async with (
                running_workers(case.folder, placement) as endpoints,
                connected(config, endpoints, dtype) as remote,
            ):
                remote_logits, remote_cache = await case.forward(remote)
            assert torch.equal(remote_logits, logits), placement
            assert torch.equal(remote_cache, cache), placement


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 4), (8, 2), (8, 1)])
async def test_bfloat16_logits_over_workers_are_near_to_float32(
    num_experts: int, top_k: int, tmp_path: Path
) -> None:
    """Teacher-forced in chunks; the oracle computes the same rounded weights in float32.

    Where two experts are about equally likely, rounding sends a token elsewhere, in transformers
    too; so unless all experts are chosen, the median is bounded, and by twice as much.
    """
    folder = make_checkpoint(
        tmp_path,
        dtype=torch.bfloat16,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
    )
    oracle, checkpoint = load_oracle(folder), Checkpoint.open(str(folder))
    config = checkpoint.config
    decoder = MixtralDecoder.load(checkpoint, dtype=torch.bfloat16, device=CPU)
    generator = random.Random(fresh_seed())
    errors = []
    async with (
        running_workers(folder, plan_placement(2, num_experts, 4)) as endpoints,
        connected(config, endpoints, torch.bfloat16) as experts,
    ):
        for _ in range(8):
            tokens = [generator.randrange(3, 256) for _ in range(40)]
            logits = await HandEngine(decoder, experts).score(tokens, [24, 1, 1])
            errors.append(relative_errors(logits, oracle_logits(oracle, tokens)))
    error = torch.cat(errors)
    print(f"relative error: mean {error.mean():.4f}, median {error.median():.4f}")
    if top_k == num_experts:
        assert error.mean() < BFLOAT16_TOLERANCE
        assert error.max() < 4 * BFLOAT16_TOLERANCE
    else:
        assert error.median() < 2 * BFLOAT16_TOLERANCE


@torch.no_grad()
def oracle_logits(oracle: Any, token_ids: list[int]) -> Tensor:
    logits: Tensor = oracle(torch.tensor([token_ids])).logits[0].float()
    return logits


def relative_errors(logits: Tensor, expected: Tensor) -> Tensor:
    """Of every token."""
    errors: Tensor = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    return errors
