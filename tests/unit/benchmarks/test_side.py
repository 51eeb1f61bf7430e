from __future__ import annotations

import pytest

from benchmarks.side import split_step


def test_time_for_experts_is_split_by_the_parts_of_the_calls() -> None:
    split = split_step({"attention": 0.2, "experts": 0.6}, {"wire": 0.1, "expert": 0.4}, 10)

    assert split == pytest.approx({"attention": 20.0, "wire": 10.0, "expert": 40.0, "rest": 10.0})


def test_calls_that_overlapped_are_scaled_to_the_time_waited_for_them() -> None:
    split = split_step({"attention": 0.5, "experts": 0.3}, {"wire": 0.2, "expert": 0.4}, 1)

    assert split == pytest.approx({"attention": 500.0, "wire": 100.0, "expert": 200.0, "rest": 0.0})


def test_without_parts_of_the_calls_experts_stay_whole() -> None:
    assert split_step({"experts": 0.3}, {"wire": 0.0}, 3) == pytest.approx({"experts": 100.0})
