"""How many steps may be sampled: as many as take a small share of the time. Pure: time is an
argument."""

from __future__ import annotations

from typing import Final

SHARE: Final = 0.02
"""Of the time that passes, idle or not. A sampled step takes up to twice as long as another, so
that about half of what is charged is what tracing costs."""
MAX_SAVED_S: Final = 0.5
_MAX_CHARGE_S: Final = 0.1
"""A long step does not take longer for its spans than others do."""


class SamplingBudget:
    """Seconds for sampled steps. A shard that has little to do may have them all sampled; under a
    lasting load what is sampled costs at most `SHARE`."""

    def __init__(self, now: float) -> None:
        self._saved_s = MAX_SAVED_S
        self._earned_until = now

    def earn(self, now: float) -> None:
        passed_s = max(0.0, now - self._earned_until)
        self._saved_s = min(MAX_SAVED_S, self._saved_s + SHARE * passed_s)
        self._earned_until = now

    def spend(self, seconds: float) -> None:
        """On a sampled step that took so long."""
        self._saved_s -= min(seconds, _MAX_CHARGE_S)

    @property
    def is_spent(self) -> bool:
        return self._saved_s <= 0

    @property
    def is_scarce(self) -> bool:
        return self._saved_s < MAX_SAVED_S / 2
