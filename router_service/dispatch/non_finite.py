"""Tokens that went bad, kept apart from their batch mates.

A worker refuses a frame with NaN or infinity in it, which would fail every request of the batch.
So such tokens are sent as zeros and come back as NaN; the sampler then fails their request alone.
"""

from __future__ import annotations

import math
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from services.core.bit_patterns import is_all_finite


def find_non_finite(
    hidden_states: Tensor, patterns: NDArray[Any], topk_weights: Tensor
) -> Tensor | None:
    """bool [T] of tokens with a value in [T, H] or a weight in [T, K] that is not finite.

    None where all are finite. `patterns` are the `bit_patterns` of `hidden_states`.
    """
    is_finite = is_all_finite(patterns, hidden_states.dtype)
    if is_finite and math.isfinite(topk_weights.numpy().sum()):
        return None
    bad = ~(hidden_states.isfinite().all(1) & topk_weights.isfinite().all(1))
    return bad if bool(bad.any()) else None


def blank(values: Tensor, bad: Tensor) -> Tensor:
    """`values` [T, ...] with zeros for the tokens in `bad` [T]."""
    return values.masked_fill(bad[:, None], 0)


def spoil(output: Tensor, bad: Tensor) -> Tensor:
    """`output` [T, H] with NaN for the tokens in `bad` [T]."""
    return output.masked_fill(bad[:, None], math.nan)
