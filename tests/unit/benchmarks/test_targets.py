from __future__ import annotations

from benchmarks.sides import SIDES
from benchmarks.targets import BOUND, TARGETS, verdict


def test_a_cell_says_whether_the_ratio_reaches_the_target() -> None:
    assert verdict(0.95, 0.95) == "**0.95** of 0.95, met"
    assert verdict(0.9499, 0.95).endswith("missed")
    assert verdict(1.5, None) == "1.50"
    assert verdict(None, 0.9) == "not run"
    assert verdict(None, None) == ""


def test_targets_compare_sides_that_run_by_default() -> None:
    assert {target.side for target in TARGETS} <= set(SIDES)
    assert {target.other for target in TARGETS} <= {*SIDES, BOUND}
