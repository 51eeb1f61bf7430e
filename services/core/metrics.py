"""Prometheus: a registry per process and the endpoint that serves it.

Metrics are made in the registry passed around, never in prometheus_client's global one, so that
several parts of the product can live in one process (and in one test).
"""

from __future__ import annotations

import threading

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.exposition import choose_encoder

from services.core.errors import ConfigurationError

# Bucket bounds in seconds.
REQUEST_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
"""Whole requests and time to first token: ten milliseconds to half an hour."""
TOKEN_BUCKETS_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.1,
    0.15,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
)
"""Steps and time per output token: a millisecond to ten seconds."""
CALL_BUCKETS_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30),
)
"""Calls between processes and what a worker does for one: 0.1 ms to the call's deadline."""
ROWS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Rows computed together."""
BUSY_WINDOW_S = 15.0
"""What a worker's busy ratio looks back on: a scrape interval, or a few."""


def new_registry() -> CollectorRegistry:
    """A registry with the process's own figures: CPU, memory, files, collections, version."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def exposition(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The metrics and their content type: OpenMetrics, which has exemplars, for whoever says in
    the `Accept` header that it reads that, and else Prometheus' plain text."""
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class MetricsServer:
    """Serves `GET /metrics` from a thread, in the formats of `exposition`.

    `port` 0 takes a free one; `.port` says which. Raises `ConfigurationError` when the
    address cannot be listened on.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise ConfigurationError(
                f"metrics cannot be served on {host}:{port}: {error}; choose another port",
                setting="metrics_port",
            ) from error
        self.host = host
        self.port: int = self._server.server_port
        self._is_closed = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"{self.host}:{self.port}"

    def close(self) -> None:
        """Stop listening and end the thread; safe to call again."""
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
