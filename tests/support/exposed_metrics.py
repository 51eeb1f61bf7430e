"""Every metric that the product exposes, with its labels, from the parts that expose them."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import get_args

import numpy as np
from opentelemetry.trace import INVALID_SPAN
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from expert_service.worker_stats import WorkerStats
from protos import experts_pb2
from router_service.dispatch.dispatch_telemetry import DispatchTelemetry
from router_service.dispatch.expert_load import ExpertLoad
from router_service.dispatch.replica_chooser import WorkerFigures
from router_service.engine.engine_stats import EngineMetrics, EngineStats
from router_service.session_tier.session_tier import SessionTierStats
from services.autoscaler.metrics import AutoscalerMetrics
from services.autoscaler.state import PolicyState
from services.autoscaler.view import FleetView
from services.core.errors import LossReason
from services.core.registry import FleetSnapshot
from services.gateway.metrics import GatewayMetrics
from tests.support.records import shard_record, worker_record


@functools.cache
def exposed_metrics() -> dict[str, frozenset[str]]:
    """Names of samples and the labels that they have; what Prometheus itself adds is not there."""
    labels: dict[str, set[str]] = defaultdict(set)
    for family in _families():
        for sample in family.samples:
            labels[sample.name] |= set(sample.labels)
    return {name: frozenset(found) for name, found in labels.items()}


def _families() -> list[Metric]:
    registries = [_gateway(), _shard(), _worker(), _autoscaler()]
    return [family for registry in registries for family in registry.collect()]


def _gateway() -> CollectorRegistry:
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry)
    metrics.observe_request("/v1/completions", 200, 0.1, INVALID_SPAN)
    for reason in get_args(LossReason):
        metrics.observe_resubmission(reason)
    snapshot = FleetSnapshot(
        workers=(worker_record("w"),),
        shards=(shard_record("s", expert_load={(0, 0): 1}),),
    )
    metrics.fleet.show(snapshot, num_layers=1, num_experts=1)
    return registry


def _shard() -> CollectorRegistry:
    registry = CollectorRegistry()
    engine = EngineMetrics(registry)
    engine.watch(_engine_stats)
    engine.observe_step(0.1)
    engine.observe_phase("queue", 0.1, INVALID_SPAN)
    ExpertLoad(1, 1).export(registry)
    dispatch = DispatchTelemetry(None, registry)
    figures = WorkerFigures(worker_id="w", outstanding_rows=1, deadline_s=1.0, is_ejected=False)
    dispatch.export_workers(lambda: iter([figures]), lambda: 0)
    dispatch.observe("w", 0.1)
    dispatch.count_retry("broken")
    return registry


def _engine_stats() -> EngineStats:
    return EngineStats(
        num_running=0,
        num_waiting=0,
        waiting_tokens=0,
        kv_blocks_used=0,
        kv_blocks_total=1,
        num_steps=0,
        num_prompt_tokens=0,
        num_prefilled_tokens=0,
        num_generated_tokens=0,
        num_cached_tokens=0,
        num_restored_tokens=0,
        num_preemptions=0,
        num_resumed_requests=0,
        num_recomputed_tokens=0,
        expert_load=np.zeros((1, 1), dtype=np.int64),
        sessions=SessionTierStats(
            num_stored=0, num_dropped=0, num_failed=0, queued_bytes=0, refused={"torn": 1}
        ),
    )


def _worker() -> CollectorRegistry:
    registry = CollectorRegistry()
    stats = WorkerStats(registry)
    stats.record_frame(
        layer=0, expert_ids=[0], rows_per_expert=[1], queue_us=1, compute_us=1, batch_rows=1
    )
    stats.record_refused(experts_pb2.DISPATCH_STATUS_DRAINING)
    return registry


def _autoscaler() -> CollectorRegistry:
    registry = CollectorRegistry()
    metrics = AutoscalerMetrics(registry)
    state = PolicyState(known=frozenset({(0, 0)}))
    metrics.show(FleetView(workers={}), state, is_leader=True)
    metrics.count("relieve", "done")
    return registry
