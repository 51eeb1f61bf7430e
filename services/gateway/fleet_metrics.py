"""The fleet as its leases tell it, for Prometheus: what is there whatever else has been started.

Every gateway shows the same figures of one fleet: take the largest, do not add them up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.core import telemetry
from services.core.registry import FleetSnapshot, Slot
from services.gateway.expert_load import expert_tokens, ready_replicas

_WORKER_STATES = ("loading", "ready", "draining")


class FleetMetrics(Collector):
    """Shows the last snapshot; what was last seen stands while the store is away.

    Replicas are shown of all slots of a model once it has had a worker: experts may be inside the
    shards, and then nothing is missing.
    """

    def __init__(self) -> None:
        self._shown: _Shown | None = None
        self._has_workers = False
        self._is_store_up: bool | None = None

    def show(self, snapshot: FleetSnapshot, *, num_layers: int, num_experts: int) -> None:
        self._is_store_up = True
        self._has_workers |= bool(snapshot.workers)
        self._shown = _Shown(
            tokens=expert_tokens(snapshot),
            replicas=_replicas(snapshot, num_layers, num_experts) if self._has_workers else {},
            workers=Counter(worker.state for worker in snapshot.workers),
            num_shards=len(snapshot.shards),
        )

    def store_away(self) -> None:
        """The store could not be asked."""
        self._is_store_up = False

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        tokens = CounterMetricFamily(
            telemetry.METRIC_FLEET_EXPERT_TOKENS,
            "Tokens that the gates of all shards alive sent to each logical expert",
            labels=("layer", "expert"),
        )
        replicas = GaugeMetricFamily(
            telemetry.METRIC_FLEET_REPLICAS,
            "Ready workers that hold each logical expert",
            labels=("layer", "expert"),
        )
        workers = GaugeMetricFamily(
            telemetry.METRIC_FLEET_WORKERS, "Workers with a lease, by state", labels=("state",)
        )
        shards = GaugeMetricFamily(telemetry.METRIC_FLEET_SHARDS, "Shards with a lease")
        store = GaugeMetricFamily(
            telemetry.METRIC_STORE_UP, "1 if the store answered this gateway when it was last asked"
        )
        if self._shown is not None:
            for (layer, expert), count in sorted(self._shown.tokens.items()):
                tokens.add_metric((str(layer), str(expert)), count)
            for (layer, expert), count in sorted(self._shown.replicas.items()):
                replicas.add_metric((str(layer), str(expert)), count)
            for state in _WORKER_STATES:
                workers.add_metric((state,), self._shown.workers[state])
            shards.add_metric((), self._shown.num_shards)
        if self._is_store_up is not None:
            store.add_metric((), self._is_store_up)
        return (tokens, replicas, workers, shards, store)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    tokens: dict[Slot, int]
    replicas: dict[Slot, int]
    workers: Counter[str]
    num_shards: int


def _replicas(snapshot: FleetSnapshot, num_layers: int, num_experts: int) -> dict[Slot, int]:
    held = ready_replicas(snapshot.workers)
    return {slot: held[slot] for slot in product(range(num_layers), range(num_experts))}
