from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_service.shard_scaling import ScalingTargets, ShardLoad, desired_shards

TARGETS = ScalingTargets(waiting_tokens=1000, kv_use=0.8, low=0.5)


def _wanted(loads: list[tuple[float, float]], current: int, maximum: int = 8) -> int:
    return desired_shards(
        [ShardLoad(waiting_tokens=tokens, kv_use=use) for tokens, use in loads],
        current=current,
        minimum=1,
        maximum=maximum,
        targets=TARGETS,
    )


@pytest.mark.parametrize(
    ("loads", "current", "expected"),
    [
        ([(0, 0)], 1, 1),
        ([(3000, 0)], 1, 3),
        ([(0, 0.9)], 1, 2),
        ([(900, 0.1), (900, 0.1)], 2, 2),
        ([(0, 0.1), (0, 0.1), (0, 0.1), (0, 0.1)], 4, 1),
        ([(100000, 1)], 1, 8),
    ],
)
def test_shards_follow_the_larger_of_waiting_tokens_and_kv_use(
    loads: list[tuple[float, float]], current: int, expected: int
) -> None:
    assert _wanted(loads, current) == expected


def test_without_figures_nothing_changes() -> None:
    assert _wanted([], 3) == 3


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1)), min_size=1, max_size=8),
    st.integers(1, 8),
)
def test_the_answer_stays_within_bounds_and_more_load_never_means_fewer(
    loads: list[tuple[float, float]], maximum: int
) -> None:
    current = len(loads)
    wanted = _wanted(loads, current, maximum)
    doubled = _wanted([(2 * tokens, min(1.0, 2 * use)) for tokens, use in loads], current, maximum)
    assert 1 <= wanted <= maximum
    assert doubled >= wanted
