"""How many tokens the gate sent to every (layer, expert), counted where it is decided."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from services.core.telemetry import METRIC_EXPERT_TOKENS


class ExpertLoad:
    """Counts of assignments since start, int64 [layers, experts].

    Written by the engine's loop, one vector addition per layer call; read from other threads, who
    may see the counts of one layer call and not yet of the next.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._counts = np.zeros((num_layers, num_experts), dtype=np.int64)

    def add(self, layer: int | slice, rows_per_expert: NDArray[np.int64]) -> None:
        """`rows_per_expert` [E]: assignments of one layer call; of several layers, [layers, E]."""
        self._counts[layer] += rows_per_expert

    def counts(self) -> NDArray[np.int64]:
        """A copy, int64 [layers, experts]."""
        return self._counts.copy()

    def export(self, registry: CollectorRegistry | None) -> None:
        """Show the counts as a Prometheus counter with labels layer and expert, if there is a
        registry. They are read when it is scraped."""
        if registry is not None:
            registry.register(_LoadCollector(self))


class _LoadCollector(Collector):
    def __init__(self, load: ExpertLoad) -> None:
        self._load = load

    def describe(self) -> Iterator[Metric]:
        yield self._family()

    def collect(self) -> Iterator[Metric]:
        family = self._family()
        for layer, row in enumerate(self._load.counts().tolist()):
            for expert, count in enumerate(row):
                family.add_metric([str(layer), str(expert)], count)
        yield family

    def _family(self) -> CounterMetricFamily:
        return CounterMetricFamily(
            METRIC_EXPERT_TOKENS.removesuffix("_total"),
            "Tokens the gate sent to an expert",
            labels=["layer", "expert"],
        )
