from __future__ import annotations

import subprocess
import sys

from benchmarks.rounds import Samples
from benchmarks.session_restore import report as restore_report
from benchmarks.steady_cost import report
from tests.support.imports import ROOT


def test_ratios_are_medians_within_rounds_and_told_whether_they_are_met() -> None:
    rates = {
        "plain": [100.0, 50.0, 100.0],
        "metrics": [99.0, 50.0, 99.0],
        "traced": [98.0, 45.0, 98.0],
        "checkpoints": [97.0, 49.0, 97.0],
        "everything": [96.0, 48.0, 90.0],
    }
    text = report(Samples(rates={"decode 8": rates}), "a machine", "--rounds 3")

    assert "| plain | 100 50 100 |" in text
    assert "| tracing by default / off | **0.99** of 0.98, met (0.90 to 0.99) |" in text
    assert "| everything / plain | **0.96** of 0.97, missed (0.90 to 0.96) |" in text
    assert "benchmarks.steady_cost --rounds 3" in text


def test_restoring_is_held_against_recomputing_round_by_round() -> None:
    times = {
        2048: {"recomputed": [2.0, 4.0, 2.0], "restored": [0.4, 0.4, 0.6], "cached": [0.1] * 3}
    }
    text = restore_report(times, 0, "a machine", "")

    assert "| 2048 | 2000 (2000 to 4000) | 400 (400 to 600) | 100 (100 to 100) | 0.20 |" in text


COUNTING = """
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from benchmarks.uncounted import stop_counting
from services.core.deferred_observations import DeferredObservations

stop_counting()
registry = CollectorRegistry()
Counter("requests", "", ["kind"], registry=registry).labels("a").inc()
Gauge("waiting", "", registry=registry).set(3)
late = Histogram("seconds", "", registry=None)
DeferredObservations(registry, [late], late.observe).add(1.0)
values = {sample.value for metric in registry.collect() for sample in metric.samples}
assert 1.0 not in values and 3.0 not in values, values
"""


def test_uncounted_metrics_stay_at_nothing() -> None:
    subprocess.run([sys.executable, "-c", COUNTING], cwd=ROOT, check=True, timeout=60)
