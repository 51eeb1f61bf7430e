"""What the gateway counts, for Prometheus."""

from __future__ import annotations

from typing import get_args

from opentelemetry.trace import Span
from prometheus_client import CollectorRegistry, Counter, Histogram

from services.core import telemetry
from services.core.errors import LossReason
from services.core.metrics import REQUEST_BUCKETS_S, TOKEN_BUCKETS_S
from services.core.tracing import trace_exemplar
from services.gateway.fleet_metrics import FleetMetrics
from services.gateway.generation import Generation


class GatewayMetrics:
    """Makes its metrics in `registry`; `fleet` shows what the leases say.

    Tokens of prompts and completions are the shards' to count, once, where they are computed.
    Latencies carry the trace of the request as an exemplar, where it is sampled.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._requests = Counter(
            telemetry.METRIC_REQUESTS,
            "HTTP requests by route and status; 499: the client went away",
            ("route", "status"),
            registry=registry,
        )
        self._duration = Histogram(
            telemetry.METRIC_E2E,
            "Seconds from request to the end of its answer",
            ("route",),
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self._ttft = Histogram(
            telemetry.METRIC_TTFT,
            "Seconds from request to first token",
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self._tpot = Histogram(
            telemetry.METRIC_TPOT,
            "Mean seconds between the tokens of a request, after the first",
            buckets=TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._resubmissions = Counter(
            telemetry.METRIC_RESUBMISSIONS,
            "Requests sent to another shard, by what became of theirs",
            ("reason",),
            registry=registry,
        )
        for reason in get_args(LossReason):  # from 0 on, so that the first one is an increase
            self._resubmissions.labels(reason)
        self.fleet = FleetMetrics()
        registry.register(self.fleet)

    def observe_request(self, route: str, status: int, duration_s: float, span: Span) -> None:
        """A request was answered, or given up; `span` is its own, and may have ended."""
        self._requests.labels(route, str(status)).inc()
        self._duration.labels(route).observe(duration_s, trace_exemplar(span))

    def observe_generation(self, generation: Generation, started_at: float, span: Span) -> None:
        """Take in a generation that is over, well or not. `started_at`: `time.perf_counter`."""
        if generation.first_token_at is None or generation.last_token_at is None:
            return
        exemplar = trace_exemplar(span)
        self._ttft.observe(generation.first_token_at - started_at, exemplar)
        num_intervals = max(choice.num_tokens for choice in generation.choices) - 1
        if num_intervals > 0:
            decode_s = generation.last_token_at - generation.first_token_at
            self._tpot.observe(decode_s / num_intervals, exemplar)

    def observe_resubmission(self, reason: LossReason) -> None:
        self._resubmissions.labels(reason).inc()
