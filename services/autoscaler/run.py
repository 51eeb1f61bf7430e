"""The autoscaler put together, for the launcher and for the command line."""

from __future__ import annotations

from opentelemetry import trace
from prometheus_client import CollectorRegistry

from services.autoscaler.actuators import GrpcSlotControl, SlotControl, WorkerScaler
from services.autoscaler.autoscaler import Autoscaler
from services.autoscaler.leader import Leadership, RedisLeader, SoleLeader
from services.autoscaler.metrics import AutoscalerMetrics
from services.autoscaler.options import PolicyOptions
from services.core.registry import Registry
from services.core.settings import Settings
from services.core.tls import peer_tls


async def run_autoscaler(
    settings: Settings,
    registry: Registry,
    options: PolicyOptions,
    *,
    scaler: WorkerScaler | None,
    tracer: trace.Tracer | None = None,
    collectors: CollectorRegistry | None = None,
    slot_control: SlotControl | None = None,
    interval_s: float = 1.0,
) -> None:
    """Keep the fleet's replicas and workers fitting its load until cancelled.

    `scaler` starts and ends workers; None leaves their number alone. With a store, only one
    autoscaler of a fleet acts at a time.
    """
    leadership: Leadership = SoleLeader()
    if settings.redis_url:
        leadership = RedisLeader(
            settings.redis_url, fleet=settings.fleet, ttl_s=max(5.0, 3 * interval_s)
        )
    autoscaler = Autoscaler(
        registry,
        options,
        slot_control=slot_control or GrpcSlotControl(tls=peer_tls(settings)),
        scaler=scaler,
        leadership=leadership,
        tracer=tracer or trace.NoOpTracer(),
        metrics=AutoscalerMetrics(collectors or CollectorRegistry()),
    )
    await autoscaler.run(interval_s)
