"""The life of an expert worker: listen, load, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata

from opentelemetry.trace import Tracer

from expert_service.control_calls import WorkerControl, slot_messages
from expert_service.dispatch import DispatchService
from expert_service.expert_loader import ExpertLoader
from expert_service.held_experts import HeldExperts, LoadingCancelledError
from expert_service.lane import WorkerLane
from expert_service.server import WorkerServer, join_host_port
from expert_service.slot_control import SlotControl
from expert_service.slots import SlotGroup, select_slots
from expert_service.worker_stats import WorkerStats
from protos import experts_pb2
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.kernels.choice import kernels_name
from services.core.lease import Lease
from services.core.registry import Registry, WorkerRecord, WorkerStateName
from services.core.settings import Settings
from services.core.tensor_codec import DTYPE_TO_PROTO
from services.core.tls import peer_tls

_STOP_GRACE_S = 0.5
_logger = logging.getLogger(__name__)

_STATES = {
    "loading": experts_pb2.WORKER_STATE_LOADING,
    "ready": experts_pb2.WORKER_STATE_READY,
    "draining": experts_pb2.WORKER_STATE_DRAINING,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What one worker is told apart from the fleet's settings.

    `port` 0 takes a free one. Others reach the worker at
    `advertised_host`.
    """

    worker_id: str
    slots: Sequence[SlotGroup]
    host: str
    port: int
    advertised_host: str
    num_threads: int
    metrics_port: int = 0


class ExpertWorker:
    """Serves until `request_stop`. The registry is optional: without one, workers are listed."""

    def __init__(
        self,
        settings: Settings,
        options: WorkerOptions,
        *,
        dispatch: DispatchService,
        stats: WorkerStats,
        tracer: Tracer,
        registry: Registry | None = None,
        metrics_endpoint: str | None = None,
    ) -> None:
        self._settings = settings
        self._options = options
        self._dispatch = dispatch
        self._stats = stats
        self._metrics_endpoint = metrics_endpoint
        self._state: WorkerStateName = "loading"
        self._started_at = time.time()
        self._port = 0
        self._lane: WorkerLane | None = None
        self._tls = peer_tls(settings)
        self._stop = asyncio.Event()
        self._draining_announced = asyncio.Event()
        self._slots = SlotControl(
            worker_id=options.worker_id,
            dispatch=dispatch,
            stats=stats,
            tracer=tracer,
            announce=self._publish,
        )
        self._server = WorkerServer(
            dispatch=dispatch,
            describe=self._describe,
            control=WorkerControl(self._slots, self.drain),
            max_frame_bytes=settings.max_frame_bytes,
            tls=self._tls,
        )
        self._lease = registry and Lease(
            registry,
            self._record,
            heartbeat_s=settings.heartbeat_s,
            lease_s=settings.lease_s,
        )

    def request_stop(self) -> None:
        """Drain and return from `run`."""
        self._stop.set()
        self._slots.stop()

    async def drain(self) -> None:
        """`request_stop`, and return when the draining is announced."""
        self.request_stop()
        await self._draining_announced.wait()

    async def run(self) -> bool:
        """Serve; true if everything accepted was answered.

        Raises `ConfigurationError` or `CheckpointError` when the worker cannot start.
        """
        options = self._options
        self._port = await self._server.start(options.host, options.port)
        if self._settings.dispatch_lane and self._tls is None:  # lanes are plain TCP
            self._lane = WorkerLane.start(
                options.host,
                self._settings.lane_port,
                max_frame_bytes=self._settings.max_frame_bytes,
                dispatch=self._dispatch,
                stats=self._stats,
            )
        _logger.info("listening on %s, metrics on %s", self.endpoint, self._metrics_endpoint)
        try:
            if self._lease:
                await self._lease.start()
            if await self._load():
                await self._set_state("ready")
                _logger.info("ready")
                await self._stop.wait()
            return await self._drain()
        finally:
            if self._lease:
                await self._lease.end(options.worker_id)
            await self._server.stop(_STOP_GRACE_S)
            self._dispatch.close()

    @property
    def endpoint(self) -> str:
        return join_host_port(self._options.advertised_host, self._port)

    async def _load(self) -> bool:
        """False if told to stop before it was done."""
        try:
            await self._slots.start(
                partial(ExpertLoader, self._settings),
                lambda loader: select_slots(loader.config, self._options.slots),
                num_threads=self._options.num_threads,
                limit_bytes=self._settings.worker_memory_bytes,
            )
        except LoadingCancelledError:
            return False
        experts, loader = self._slots.experts, self._slots.loader
        assert experts is not None and loader is not None
        _logger.info(
            "loaded %d experts of %s in %.1f s: %d MB read, %d MB of weights as %s on %s (%s)",
            len(experts.digests),
            loader.checkpoint.name,
            time.time() - self._started_at,
            loader.checkpoint.bytes_read // 1_000_000,
            experts.weight_bytes // 1_000_000,
            experts.weight_format,
            experts.device,
            kernels_name(experts.dtype, experts.device),
        )
        return True

    async def _drain(self) -> bool:
        timeout_s = self._settings.drain_timeout_s
        _logger.info("draining")
        try:
            async with asyncio.timeout(timeout_s):
                drained = asyncio.ensure_future(self._dispatch.drain())
                await self._set_state("draining")
                self._draining_announced.set()
                await drained
        except TimeoutError:
            _logger.warning("frames were left unanswered after %.1f s of draining", timeout_s)
            return False
        finally:
            self._draining_announced.set()
        _logger.info("drained")
        return True

    async def _set_state(self, state: WorkerStateName) -> None:
        self._state = state
        await self._server.set_serving(state == "ready")
        await self._publish()

    async def _publish(self) -> None:
        if self._lease:
            await self._lease.publish()

    def _record(self) -> WorkerRecord:
        means = self._stats.read_interval()
        experts = self._slots.experts
        memory_free_bytes = self._slots.memory_free_bytes()
        self._stats.show_held(
            num_slots=len(experts.digests) if experts else 0,
            weight_bytes=experts.weight_bytes if experts else 0,
            memory_free_bytes=memory_free_bytes,
        )
        return WorkerRecord(
            worker_id=self._options.worker_id,
            endpoint=self.endpoint,
            state=self._state,
            slots=frozenset(experts.digests if experts else ()),
            device=str(experts.device if experts else self._settings.device),
            pid=os.getpid(),
            host=socket.gethostname(),
            started_at=self._started_at,
            weight_bytes=experts.weight_bytes if experts else 0,
            memory_free_bytes=memory_free_bytes,
            metrics_endpoint=self._metrics_endpoint,
            tokens=self._stats.tokens(),
            queue_ms=means.queue_ms,
            compute_ms=means.compute_ms,
            num_frames=self._stats.num_frames,
            slot_bytes=experts.slot_bytes if experts else 0,
            memory_limit_bytes=self._slots.memory_limit_bytes,
            busy_s=self._stats.busy_s,
            num_threads=self._options.num_threads,
        )

    async def _describe(
        self, _request: experts_pb2.DescribeRequest, _context: object
    ) -> experts_pb2.DescribeResponse:
        described = experts_pb2.DescribeResponse(
            worker_id=self._options.worker_id,
            version=_version(),
            state=_STATES[self._state],
            max_frame_bytes=self._settings.max_frame_bytes,
            lane_port=self._lane.port if self._lane else 0,
        )
        loader, experts = self._slots.loader, self._slots.experts
        if loader is not None and experts is not None:
            described.MergeFrom(_describe_held(loader.checkpoint, experts))
            described.model = self._settings.served_model_name or loader.checkpoint.name
            described.memory_free_bytes = self._slots.memory_free_bytes()
            described.memory_limit_bytes = self._slots.memory_limit_bytes
        return described


def _describe_held(checkpoint: Checkpoint, experts: HeldExperts) -> experts_pb2.DescribeResponse:
    config = checkpoint.config
    return experts_pb2.DescribeResponse(
        num_layers=config.num_hidden_layers,
        num_experts=config.num_local_experts,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        dtype=DTYPE_TO_PROTO[experts.dtype],
        weight_format=experts.weight_format,
        device=str(experts.device),
        slots=slot_messages(experts),
        slot_bytes=experts.slot_bytes,
        weight_bytes=experts.weight_bytes,
        checkpoint_bytes_read=checkpoint.bytes_read,
    )


def _version() -> str:
    try:
        return metadata.version("expertfleet")
    except metadata.PackageNotFoundError:
        return "unknown"
