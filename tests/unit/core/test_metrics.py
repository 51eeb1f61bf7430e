from __future__ import annotations

import socket
import threading

import httpx
import pytest
from prometheus_client import REGISTRY, Counter

from services.core import metrics
from services.core.errors import ConfigurationError
from services.core.metrics import MetricsServer, new_registry


def test_metrics_of_a_registry_are_served_over_http() -> None:
    registry = new_registry()
    Counter("expertfleet_things", "Things", ["kind"], registry=registry).labels("a").inc(3)
    server = MetricsServer(registry, "127.0.0.1", 0)
    reply = httpx.get(f"http://{server.endpoint}/metrics")
    server.close()
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain")
    assert 'expertfleet_things_total{kind="a"} 3.0' in reply.text
    assert "process_resident_memory_bytes" in reply.text
    assert "python_gc_objects_collected_total" in reply.text


def test_two_registries_in_one_process_are_apart_from_each_other_and_the_global_one() -> None:
    one, other = new_registry(), new_registry()
    Counter("expertfleet_things", "Things", registry=one).inc()
    Counter("expertfleet_things", "Things", registry=other).inc(5)
    assert one.get_sample_value("expertfleet_things_total") == 1
    assert other.get_sample_value("expertfleet_things_total") == 5
    assert REGISTRY.get_sample_value("expertfleet_things_total") is None


def test_closing_frees_the_port_and_ends_the_thread() -> None:
    before = threading.active_count()
    server = MetricsServer(new_registry(), "127.0.0.1", 0)
    port = server.port
    server.close()
    server.close()
    assert threading.active_count() == before
    again = MetricsServer(new_registry(), "127.0.0.1", port)
    assert again.port == port
    again.close()


def test_a_busy_port_is_a_clear_error() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port}"):
            MetricsServer(new_registry(), "127.0.0.1", port)


@pytest.mark.parametrize(
    "name", ["REQUEST_BUCKETS_S", "TOKEN_BUCKETS_S", "CALL_BUCKETS_S", "ROWS_BUCKETS"]
)
def test_buckets_rise(name: str) -> None:
    buckets = getattr(metrics, name)
    assert list(buckets) == sorted(set(buckets))
