"""The life of an expert worker: listen, load, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TypeVar

import psutil
import torch

from expert_service.allocator import map_blocks_from
from expert_service.dispatch import DispatchService
from expert_service.held_experts import HeldExperts, LoadingCancelledError, load_experts
from expert_service.server import WorkerServer, join_host_port
from expert_service.slots import select_slots
from expert_service.worker_stats import WorkerStats
from protos import experts_pb2
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.errors import ConfigurationError
from services.core.kernels.choice import kernels_name, native_kernels_for, set_num_threads
from services.core.lease import Lease
from services.core.registry import Registry, WorkerRecord, WorkerStateName
from services.core.settings import Settings
from services.core.tensor_codec import DTYPE_TO_PROTO, resolve_device, torch_dtype

_STOP_GRACE_S = 0.5
_LOADING_MAPPED_BYTES = 1 << 20
_SERVING_MAPPED_BYTES = 32 << 20
_T = TypeVar("_T")
_logger = logging.getLogger(__name__)

_STATES = {
    "loading": experts_pb2.WORKER_STATE_LOADING,
    "ready": experts_pb2.WORKER_STATE_READY,
    "draining": experts_pb2.WORKER_STATE_DRAINING,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What one worker is told apart from the fleet's settings.

    `layers` None is every layer. `port` 0 takes a free one. Others reach the worker at
    `advertised_host`.
    """

    worker_id: str
    experts: Sequence[int]
    layers: Sequence[int] | None
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
        self._checkpoint: Checkpoint | None = None
        self._experts: HeldExperts | None = None
        self._stop = asyncio.Event()
        self._server = WorkerServer(
            dispatch=dispatch, describe=self._describe, max_frame_bytes=settings.max_frame_bytes
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

    async def run(self) -> bool:
        """Serve; true if everything accepted was answered.

        Raises `ConfigurationError` or `CheckpointError` when the worker cannot start.
        """
        options = self._options
        self._port = await self._server.start(options.host, options.port)
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
        """Load on a thread of its own; false if told to stop before it was done."""
        cancelled = threading.Event()
        loading = _in_daemon_thread(lambda: self._read_weights(cancelled))
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not loading.done():
            cancelled.set()
            loading.cancel()
            return False
        self._checkpoint, self._experts = loading.result()
        _logger.info(
            "loaded %d experts of %s in %.1f s: %d MB read, %d MB of weights as %s on %s (%s)",
            len(self._experts.digests),
            self._checkpoint.name,
            time.time() - self._started_at,
            self._checkpoint.bytes_read // 1_000_000,
            self._experts.weight_bytes // 1_000_000,
            self._experts.weight_format,
            self._experts.device,
            kernels_name(self._experts.dtype, self._experts.device),
        )
        self._dispatch.open(self._experts, num_threads=self._options.num_threads)
        return True

    def _read_weights(self, cancelled: threading.Event) -> tuple[Checkpoint, HeldExperts]:
        set_num_threads(self._options.num_threads)
        map_blocks_from(_LOADING_MAPPED_BYTES)
        settings = self._settings
        device = resolve_device(settings.device)
        checkpoint = Checkpoint.open(settings.model)
        config = checkpoint.config
        slots = select_slots(config, self._options.experts, self._options.layers)
        dtype = torch_dtype(config.dtype if settings.dtype == "auto" else settings.dtype)
        _logger.info("loading %d experts of %s", len(slots), checkpoint.name)
        experts = load_experts(
            checkpoint,
            slots,
            dtype=dtype,
            device=device,
            cancelled=cancelled,
            expert_weights=settings.expert_weights,
            computed_by=_kernels_to_agree_on(settings, dtype, device),
        )
        map_blocks_from(_SERVING_MAPPED_BYTES)
        return checkpoint, experts

    async def _drain(self) -> bool:
        timeout_s = self._settings.drain_timeout_s
        _logger.info("draining")
        try:
            async with asyncio.timeout(timeout_s):
                drained = asyncio.ensure_future(self._dispatch.drain())
                await self._set_state("draining")
                await drained
        except TimeoutError:
            _logger.warning("frames were left unanswered after %.1f s of draining", timeout_s)
            return False
        _logger.info("drained")
        return True

    async def _set_state(self, state: WorkerStateName) -> None:
        self._state = state
        await self._server.set_serving(state == "ready")
        if self._lease:
            await self._lease.publish()

    def _record(self) -> WorkerRecord:
        means = self._stats.read_interval()
        experts = self._experts
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
            memory_free_bytes=_memory_free_bytes(experts.device if experts else None),
            metrics_endpoint=self._metrics_endpoint,
            tokens=self._stats.tokens(),
            queue_ms=means.queue_ms,
            compute_ms=means.compute_ms,
            num_frames=self._stats.num_frames,
        )

    async def _describe(
        self, _request: experts_pb2.DescribeRequest, _context: object
    ) -> experts_pb2.DescribeResponse:
        described = experts_pb2.DescribeResponse(
            worker_id=self._options.worker_id,
            version=_version(),
            state=_STATES[self._state],
            max_frame_bytes=self._settings.max_frame_bytes,
        )
        if self._checkpoint is not None and self._experts is not None:
            described.MergeFrom(_describe_held(self._checkpoint, self._experts))
            described.model = self._settings.served_model_name or self._checkpoint.name
        return described


def _kernels_to_agree_on(settings: Settings, dtype: torch.dtype, device: torch.device) -> str:
    """Name of what computes, if answers must be reproducible; else nothing.

    Raises `ConfigurationError` where a row's bits would depend on the rows beside it.
    """
    if not settings.reproducible:
        return ""
    if native_kernels_for(dtype, device) is None:
        raise ConfigurationError(
            f"experts computed by torch in {dtype} on {device} are not reproducible: "
            "use bfloat16 or float32 on a CPU with AVX2, and build the native kernels with "
            "`python -m services.core.kernels.build`; or start without --reproducible",
            setting="reproducible",
        )
    return kernels_name(dtype, device)


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
        slots=[
            experts_pb2.Slot(layer=layer, expert=expert, digest=digest)
            for (layer, expert), digest in sorted(experts.digests.items())
        ],
        weight_bytes=experts.weight_bytes,
        memory_free_bytes=_memory_free_bytes(experts.device),
        checkpoint_bytes_read=checkpoint.bytes_read,
    )


def _version() -> str:
    try:
        return metadata.version("expertfleet")
    except metadata.PackageNotFoundError:
        return "unknown"


def _memory_free_bytes(device: torch.device | None) -> int:
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _in_daemon_thread(work: Callable[[], _T]) -> asyncio.Future[_T]:
    """Run `work` on a thread that does not keep the process alive when it is abandoned."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            result = work()
        except LoadingCancelledError:
            return
        except Exception as error:  # noqa: BLE001 - handed to the awaiting task
            loop.call_soon_threadsafe(settle, None, error)
        else:
            loop.call_soon_threadsafe(settle, result, None)

    threading.Thread(target=run, name="load", daemon=True).start()
    return future
