"""Distributions of prompt and answer lengths, as `expertfleet bench` takes them."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from typing import Literal

from services.core.errors import ConfigurationError

_FORMS = "128 (fixed), 64-256 (uniform), or lognormal:MEDIAN:SIGMA[:MAX]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Whole numbers of tokens from 1 on. `low` and `high` bound every draw."""

    kind: Literal["uniform", "lognormal"]
    low: int
    high: int
    median: float = 0.0
    sigma: float = 0.0

    @staticmethod
    def parse(text: str) -> Lengths:
        """Raises `ConfigurationError` that names the forms there are."""
        if match := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
            low = int(match[1])
            lengths = Lengths(kind="uniform", low=low, high=int(match[2] or low))
        elif match := re.fullmatch(r"lognormal:(\d+):(\d*\.?\d+)(?::(\d+))?", text):
            median, high = int(match[1]), int(match[3] or 64 * int(match[1]))
            lengths = Lengths(
                kind="lognormal", low=1, high=high, median=median, sigma=float(match[2])
            )
        else:
            raise ConfigurationError(f"{text!r} is no length; give {_FORMS}", setting="length")
        if not 1 <= lengths.low <= lengths.high:
            raise ConfigurationError(
                f"{text!r} allows lengths from {lengths.low} to {lengths.high}; give {_FORMS}",
                setting="length",
            )
        return lengths

    def draw(self, generator: random.Random) -> int:
        if self.kind == "uniform":
            return generator.randint(self.low, self.high)
        value = generator.lognormvariate(math.log(self.median), self.sigma)
        return min(max(round(value), self.low), self.high)
