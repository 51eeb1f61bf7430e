"""Prompts whose greedy continuation float32 decides without doubt, and the continuation.

Two correct programs round differently, so where two tokens' logits, or two experts' router logits,
are nearer than the rounding error, either answer is right. A fresh random checkpoint meets such a
tie now and then. Rather than forgive a difference afterwards, such a prompt is drawn again before
anything is compared, and then every token must be equal.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LOGIT_MARGIN = 1e-3
"""Least distance of the best two logits at every greedy token; logits agree to about 1e-5."""
ROUTER_MARGIN = 1e-4
"""Least distance of the last chosen and the first unchosen expert's router logit; those are about
1 in size and agree to about 1e-6."""

_MAX_DRAWS = 50


def separated_prompts(
    oracle: Any, lengths: Sequence[int], max_tokens: int, generator: random.Random
) -> tuple[list[list[int]], list[list[int]]]:
    """Random prompts of the given lengths, and transformers' greedy tokens of each."""
    prompts, completions = [], []
    for length in lengths:
        for _ in range(_MAX_DRAWS):
            prompt = [generator.randrange(3, oracle.config.vocab_size) for _ in range(length)]
            completion = greedy_tokens(oracle, prompt, max_tokens)
            if is_separated(oracle, prompt, completion):
                break
        else:
            raise AssertionError(f"no separated prompt of {length} tokens in {_MAX_DRAWS} draws")
        prompts.append(prompt)
        completions.append(completion)
    return prompts, completions


@torch.no_grad()
def greedy_tokens(oracle: Any, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """`generate` of transformers, to the full length whatever the tokens are."""
    output = oracle.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    completion: list[int] = output[0, len(prompt) :].tolist()
    return completion


@torch.no_grad()
def is_separated(oracle: Any, prompt: Sequence[int], completion: Sequence[int]) -> bool:
    """Whether the margins hold for all tokens of the prompt and its completion."""
    token_ids = torch.tensor([[*prompt, *completion[:-1]]])
    output = oracle(token_ids, output_router_logits=True)
    num_chosen = oracle.config.num_experts_per_tok
    if _margin(output.logits[0, len(prompt) - 1 :], 1) < LOGIT_MARGIN:
        return False
    return all(_margin(layer, num_chosen) >= ROUTER_MARGIN for layer in output.router_logits)


def _margin(logits: Tensor, num_chosen: int) -> float:
    """Least distance in any row between the last chosen value and the first that is not."""
    if num_chosen == logits.shape[-1]:
        return float("inf")
    best = logits.topk(num_chosen + 1, dim=-1).values
    return float((best[:, num_chosen - 1] - best[:, num_chosen]).min())
