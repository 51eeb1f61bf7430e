from __future__ import annotations

import random

import pytest

from services.cli.load.lengths import Lengths
from services.core.errors import ConfigurationError


def _draws(text: str, count: int = 4000) -> list[int]:
    lengths, generator = Lengths.parse(text), random.Random(7)
    return [lengths.draw(generator) for _ in range(count)]


def test_a_single_number_is_drawn_always() -> None:
    assert set(_draws("17")) == {17}


def test_a_range_is_drawn_evenly_with_both_ends() -> None:
    draws = _draws("3-6")
    assert set(draws) == {3, 4, 5, 6}
    assert all(0.2 < draws.count(value) / len(draws) < 0.3 for value in range(3, 7))


def test_a_lognormal_has_its_median_and_keeps_its_bound() -> None:
    draws = sorted(_draws("lognormal:100:0.8:400"))
    assert 90 < draws[len(draws) // 2] < 110
    assert draws[0] >= 1
    assert draws[-1] == 400


@pytest.mark.parametrize(
    "text", ["", "0", "9-2", "a", "-5", "lognormal:10", "lognormal:0:1", "1.5"]
)
def test_what_is_no_length_is_refused_with_the_forms_there_are(text: str) -> None:
    with pytest.raises(ConfigurationError, match="lognormal:MEDIAN"):
        Lengths.parse(text)
