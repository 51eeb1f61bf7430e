"""How much may be sent again, as a part of what is sent. Pure.

So a storm of resends cannot feed itself.
"""

from __future__ import annotations


class RetryBudget:
    """A token bucket: every frame sent the first time earns `ratio` of a resend."""

    __slots__ = ("_maximum", "_ratio", "_tokens")

    def __init__(self, *, ratio: float = 0.2, burst: int = 32) -> None:
        self._ratio = ratio
        self._maximum = float(burst)
        self._tokens = float(burst)

    @property
    def tokens(self) -> float:
        return self._tokens

    def earn(self, num_frames: int) -> None:
        tokens = self._tokens + self._ratio * num_frames
        self._tokens = tokens if tokens < self._maximum else self._maximum

    def take(self) -> bool:
        """Whether one more resend is within the budget; it is counted then."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
