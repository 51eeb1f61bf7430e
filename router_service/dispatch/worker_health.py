"""Which workers are sick, and when to try them again. Pure: time is an argument.

A worker is *overdue* while a frame of it is past its deadline: it may hang. It is *ejected* after
several faults in a row, for a time that doubles; then it is probed, and returns with a handicap
that fades as it answers. Neither empties a slot: who has no other replica is used all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

FAULTS_TO_EJECT = 3
_FIRST_EJECTION_S = 0.5
_MAX_EJECTION_S = 30.0
_FORGIVEN_AFTER_S = 60.0


@dataclass(slots=True)
class WorkerHealth:
    """One worker's. Times are of any clock that only goes forward."""

    num_overdue: int = 0
    is_ejected: bool = False
    is_stuck: bool = False
    """It kept an only replica's rows waiting for too long; nothing is sent until it answers."""
    num_faults: int = 0
    """In a row."""
    num_ejections: int = 0
    retry_at: float = 0.0
    """When an ejected worker is to be probed."""

    @property
    def is_sick(self) -> bool:
        return self.is_ejected or self.is_stuck or self.num_overdue > 0

    def succeeded(self) -> None:
        """It answered in time."""
        self.num_faults = 0

    def failed(self, now: float) -> bool:
        """Count a fault. True when the worker is ejected for it."""
        self.num_faults += 1
        if self.is_ejected or self.num_faults < FAULTS_TO_EJECT:
            return False
        if now - self.retry_at > _FORGIVEN_AFTER_S:
            self.num_ejections = 0
        self.is_ejected = True
        self.num_ejections += 1
        self.retry_at = now + self._ejection_s()
        return True

    def probe_failed(self, now: float) -> None:
        self.num_ejections += 1
        self.retry_at = now + self._ejection_s()

    def returned(self) -> None:
        """It may be used again; one more fault ejects it again."""
        self.is_ejected = False
        self.num_faults = FAULTS_TO_EJECT - 1

    def is_due(self, now: float) -> bool:
        """Whether it is time to probe it."""
        return self.is_ejected and now >= self.retry_at

    def _ejection_s(self) -> float:
        return min(_FIRST_EJECTION_S * 2.0 ** min(self.num_ejections - 1, 16), _MAX_EJECTION_S)
