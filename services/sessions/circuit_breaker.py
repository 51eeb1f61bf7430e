"""Keeps a dead or hanging store from costing every request its timeout."""

from __future__ import annotations


class CircuitBreaker:
    """Closed until `threshold` failures in a row, then open for `open_s`, then one trial.

    While the trial runs everyone else is still refused; its success closes the breaker, its
    failure opens it again. `now` is any monotonic clock in seconds.
    """

    def __init__(self, *, threshold: int = 2, open_s: float = 2.0) -> None:
        self._threshold = threshold
        self._open_s = open_s
        self._failures = 0
        self._closed_from = 0.0
        self._trial_until = 0.0

    @property
    def is_open(self) -> bool:
        return self._failures >= self._threshold

    def allow(self, now: float) -> bool:
        """Whether a call may be made now. A trial that never reports back counts as failed."""
        if not self.is_open:
            return True
        if now < self._closed_from or now < self._trial_until:
            return False
        self._trial_until = now + self._open_s
        return True

    def succeeded(self) -> None:
        self._failures = 0
        self._trial_until = 0.0

    def failed(self, now: float) -> None:
        self._failures += 1
        self._closed_from = now + self._open_s
        self._trial_until = 0.0
