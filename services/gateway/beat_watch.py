"""Whether a shard hangs, by how long its stream has been silent. Pure; time is an argument.

A shard writes something at least every two `BEAT_S`, if only an empty message. What counts as too
long a silence follows from the silences that ended: on a busy machine they are longer, and a shard
that is taken for hung costs all of its requests a prefill elsewhere.
"""

from __future__ import annotations

TICK_S = 0.05
"""How often `tick` is to be called."""
MIN_BOUND_S = 0.3
"""A silence that is shorter is never taken for a hang."""
MAX_BOUND_S = 4.0
_FACTOR = 3.0
_FIRST_USUAL_S = 0.25
_HALF_LIFE_S = 15.0
_MAX_COUNTED_S = 1.5 * TICK_S


class BeatWatch:
    """One shard, over all links to it that follow one another.

    Only the time between ticks counts, and of that no more than an interval and a half each: while
    this process itself was held up, the shard may have written what was not yet read.
    """

    def __init__(self) -> None:
        self._usual_s = _FIRST_USUAL_S
        """A long silence, as they are of late."""
        self._silent_s = 0.0
        self._ticked_at: float | None = None
        self._has_beaten = False

    @property
    def has_beaten(self) -> bool:
        """Whether it is one that beats at all."""
        return self._has_beaten

    @property
    def silent_s(self) -> float:
        return self._silent_s

    @property
    def bound_s(self) -> float:
        return min(MAX_BOUND_S, max(MIN_BOUND_S, _FACTOR * self._usual_s))

    @property
    def is_silent(self) -> bool:
        """For too long; never of a shard that does not beat."""
        return self._has_beaten and self._silent_s > self.bound_s

    def connected(self) -> None:
        """There is a new link."""
        self._silent_s = 0.0

    def heard(self, *, is_beat: bool) -> None:
        """A message came."""
        self._learn()
        self._silent_s = 0.0
        self._has_beaten |= is_beat

    def given_up(self) -> None:
        """The shard was taken for hung. Should it be only slow, the next time takes longer."""
        self._learn()

    def tick(self, now: float) -> None:
        if self._ticked_at is not None:
            passed_s = max(0.0, now - self._ticked_at)
            self._silent_s += min(passed_s, _MAX_COUNTED_S)
            self._usual_s *= 0.5 ** (passed_s / _HALF_LIFE_S)
        self._ticked_at = now

    def _learn(self) -> None:
        self._usual_s = min(max(self._usual_s, self._silent_s), MAX_BOUND_S / _FACTOR)
