"""One statistic for everything that is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

SECONDS_PER_FIGURE = 0.4
FEWEST_RUNS = 7
MOST_SECONDS_PER_FIGURE = 3.0
WARM_UP_RUNS = 2


def typical_s(times: Sequence[float]) -> float:
    """The tenth part from below: what a run takes when no neighbour disturbs it. Of fewer than ten
    runs the shortest."""
    return sorted(times)[len(times) // 10]


def time_s(work: Callable[[], object], *, seconds: float = SECONDS_PER_FIGURE) -> float:
    """Typical seconds of `work`, run for about `seconds`; longer where it takes long, but not
    much."""
    for _ in range(WARM_UP_RUNS):
        work()
    times: list[float] = []
    started = now = time.perf_counter()
    while not times or now - started < (
        seconds if len(times) >= FEWEST_RUNS else MOST_SECONDS_PER_FIGURE
    ):
        work()
        before, now = now, time.perf_counter()
        times.append(now - before)
    return typical_s(times)
