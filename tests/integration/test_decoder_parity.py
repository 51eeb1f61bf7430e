"""The decoder against transformers on fresh random checkpoints.

Greedy tokens must be equal, save that after a tie (two best logits nearer to each other than
float32 rounding, once in tens of thousands of tokens) a completion may go on otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
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


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products as small as these are slower on several."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=list(SHAPES), ids=list(SHAPES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), **SHAPES[request.param])


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    return load_oracle(folder)


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(fresh_seed())
    return [torch.randint(3, 256, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def oracle_logits(oracle: Any, token_ids: list[int]) -> Tensor:
    logits: Tensor = oracle(torch.tensor([token_ids])).logits[0].float()
    return logits


def oracle_greedy(oracle: Any, prompt: list[int], count: int) -> list[int]:
    """What the oracle's own `generate` gives."""
    output = oracle.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(output[0, len(prompt) :].tolist())


def assert_greedy(
    oracle: Any,
    prompts: list[list[int]],
    completions: list[list[int]],
    all_expected: list[list[int]],
) -> None:
    """The completions are the expected ones, up to a tie."""
    for prompt, completion, expected in zip(prompts, completions, all_expected, strict=True):
        if completion == expected:
            continue
        same = next(i for i, token in enumerate(expected) if completion[i] != token)
        logits = oracle_logits(oracle, prompt + expected[:same])[-1]
        is_tie = abs(logits[completion[same]] - logits[expected[same]]) < FLOAT32_TOLERANCE
        assert is_tie, f"token {same} differs: {completion} is not {expected}"


async def test_logits_equal_those_of_transformers(folder: Path, oracle: Any) -> None:
    (prompt,) = random_prompts(45)
    logits = await hand_engine(folder).score(prompt)
    expected = oracle_logits(oracle, prompt)
    torch.testing.assert_close(logits, expected, atol=FLOAT32_TOLERANCE, rtol=FLOAT32_TOLERANCE)


async def test_greedy_tokens_equal_those_of_transformers(folder: Path, oracle: Any) -> None:
    """Long and short prompts in one batch, whole and in chunks beside running decodes."""
    prompts = random_prompts(40, 3, 17, 1, 26)
    expected = [oracle_greedy(oracle, prompt, 24) for prompt in prompts]
    for chunk in (None, 7):
        completions = await hand_engine(folder).greedy(prompts, 24, chunk=chunk)
        assert_greedy(oracle, prompts, completions, expected)


async def test_greedy_tokens_after_a_cached_prefix_equal_those_of_transformers(
    folder: Path, oracle: Any
) -> None:
    (prompt,) = random_prompts(30)
    engine = hand_engine(folder)
    first = HandSequence(token_ids=list(prompt))
    await engine.step([Part(first, 30)])
    second = HandSequence(token_ids=list(prompt), num_computed=24, block_ids=first.block_ids[:6])
    completion = await continue_greedily(engine, second, 12)
    expected = oracle_greedy(oracle, prompt, 12)
    assert_greedy(oracle, [prompt], [completion], [expected])


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


HALF_TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.004}
"""Mean over tokens of |error| / |logits| (2-norms); transformers has 0.022 and 0.0026."""


async def half_precision_errors(
    folder: Path, dtype: torch.dtype, prompts: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Relative errors of every token's logits, ours and transformers', teacher-forced.

    The truth is the oracle with the same (rounded) weights in float32.
    """
    exact, rounded = load_oracle(folder), load_oracle(folder, dtype)
    ours, theirs = [], []
    for prompt in prompts:
        expected = oracle_logits(exact, prompt)
        logits = await hand_engine(folder, dtype).score(prompt, [len(prompt) // 2, 1, 1])
        ours.append((logits - expected).norm(dim=-1) / expected.norm(dim=-1))
        errors = oracle_logits(rounded, prompt) - expected
        theirs.append(errors.norm(dim=-1) / expected.norm(dim=-1))
    return torch.cat(ours), torch.cat(theirs)


@pytest.mark.parametrize("dtype", list(HALF_TOLERANCE))
async def test_half_precision_is_as_near_to_float32_as_transformers_in_that_precision(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """With all experts chosen, so that rounding cannot send a token to another expert."""
    folder = make_checkpoint(tmp_path, dtype=dtype, num_experts_per_tok=4)
    ours, theirs = await half_precision_errors(folder, dtype, random_prompts(150, 150))
    print(f"relative error {ours.mean():.4f}, of transformers {theirs.mean():.4f}")
    assert ours.mean() < HALF_TOLERANCE[dtype]
    assert ours.max() < 4 * HALF_TOLERANCE[dtype]
    assert ours.mean() < 1.1 * theirs.mean()


@pytest.mark.parametrize("dtype", list(HALF_TOLERANCE))
async def test_half_precision_with_a_choice_of_experts_is_near_to_float32_for_most_tokens(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Where two experts are about equally likely, rounding sends a token and those that attend to
    it elsewhere, in transformers too; so this is about the median."""
    folder = make_checkpoint(tmp_path, dtype=dtype, num_local_experts=8)
    ours, theirs = await half_precision_errors(folder, dtype, random_prompts(*[25] * 8))
    print(f"relative error {ours.median():.4f}, of transformers {theirs.median():.4f}")
    assert ours.median() < 2 * HALF_TOLERANCE[dtype]
