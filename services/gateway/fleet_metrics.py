"""The fleet as its leases tell it, for Prometheus: what is there whatever else has been started.

Every gateway shows the same figures of one fleet: take the largest, do not add them up.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.core import telemetry
from services.core.registry import FleetSnapshot, ShardRecord, Slot
from services.gateway.expert_load import ready_replicas

_WORKER_STATES = ("loading", "ready", "draining")
_MAX_SHARDS = 256


class FleetMetrics(Collector):
    """Shows the last snapshot; what was last seen stands while the store is away.

    Replicas are shown of all slots of a model once it has had a worker: experts may be inside the
    shards, and then nothing is missing.
    """

    def __init__(self) -> None:
        self._shown: _Shown | None = None
        self._tokens = _GateCounts()
        self._has_workers = False
        self._is_store_up: bool | None = None

    def show(self, snapshot: FleetSnapshot, *, num_layers: int, num_experts: int) -> None:
        self._is_store_up = True
        self._has_workers |= bool(snapshot.workers)
        self._tokens.add(snapshot.shards)
        self._shown = _Shown(
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
            "Tokens that the gates of all shards sent to each logical expert",
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
            for (layer, expert), count in sorted(self._tokens.total.items()):
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
    replicas: dict[Slot, int]
    workers: Counter[str]
    num_shards: int


class _GateCounts:
    """Adds up what shards report of themselves; a shard that is gone takes nothing away."""

    def __init__(self) -> None:
        self.total: Counter[Slot] = Counter()
        self._known: OrderedDict[tuple[str, float], dict[Slot, int]] = OrderedDict()
        """By shard and its start, the one that was seen last at the end."""

    def add(self, shards: Iterable[ShardRecord]) -> None:
        for shard in shards:
            known = self._known.setdefault((shard.shard_id, shard.started_at), {})
            for slot, count in shard.expert_load.items():
                self.total[slot] += max(0, count - known.get(slot, 0))
                known[slot] = max(count, known.get(slot, 0))
            self._known.move_to_end((shard.shard_id, shard.started_at))
        while len(self._known) > _MAX_SHARDS:
            self._known.popitem(last=False)


def _replicas(snapshot: FleetSnapshot, num_layers: int, num_experts: int) -> dict[Slot, int]:
    held = ready_replicas(snapshot.workers)
    return {slot: held[slot] for slot in product(range(num_layers), range(num_experts))}
