from __future__ import annotations

import pytest

from services.cli.up import _autoscaling, _parse_shards
from services.core.errors import ConfigurationError


@pytest.mark.parametrize(("text", "expected"), [("1", (1, 1)), ("3", (3, 3)), ("1-4", (1, 4))])
def test_shards_are_a_count_or_a_range(text: str, expected: tuple[int, int]) -> None:
    assert _parse_shards(text) == expected


@pytest.mark.parametrize("text", ["", "0", "4-1", "two", "1-", "-1", "1-4-5"])
def test_other_shards_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="1-4"):
        _parse_shards(text)


def test_autoscaling_keeps_to_the_workers_asked_for_unless_more_are_allowed() -> None:
    assert _autoscaling(False, 4, None) is None
    fixed = _autoscaling(True, 4, None)
    assert fixed is not None
    assert (fixed.min_workers, fixed.max_workers, fixed.scale_workers) == (4, 4, False)
    growing = _autoscaling(True, 4, 6)
    assert growing is not None
    assert (growing.min_workers, growing.max_workers, growing.scale_workers) == (4, 6, True)


@pytest.mark.parametrize(("wanted", "num_workers"), [(False, 4), (True, 0)])
def test_autoscaling_needs_workers_and_to_be_asked_for(wanted: bool, num_workers: int) -> None:
    with pytest.raises(ConfigurationError, match="--autoscale"):
        _autoscaling(wanted, num_workers, 8)
