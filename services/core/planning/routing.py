"""Which experts a batch of tokens hits: a seeded draw, and the exact expectations it agrees with.

Tokens are drawn one after the other, so a smaller batch is the beginning of a larger one: whatever
is computed from the draw grows with the batch and does not jitter. Expert 0 is the hot one.

Shapes: D draws, T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

NUM_DRAWS = 64
MAX_DRAWN_TOKENS = 2048
"""Larger batches are scaled up from this many: their counts hardly vary around the mean."""


class Routing:
    """`hot_share` is the share of tokens that go to expert 0, K/E to 1; None: all alike."""

    def __init__(self, num_experts: int, top_k: int, hot_share: float | None = None) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.hot_share = top_k / num_experts if hot_share is None else hot_share

    def rows_per_expert(self, num_tokens: int) -> NDArray[np.float64]:
        """Rows of every expert, float64 [D, E]."""
        drawn = min(num_tokens, MAX_DRAWN_TOKENS)
        key = (drawn, self.num_experts, self.top_k, self.hot_share)
        return _rows(*key) * (num_tokens / drawn)

    def tokens_of_group(self, num_tokens: int, experts: tuple[int, ...]) -> NDArray[np.float64]:
        """Distinct tokens that go to any of `experts`, float64 [D]."""
        drawn = min(num_tokens, MAX_DRAWN_TOKENS)
        key = (drawn, self.num_experts, self.top_k, self.hot_share, experts)
        return _group_tokens(*key) * (num_tokens / drawn)


def expected_distinct_experts(num_tokens: int, num_experts: int, top_k: int) -> float:
    """Experts hit by uniformly routed tokens: E (1 - (1 - K/E)^T)."""
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** num_tokens)


@lru_cache(maxsize=8)
def _selected(num_tokens: int, num_experts: int, top_k: int, hot_share: float) -> NDArray[np.bool_]:
    """bool [T, D, E]. The hot expert is in a token's set with probability `hot_share`, the rest
    are drawn uniformly without replacement."""
    if top_k >= num_experts:
        return np.ones((num_tokens, NUM_DRAWS, num_experts), dtype=np.bool_)
    generator = np.random.default_rng(0)
    scores = generator.random((num_tokens, NUM_DRAWS, num_experts))
    scores[:, :, 0] = np.where(scores[:, :, 0] < hot_share, 2.0, -1.0)
    threshold = np.partition(scores, num_experts - top_k, axis=2)[:, :, num_experts - top_k]
    return scores >= threshold[:, :, None]


@lru_cache(maxsize=1024)
def _rows(num_tokens: int, num_experts: int, top_k: int, hot_share: float) -> NDArray[np.float64]:
    largest = _selected(_bucket(num_tokens), num_experts, top_k, hot_share)
    rows: NDArray[np.float64] = largest[:num_tokens].sum(axis=0, dtype=np.float64)
    return rows


@lru_cache(maxsize=4096)
def _group_tokens(
    num_tokens: int, num_experts: int, top_k: int, hot_share: float, experts: tuple[int, ...]
) -> NDArray[np.float64]:
    largest = _selected(_bucket(num_tokens), num_experts, top_k, hot_share)
    is_sent = largest[:num_tokens, :, list(experts)].any(axis=2)
    tokens: NDArray[np.float64] = is_sent.sum(axis=0, dtype=np.float64)
    return tokens


def _bucket(num_tokens: int) -> int:
    """The next power of two, so that few draws are kept for many batch sizes."""
    return 1 << (num_tokens - 1).bit_length()
