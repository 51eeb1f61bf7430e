"""The decoder against transformers on fresh random checkpoints.

Random weights have close calls between tokens: a difference in rounding flips a greedy token only
where the two best logits are nearer than that, which in float32 does not happen in so few tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import fresh_seed, load_oracle, make_checkpoint
from tests.support.forward import HandEngine, HandSequence, Part, hand_engine

FLOAT32_TOLERANCE = 1e-4
"""Of logits whose size is about 5."""

SHAPES: dict[str, dict[str, Any]] = {
    "8 experts top-2": {"num_local_experts": 8},
    "2 experts top-1, tied": {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
    },
    "4 experts top-2, sliding window, fused layout": {"sliding_window": 11, "layout": "fused"},
    "16 experts top-4, wide heads": {
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "head_dim": 32,
        "rope_theta": 1e6,
    },
    "16 experts top-16, tied, sliding window of a block": {
        "num_local_experts": 16,
        "num_experts_per_tok": 16,
        "tie_word_embeddings": True,
        "sliding_window": 4,
    },
    "8 experts top-4, one key-value head, fused layout, shards": {
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 1,
        "layout": "fused",
        "sharded": 3,
    },
    "4 experts top-1, as many key-value heads as heads": {
        "num_experts_per_tok": 1,
        "num_key_value_heads": 4,
    },
    "dense": {"dense": True},
    "dense, sliding window": {"dense": True, "sliding_window": 9},
}


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.fixture
def folder(shape: dict[str, Any], tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, **shape)


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(fresh_seed())
    return [torch.randint(3, 256, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def oracle_logits(oracle: Any, token_ids: list[int]) -> Tensor:
    logits: Tensor = oracle(torch.tensor([token_ids])).logits[0].float()
    return logits


def oracle_greedy(oracle: Any, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    completions = []
    for prompt in prompts:
        output = oracle.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        completions.append(output[0, len(prompt) :].tolist())
    return completions


async def test_logits_equal_those_of_transformers(folder: Path) -> None:
    (prompt,) = random_prompts(45)
    logits = await hand_engine(folder).score(prompt)
    expected = oracle_logits(load_oracle(folder), prompt)
    torch.testing.assert_close(logits, expected, atol=FLOAT32_TOLERANCE, rtol=FLOAT32_TOLERANCE)


async def test_greedy_tokens_equal_those_of_transformers(folder: Path) -> None:
    """Long and short prompts in one batch, whole and in chunks beside running decodes."""
    prompts = random_prompts(40, 3, 17, 1, 26)
    expected = oracle_greedy(load_oracle(folder), prompts, 24)
    for chunk in (None, 7):
        assert await hand_engine(folder).greedy(prompts, 24, chunk=chunk) == expected


async def test_greedy_tokens_after_a_cached_prefix_equal_those_of_transformers(
    folder: Path,
) -> None:
    (prompt,) = random_prompts(30)
    expected = oracle_greedy(load_oracle(folder), [prompt], 12)[0]
    engine = hand_engine(folder)
    first = HandSequence(token_ids=list(prompt))
    await engine.step([Part(first, 30)])
    second = HandSequence(token_ids=list(prompt), num_computed=24, block_ids=first.block_ids[:6])
    assert await continue_greedily(engine, second, 12) == expected


async def continue_greedily(engine: HandEngine, sequence: HandSequence, count: int) -> list[int]:
    for _ in range(count):
        logits = await engine.step(
            [Part(sequence, len(sequence.token_ids) - sequence.num_computed)]
        )
        sequence.token_ids.append(int(logits.argmax()))
    return sequence.token_ids[-count:]


async def test_long_contexts_keep_their_positions(tmp_path: Path) -> None:
    """Beyond the first table of rotations, with a window that moves far from the start."""
    folder = make_checkpoint(tmp_path, sliding_window=64, num_hidden_layers=1)
    (prompt,) = random_prompts(700)
    logits = await hand_engine(folder, block_size=16).score(prompt, [300, 1, 1, 200, 64])
    expected = oracle_logits(load_oracle(folder), prompt)
    torch.testing.assert_close(logits, expected, atol=FLOAT32_TOLERANCE, rtol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
async def test_half_precision_is_as_near_to_float32_as_transformers_in_that_precision(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Teacher-forced; the oracle computes the same (rounded) weights in float32.

    A token whose second and third expert are about equally likely may go to another expert after
    rounding, so the mean error is compared, not the largest.
    """
    folder = make_checkpoint(tmp_path, dtype=dtype, num_local_experts=8)
    exact, rounded = load_oracle(folder), load_oracle(folder, dtype)
    ours, theirs = [], []
    for prompt in random_prompts(200, 200):
        expected = oracle_logits(exact, prompt)
        logits = await hand_engine(folder, dtype).score(prompt, [100, 1, 1])
        ours.append((logits - expected).abs().mean() / expected.abs().mean())
        theirs.append(
            (oracle_logits(rounded, prompt) - expected).abs().mean() / expected.abs().mean()
        )
    mean_error, their_error = float(torch.stack(ours).mean()), float(torch.stack(theirs).mean())
    print(f"mean relative error of logits: {mean_error:.4f}, of transformers: {their_error:.4f}")
    assert mean_error < {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert mean_error < 1.25 * their_error
