"""Start an expert worker process and see it through to its exit status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket

import torch
import uvloop

from expert_service.dispatch import DispatchService
from expert_service.frame_spans import FrameSpans
from expert_service.server import join_host_port
from expert_service.slots import SlotGroup, parse_indices, parse_slots
from expert_service.worker import ExpertWorker, WorkerOptions
from expert_service.worker_stats import WorkerStats
from services.core.errors import EXIT_BAD_INPUT, CheckpointError, ConfigurationError
from services.core.heap import freeze_heap
from services.core.kernels.choice import set_num_threads
from services.core.logging_setup import configure_logging
from services.core.metrics import MetricsServer, new_registry
from services.core.redis_registry import RedisRegistry
from services.core.registry import Registry
from services.core.settings import Settings
from services.core.telemetry import SERVICE_WORKER
from services.core.tracing import configure_tracing

EXIT_OK = 0
EXIT_UNANSWERED = 1

_WILDCARD_HOSTS = ("", "0.0.0.0", "::", "[::]")
_logger = logging.getLogger(__name__)


def run_worker(
    settings: Settings,
    *,
    experts: str | None = None,
    layers: str | None = None,
    slots: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    worker_id: str | None = None,
    metrics_port: int = 0,
    advertised_host: str | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT and return the exit status. Blocks; call in the main thread.

    `experts` and `layers` are like "0,1,4-6" (`layers` None: all of them); `slots`, instead of
    both, like "0-3:0,1;5:7" (layers of experts; `parse_slots`). A second signal ends
    the process at once.
    """
    worker_id = worker_id or f"worker-{secrets.token_hex(4)}"
    configure_logging(settings.log_level, service="worker", instance=worker_id)
    num_threads = settings.num_threads or _fitted_threads()
    set_num_threads(num_threads)
    torch.set_num_interop_threads(1)
    try:
        options = WorkerOptions(
            worker_id=worker_id,
            slots=_slot_groups(experts, layers, slots),
            host=host,
            port=port,
            metrics_port=metrics_port,
            advertised_host=advertised_host or _reachable_host(host),
            num_threads=num_threads,
        )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            is_drained = runner.run(serve(settings, options))
    except (ConfigurationError, CheckpointError) as error:
        _logger.error("%s", error.message)
        return EXIT_BAD_INPUT
    return EXIT_OK if is_drained else EXIT_UNANSWERED


async def serve(settings: Settings, options: WorkerOptions) -> bool:
    """Build the worker with what the settings name and run it until a signal."""
    collectors = new_registry()
    stats = WorkerStats(collectors)
    async with contextlib.AsyncExitStack() as cleanup:
        tracing = configure_tracing(settings, SERVICE_WORKER, instance_id=options.worker_id)
        cleanup.callback(tracing.shutdown)
        metrics = MetricsServer(collectors, options.host, options.metrics_port)
        cleanup.callback(metrics.close)
        registry: Registry | None = None
        if settings.redis_url:
            redis = RedisRegistry(settings.redis_url, fleet=settings.fleet)
            cleanup.push_async_callback(redis.close)
            registry = redis
        dispatch = DispatchService(
            max_frame_bytes=settings.max_frame_bytes,
            stats=stats,
            spans=FrameSpans(tracing.tracer, worker_id=options.worker_id),
        )
        worker = ExpertWorker(
            settings,
            options,
            dispatch=dispatch,
            stats=stats,
            tracer=tracing.tracer,
            registry=registry,
            metrics_endpoint=join_host_port(options.advertised_host, metrics.port),
        )
        _stop_on_signals(worker)
        freeze_heap()
        return await worker.run()


def _stop_on_signals(worker: ExpertWorker) -> None:
    loop = asyncio.get_running_loop()
    seen: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        if seen:
            _logger.warning("second signal (%s): ending at once", number.name)
            logging.shutdown()
            os._exit(128 + number)
        seen.append(number)
        _logger.info("%s received", number.name)
        worker.request_stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)


def _slot_groups(
    experts: str | None, layers: str | None, slots: str | None
) -> tuple[SlotGroup, ...]:
    if slots is not None and experts is None and layers is None:
        return parse_slots(slots)
    if slots is not None or experts is None:
        raise ConfigurationError(
            "say what the worker is to hold by --experts (and --layers), or by --slots alone",
            setting="slots",
        )
    return (
        SlotGroup(
            experts=parse_indices(experts, setting="experts"),
            layers=None if layers is None else parse_indices(layers, setting="layers"),
        ),
    )


def _fitted_threads() -> int:
    """One core is left for the event loop, which would otherwise wait for torch."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def _reachable_host(host: str) -> str:
    """Where others reach a worker that listens on `host`: its own address, if on all."""
    if host not in _WILDCARD_HOSTS:
        return host
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return socket.gethostname()
