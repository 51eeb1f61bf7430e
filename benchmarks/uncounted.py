"""Runs a module of ours with metrics that count nothing: `python -m benchmarks.uncounted MODULE`.

What metrics cost is the difference to the module as it is.
"""

from __future__ import annotations

import runpy
import sys

from prometheus_client import Counter, Gauge, Histogram

from services.core.deferred_observations import DeferredObservations

_COUNTING = {
    Counter: ("inc",),
    Gauge: ("inc", "dec", "set"),
    Histogram: ("observe",),
    DeferredObservations: ("add",),
}


def main() -> None:
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    stop_counting()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def stop_counting() -> None:
    """From now on, and for good, in this process."""
    for metric, methods in _COUNTING.items():
        for method in methods:
            setattr(metric, method, _ignore)


def _ignore(*_seen: object, **_options: object) -> None:
    pass


if __name__ == "__main__":
    main()
