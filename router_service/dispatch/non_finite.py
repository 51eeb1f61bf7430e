"""Tokens that went bad, kept apart from their batch mates.

A worker refuses a frame with NaN or infinity in it, which would fail every request of the batch.
So such tokens are sent as zeros and come back as NaN; the sampler then fails their request alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def find_non_finite(hidden_states: Tensor, topk_weights: Tensor) -> Tensor | None:
    """bool [T] of tokens with a value in [T, H] or a weight in [T, K] that is not finite.

    None, at the price of two sums, where all are finite.
    """
    total = hidden_states.sum(dtype=torch.float32) + topk_weights.sum()
    if math.isfinite(total.item()):
        return None
    bad = ~(hidden_states.isfinite().all(1) & topk_weights.isfinite().all(1))
    return bad if bool(bad.any()) else None


def blank(values: Tensor, bad: Tensor) -> Tensor:
    """`values` [T, ...] with zeros for the tokens in `bad` [T]."""
    return values.masked_fill(bad[:, None], 0)


def spoil(output: Tensor, bad: Tensor) -> Tensor:
    """`output` [T, H] with NaN for the tokens in `bad` [T]."""
    return output.masked_fill(bad[:, None], math.nan)
