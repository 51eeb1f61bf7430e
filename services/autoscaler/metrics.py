"""What the autoscaler shows to Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from services.autoscaler.state import PolicyState
from services.autoscaler.view import FleetView
from services.core import telemetry
from services.core.registry import Slot


class AutoscalerMetrics:
    """Gauges of the last round, and a count of actions by purpose and outcome."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._replicas = Gauge(
            telemetry.METRIC_EXPERT_REPLICAS,
            "Ready workers that hold an expert",
            ["layer", "expert"],
            registry=registry,
        )
        self._unprotected = Gauge(
            telemetry.METRIC_UNPROTECTED_SLOTS,
            "Slots (layer, expert) with fewer than two replicas",
            registry=registry,
        )
        self._orphaned = Gauge(
            telemetry.METRIC_ORPHANED_SLOTS,
            "Slots that had a replica and have none",
            registry=registry,
        )
        self._imbalance = Gauge(
            telemetry.METRIC_WORKER_IMBALANCE,
            "Utilisation of the busiest worker over the mean",
            registry=registry,
        )
        self._saturation = Gauge(
            telemetry.METRIC_SATURATION,
            "Mean share of their time that shards spend in full steps",
            registry=registry,
        )
        self._leader = Gauge(
            telemetry.METRIC_AUTOSCALER_LEADER, "1 where this autoscaler acts", registry=registry
        )
        self._actions = Counter(
            telemetry.METRIC_AUTOSCALER_ACTIONS,
            "Actions carried out, by purpose and outcome",
            ["purpose", "outcome"],
            registry=registry,
        )
        self._shown: set[Slot] = set()

    def show(self, view: FleetView, state: PolicyState, *, is_leader: bool) -> None:
        for layer, expert in self._shown - state.known:
            self._replicas.remove(str(layer), str(expert))
        counts = {slot: len(view.holders.get(slot, ())) for slot in state.known}
        for (layer, expert), count in counts.items():
            self._replicas.labels(str(layer), str(expert)).set(count)
        self._shown = set(counts)
        self._unprotected.set(sum(count < 2 for count in counts.values()))
        self._orphaned.set(sum(count == 0 for count in counts.values()))
        self._imbalance.set(view.imbalance)
        self._saturation.set(view.saturation or 0.0)
        self._leader.set(int(is_leader))

    def count(self, purpose: str, outcome: str) -> None:
        self._actions.labels(purpose, outcome).inc()
