"""What the gateway counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from services.core import telemetry
from services.core.errors import LossReason
from services.core.metrics import REQUEST_BUCKETS_S, TOKEN_BUCKETS_S
from services.core.registry import Slot
from services.gateway.generation import Generation


class GatewayMetrics(Collector):
    """Makes its metrics in `registry`, and reports the fleet's tokens per expert last seen.

    Tokens of prompts and completions are the shards' to count, once, where they are computed.
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
        self._expert_tokens: dict[Slot, int] = {}
        registry.register(self)

    def observe_request(self, route: str, status: int, duration_s: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._duration.labels(route).observe(duration_s)

    def observe_generation(self, generation: Generation, started_at: float) -> None:
        """Take in a generation that is over, well or not. `started_at`: `time.perf_counter`."""
        if generation.first_token_at is None or generation.last_token_at is None:
            return
        self._ttft.observe(generation.first_token_at - started_at)
        num_intervals = max(choice.num_tokens for choice in generation.choices) - 1
        if num_intervals > 0:
            decode_s = generation.last_token_at - generation.first_token_at
            self._tpot.observe(decode_s / num_intervals)

    def observe_resubmission(self, reason: LossReason) -> None:
        self._resubmissions.labels(reason).inc()

    def set_expert_tokens(self, tokens: dict[Slot, int]) -> None:
        self._expert_tokens = tokens

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(
            telemetry.METRIC_FLEET_EXPERT_TOKENS,
            "Tokens that the gates of all shards alive sent to each logical expert",
            labels=("layer", "expert"),
        )
        for (layer, expert), count in sorted(self._expert_tokens.items()):
            family.add_metric((str(layer), str(expert)), count)
        return [family]
