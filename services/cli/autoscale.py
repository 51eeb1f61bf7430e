"""`expertfleet autoscale`: the hot-expert autoscaler by itself, or what it would do."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.autoscaler.actions import describe
from services.autoscaler.actuators import WorkerScaler
from services.autoscaler.dry_run import Proposal, propose
from services.autoscaler.groups import ExpertGroup, parse_group
from services.autoscaler.kubernetes import KubernetesScaler, in_cluster
from services.autoscaler.options import PolicyOptions
from services.autoscaler.run import run_autoscaler
from services.cli.state_folder import RunningInstance, default_state_dir
from services.cli.tables import titled_table
from services.core.errors import ConfigurationError
from services.core.logging_setup import configure_logging
from services.core.metrics import MetricsServer, new_registry
from services.core.redis_registry import RedisRegistry
from services.core.settings import Settings, load_settings
from services.core.telemetry import SERVICE_AUTOSCALER
from services.core.tracing import configure_tracing


class Mode(StrEnum):
    local = "local"
    kubernetes = "kubernetes"


def autoscale(
    mode: Annotated[
        Mode, typer.Option(help="local: replicas in memory only; kubernetes: pods as well")
    ] = Mode.local,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be done and why; change nothing")
    ] = False,
    once: Annotated[
        bool, typer.Option("--once", help="with --dry-run: watch for --watch-s, then end")
    ] = False,
    watch_s: Annotated[float, typer.Option(min=1, help="how long --once watches")] = 12.0,
    interval_s: Annotated[float, typer.Option(min=0.2, help="seconds between readings")] = 1.0,
    group: Annotated[
        list[str] | None,
        typer.Option(help="DEPLOYMENT=EXPERTS[@LAYERS][:MIN-MAX], once for each expert group"),
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="of the Deployments; default: ours")] = None,
    api_server: Annotated[
        str | None, typer.Option(help="default: the cluster this runs in; or a kubectl proxy")
    ] = None,
    min_replicas: Annotated[int, typer.Option(min=1, help="of every (layer, expert)")] = 1,
    max_replicas: Annotated[int, typer.Option(min=1, help="of every (layer, expert)")] = 4,
    min_workers: Annotated[int | None, typer.Option(min=1, help="default: seen first")] = None,
    max_workers: Annotated[int | None, typer.Option(min=1, help="default: seen first")] = None,
    hot_ratio: Annotated[float, typer.Option(min=1.01, help="load over the other workers'")] = 1.3,
    cool_ratio: Annotated[float, typer.Option(min=1, help="below it replicas are given back")] = (
        1.15
    ),
    cool_down_s: Annotated[float, typer.Option(min=0, help="between changes of a slot")] = 10.0,
    idle_after_s: Annotated[float, typer.Option(min=0, help="until idle room is given back")] = (
        30.0
    ),
    busy: Annotated[
        float, typer.Option(min=0.05, max=1, help="how saturated the fleet is until it grows")
    ] = 0.7,
    shadow_copies: Annotated[
        bool, typer.Option(help="use spare memory for second copies of every expert")
    ] = True,
    metrics_port: Annotated[int, typer.Option(help="Prometheus port; 0 picks one")] = 0,
    metrics_host: Annotated[str, typer.Option(help="address of the metrics")] = "127.0.0.1",
    state_dir: Annotated[Path | None, typer.Option(help="of the running product")] = None,
) -> None:
    """Give hot experts more room and take idle room back, from the load in the workers' leases."""
    groups = tuple(map(parse_group, group or ()))
    if mode is Mode.kubernetes and not groups:
        raise ConfigurationError(
            "--mode kubernetes needs the expert groups: --group DEPLOYMENT=EXPERTS for each",
            setting="group",
        )
    if groups and min_workers is None:
        min_workers = sum(group.min_replicas for group in groups)
    if groups and max_workers is None:
        max_workers = sum(group.max_replicas for group in groups)
    options = PolicyOptions(
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        min_workers=min_workers,
        max_workers=max_workers,
        hot_ratio=hot_ratio,
        cool_ratio=cool_ratio,
        cool_down_s=cool_down_s,
        idle_after_s=idle_after_s,
        scale_out_utilization=busy,
        shadow_copies=shadow_copies,
        scale_workers=mode is Mode.kubernetes or (dry_run and max_workers is not None),
    )
    settings = _with_store(load_settings(), state_dir)
    if dry_run:
        asyncio.run(_dry_run(settings, options, interval_s, watch_s if once else None))
        return
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(
            _run(
                settings,
                options,
                groups if mode is Mode.kubernetes else (),
                namespace=namespace,
                api_server=api_server,
                interval_s=interval_s,
                metrics_address=(metrics_host, metrics_port),
            )
        )


async def _run(
    settings: Settings,
    options: PolicyOptions,
    groups: Sequence[ExpertGroup],
    *,
    namespace: str | None,
    api_server: str | None,
    interval_s: float,
    metrics_address: tuple[str, int],
) -> None:
    instance = socket.gethostname()
    configure_logging(settings.log_level, service="autoscaler", instance=instance)
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    async with contextlib.AsyncExitStack() as cleanup:
        tracing = configure_tracing(settings, SERVICE_AUTOSCALER, instance_id=instance)
        cleanup.callback(tracing.shutdown)
        collectors = new_registry()
        metrics = MetricsServer(collectors, *metrics_address)
        cleanup.callback(metrics.close)
        registry = await cleanup.enter_async_context(_registry(settings))
        scaler: WorkerScaler | None = None
        if groups:
            kubernetes = KubernetesScaler(in_cluster(url=api_server, namespace=namespace), groups)
            cleanup.push_async_callback(kubernetes.close)
            scaler = kubernetes
        await run_autoscaler(
            settings,
            registry,
            options,
            scaler=scaler,
            tracer=tracing.tracer,
            collectors=collectors,
            interval_s=interval_s,
        )


async def _dry_run(
    settings: Settings, options: PolicyOptions, interval_s: float, watch_s: float | None
) -> None:
    console = Console()
    console.print(
        f"watching for {watch_s:.0f} s; nothing is changed"
        if watch_s
        else "watching until Ctrl-C; nothing is changed"
    )
    seen: list[Proposal] = []
    async with _registry(settings) as registry:
        proposals = propose(registry, options, interval_s=interval_s, watch_s=watch_s)
        with contextlib.suppress(asyncio.CancelledError):
            async for proposal in proposals:
                seen.append(proposal)
                if watch_s is None:
                    _print(console, [proposal])
    if watch_s is not None:
        _print(console, seen)


def _print(console: Console, proposals: Sequence[Proposal]) -> None:
    if not proposals:
        console.print("nothing would be done")
        return
    table = titled_table("what would be done, and why")
    for name in ("at", "purpose", "action", "reason"):
        table.add_column(name)
    for proposal in proposals:
        planned = proposal.planned
        moment = time.strftime("%H:%M:%S", time.localtime(proposal.at))
        table.add_row(moment, planned.purpose, describe(planned.action), planned.reason)
    console.print(table)


@contextlib.asynccontextmanager
async def _registry(settings: Settings) -> AsyncIterator[RedisRegistry]:
    registry = RedisRegistry(settings.redis_url or "", fleet=settings.fleet)
    try:
        yield registry
    finally:
        await registry.close()


def _with_store(settings: Settings, state_dir: Path | None) -> Settings:
    """The store of REDIS_URL, else that of the product running on this machine."""
    if settings.redis_url:
        return settings
    running = RunningInstance.find(state_dir or settings.state_dir or default_state_dir())
    return settings.override(redis_url=f"unix://{running.run_folder / 'store.sock'}")
