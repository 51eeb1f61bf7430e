"""Times to first token and per output token over the last seconds, of a gateway and per shard."""

from __future__ import annotations

import math
from collections import deque

from services.gateway.console.contract import Percentiles

_MAX_SAMPLES = 1024


class LatencyWindow:
    """The samples of the last `window_s` seconds, of many the newest. Seconds in, ms out.

    `now` is in seconds and only grows.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, float]] = deque(maxlen=_MAX_SAMPLES)

    def add(self, seconds: float, now: float) -> None:
        self._samples.append((now, seconds))

    def percentiles(self, now: float) -> Percentiles | None:
        """By nearest rank; None without samples."""
        while self._samples and now - self._samples[0][0] > self._window_s:
            self._samples.popleft()
        if not self._samples:
            return None
        ordered = sorted(seconds for _, seconds in self._samples)
        return {"p50": _rank(ordered, 0.50), "p95": _rank(ordered, 0.95)}


class Latencies:
    """TTFT and TPOT of one stream of requests."""

    def __init__(self, window_s: float) -> None:
        self.ttft = LatencyWindow(window_s)
        self.tpot = LatencyWindow(window_s)

    def add(self, ttft_s: float | None, tpot_s: float | None, now: float) -> None:
        if ttft_s is not None:
            self.ttft.add(ttft_s, now)
        if tpot_s is not None:
            self.tpot.add(tpot_s, now)


def _rank(ordered: list[float], quantile: float) -> float:
    position = math.ceil(quantile * len(ordered)) - 1
    return round(ordered[position] * 1000, 2)
