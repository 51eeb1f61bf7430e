"""The autoscaler inside the launcher, which starts and ends the workers it asks for."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from services.autoscaler.actuators import WorkerScaler
from services.autoscaler.options import PolicyOptions
from services.autoscaler.run import run_autoscaler
from services.core.metrics import MetricsServer, new_registry
from services.core.redis_registry import RedisRegistry
from services.core.settings import Settings
from services.core.telemetry import SERVICE_AUTOSCALER
from services.core.tracing import configure_tracing

_INTERVAL_S = 0.5
"""Half a heartbeat: what a lease tells is acted on soon after."""
_logger = logging.getLogger(__name__)


class FleetAutoscaler:
    """Runs between `start` and `stop`, and can be started again, also for another fleet."""

    def __init__(self, scaler: WorkerScaler, options: PolicyOptions) -> None:
        self._scaler = scaler
        self._options = options
        self._task: asyncio.Task[None] | None = None

    def start(self, settings: Settings) -> None:
        self._task = asyncio.create_task(self._run(settings), name="autoscaler")
        self._task.add_done_callback(_log_crash)

    async def stop(self) -> None:
        """Actions under way are given up."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self, settings: Settings) -> None:
        async with contextlib.AsyncExitStack() as cleanup:
            tracing = configure_tracing(settings, SERVICE_AUTOSCALER, instance_id="launcher")
            cleanup.push_async_callback(asyncio.to_thread, tracing.shutdown)
            collectors = new_registry()
            metrics = MetricsServer(collectors, "127.0.0.1", 0)
            cleanup.callback(metrics.close)
            registry = RedisRegistry(settings.redis_url or "", fleet=settings.fleet)
            cleanup.push_async_callback(registry.close)
            _logger.info("autoscaling fleet %s; metrics on %s", settings.fleet, metrics.endpoint)
            await run_autoscaler(
                settings,
                registry,
                self._options,
                scaler=self._scaler,
                tracer=tracing.tracer,
                collectors=collectors,
                interval_s=_INTERVAL_S,
            )


def _log_crash(task: asyncio.Task[None]) -> None:
    """The fleet goes on as it is without an autoscaler."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _logger.critical("the autoscaler crashed", exc_info=error)
