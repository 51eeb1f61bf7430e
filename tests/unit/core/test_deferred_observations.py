from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram

from services.core.deferred_observations import DeferredObservations


def make(registry: CollectorRegistry) -> tuple[DeferredObservations[float], Histogram]:
    histogram = Histogram("waits", "Waits", buckets=(1.0, 2.0), registry=None)
    return DeferredObservations(registry, [histogram], histogram.observe), histogram


def test_a_scrape_sees_everything_added_before_it() -> None:
    registry = CollectorRegistry()
    waits, _ = make(registry)
    for value in (0.5, 1.5, 9.0):
        waits.add(value)
    assert registry.get_sample_value("waits_count") == 3
    assert registry.get_sample_value("waits_sum") == 11.0
    assert registry.get_sample_value("waits_bucket", {"le": "2.0"}) == 2


def test_what_is_never_scraped_does_not_pile_up() -> None:
    waits, _ = make(CollectorRegistry())
    for _ in range(10_000):
        waits.add(1.0)
    assert len(waits._pending) < 1000
