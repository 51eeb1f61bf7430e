from __future__ import annotations

import itertools

import numpy as np
import pytest

from services.core.planning.routing import Routing, expected_distinct_experts


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 32])
def test_the_draw_hits_as_many_experts_as_expected(num_tokens: int) -> None:
    rows = Routing(8, 2).rows_per_expert(num_tokens)
    hit = float((rows > 0).sum(axis=1).mean())
    assert hit == pytest.approx(expected_distinct_experts(num_tokens, 8, 2), rel=0.05)


def test_every_token_goes_to_k_experts() -> None:
    rows = Routing(8, 3).rows_per_expert(40)
    assert (rows.sum(axis=1) == 120).all()


def test_the_hot_expert_gets_its_share() -> None:
    rows = Routing(8, 2, hot_share=0.7).rows_per_expert(512)
    assert rows[:, 0].mean() / 512 == pytest.approx(0.7, abs=0.01)
    assert rows[:, 1:].mean() / 512 == pytest.approx(1.3 / 7, abs=0.01)


def test_a_larger_batch_never_has_fewer_rows_anywhere() -> None:
    routing = Routing(8, 2)
    counts = [routing.rows_per_expert(num_tokens) for num_tokens in (1, 7, 8, 9, 100, 2048, 5000)]
    for smaller, larger in itertools.pairwise(counts):
        assert (larger >= smaller).all()


def test_a_group_gets_each_token_once() -> None:
    routing = Routing(8, 2)
    everyone = routing.tokens_of_group(16, tuple(range(8)))
    assert (everyone == 16).all()
    pair = routing.tokens_of_group(64, (0, 1))
    rows = routing.rows_per_expert(64)[:, :2].sum(axis=1)
    assert (pair <= rows).all()
    # 1 - (6 choose 2) / (8 choose 2)
    assert float(np.mean(pair)) / 64 == pytest.approx(13 / 28, abs=0.03)
