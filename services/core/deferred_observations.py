"""Histograms that are brought up to date when they are read, not on a hot path."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

T = TypeVar("T")

_MAX_PENDING = 256


class DeferredObservations(Collector, Generic[T]):
    """Keeps what was seen until the registry is scraped, or much has piled up.

    `observe` puts one thing seen into `histograms`, which must be in no registry of their own.
    `add` may be called on one thread while another scrapes.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        histograms: Sequence[Histogram],
        observe: Callable[[T], None],
    ) -> None:
        self._histograms = histograms
        self._observe = observe
        self._pending: deque[T] = deque()
        registry.register(self)

    def add(self, seen: T) -> None:
        self._pending.append(seen)
        if len(self._pending) >= _MAX_PENDING:
            self.settle()

    def settle(self) -> None:
        """Bring the histograms up to date."""
        while self._pending:
            try:
                seen = self._pending.popleft()
            except IndexError:  # the other thread took it
                return
            self._observe(seen)

    def describe(self) -> Iterator[Metric]:
        for histogram in self._histograms:
            yield from histogram.describe()

    def collect(self) -> Iterator[Metric]:
        self.settle()
        for histogram in self._histograms:
            yield from histogram.collect()
