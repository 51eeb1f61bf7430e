"""The engine's load at one moment, and the metrics made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from opentelemetry.trace import Span
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router_service.engine.step_timings import StepTimings
from router_service.session_tier.session_tier import SessionTierStats
from services.core import telemetry
from services.core.metrics import REQUEST_BUCKETS_S, TOKEN_BUCKETS_S
from services.core.tracing import trace_exemplar


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges of now and counts since start.

    What a resumed request brings along counts as prompt. `num_recomputed_tokens` are those tokens
    of resumed requests whose KV was neither here nor in the store.
    `waiting_tokens` are prompt tokens not yet admitted, and `predicted_wait_s` how long a request
    that came now would wait for its turn. `num_cached_tokens` counts prompt tokens
    whose KV was not recomputed, `num_restored_tokens` those among them that came from the session
    store. `expert_load` is int64 [layers, experts], assignments since start. `num_micro_batches`
    is how many the last step was split into, `timings` where the time of all steps went.
    """

    num_running: int
    num_waiting: int
    waiting_tokens: int
    kv_blocks_used: int
    kv_blocks_total: int
    num_steps: int
    num_prompt_tokens: int
    num_prefilled_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    num_restored_tokens: int
    num_preemptions: int
    num_resumed_requests: int
    num_recomputed_tokens: int
    expert_load: NDArray[np.int64]
    sessions: SessionTierStats | None = None
    predicted_wait_s: float = 0.0
    num_micro_batches: int = 0
    timings: StepTimings = field(default_factory=StepTimings)


class EngineMetrics(Collector):
    """The engine's Prometheus metrics. Everything but the step histogram is read at scrape.

    Counts per (layer, expert) are exported by the expert backend itself.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._stats: Callable[[], EngineStats] | None = None
        self._steps = Histogram(
            telemetry.METRIC_STEP,
            "Duration of an engine step",
            buckets=TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._phases = Histogram(
            telemetry.METRIC_REQUEST_PHASE,
            "Duration of a request's phase: queue until admitted, prefill until its first token, "
            "decode until its last",
            ["phase"],
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        registry.register(self)

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Whom to ask at scrape; called by the engine."""
        self._stats = stats

    def observe_step(self, seconds: float, span: Span | None = None) -> None:
        """`span`: the step's own, where it is sampled."""
        self._steps.observe(seconds, trace_exemplar(span))

    def observe_phase(self, phase: str, seconds: float, span: Span) -> None:
        """A phase of a request is over; `span` is the request's."""
        self._phases.labels(phase).observe(seconds, trace_exemplar(span))

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        if self._stats is None:
            return
        stats = self._stats()
        for name, text, value in (
            (telemetry.METRIC_RUNNING, "Sequences in the running batch", stats.num_running),
            (telemetry.METRIC_WAITING, "Sequences that wait to be admitted", stats.num_waiting),
            (telemetry.METRIC_WAITING_TOKENS, "Prompt tokens that wait", stats.waiting_tokens),
            (
                telemetry.METRIC_PREDICTED_WAIT,
                "Seconds until the turn of a request that comes now, as predicted",
                stats.predicted_wait_s,
            ),
            (telemetry.METRIC_KV_USED, "KV blocks that sequences hold", stats.kv_blocks_used),
            (telemetry.METRIC_KV_TOTAL, "KV blocks of the cache", stats.kv_blocks_total),
            (telemetry.METRIC_MICRO_BATCHES, "Parts of the last step", stats.num_micro_batches),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        for name, text, value in (
            (telemetry.METRIC_PROMPT_TOKENS, "Tokens of admitted prompts", stats.num_prompt_tokens),
            (telemetry.METRIC_PREFILLED_TOKENS, "Tokens prefilled", stats.num_prefilled_tokens),
            (telemetry.METRIC_GENERATED_TOKENS, "Tokens drawn", stats.num_generated_tokens),
            (telemetry.METRIC_CACHED_TOKENS, "Prompt tokens reused", stats.num_cached_tokens),
            (telemetry.METRIC_RESTORED_TOKENS, "Tokens from sessions", stats.num_restored_tokens),
            (telemetry.METRIC_PREEMPTIONS, "Sequences evicted", stats.num_preemptions),
            (
                telemetry.METRIC_RESUMED_REQUESTS,
                "Requests that another shard had before and was lost",
                stats.num_resumed_requests,
            ),
            (
                telemetry.METRIC_RECOMPUTED_TOKENS,
                "Tokens of resumed requests that had to be computed again",
                stats.num_recomputed_tokens,
            ),
            (
                telemetry.METRIC_FULL_STEPS,
                "Seconds of steps, each weighted by how full it was",
                stats.timings.full_s,
            ),
        ):
            yield CounterMetricFamily(name.removesuffix("_total"), text, value=value)
        yield _part_family(stats.timings)
        if stats.sessions is not None:
            yield from _session_families(stats.sessions)


def _part_family(timings: StepTimings) -> CounterMetricFamily:
    family = CounterMetricFamily(
        telemetry.METRIC_STEP_PARTS.removesuffix("_total"),
        "Seconds that the parts of all steps took",
        labels=["part"],
    )
    for part, seconds in timings.parts().items():
        family.add_metric([part], seconds)
    return family


def _session_families(stats: SessionTierStats) -> Iterator[Metric]:
    refused = CounterMetricFamily(
        telemetry.METRIC_REFUSED_BLOCKS.removesuffix("_total"),
        "Stored blocks that were refused and recomputed",
        labels=["reason"],
    )
    for reason, count in sorted(stats.refused.items()):
        refused.add_metric([reason], count)
    yield refused
    written = CounterMetricFamily(
        telemetry.METRIC_SESSION_BLOCKS.removesuffix("_total"),
        "Blocks offered to the session store, by what became of them",
        labels=["outcome"],
    )
    written.add_metric(["stored"], stats.num_stored)
    written.add_metric(["dropped"], stats.num_dropped)
    written.add_metric(["failed"], stats.num_failed)
    yield written
