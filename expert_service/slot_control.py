"""What a worker holds, and how that changes while frames flow."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from typing import TypeVar

import torch
from opentelemetry.trace import Span, Tracer

from expert_service.background import in_daemon_thread
from expert_service.dispatch import DispatchService
from expert_service.expert_loader import ExpertLoader
from expert_service.held_experts import HeldExperts, LoadingCancelledError
from expert_service.memory import WeightMemory, device_free_bytes
from expert_service.slots import check_slots
from expert_service.worker_stats import WorkerStats
from services.core.errors import ConfigurationError, WorkerRefusedError
from services.core.kernels.choice import set_num_threads
from services.core.placement import format_slots
from services.core.registry import Slot
from services.core.telemetry import (
    ATTR_ERROR,
    ATTR_NUM_BYTES,
    ATTR_SLOTS,
    ATTR_WORKER_ID,
    SPAN_LOAD_SLOTS,
    SPAN_UNLOAD_SLOTS,
)
from services.core.tracing import extract_context

_T = TypeVar("_T")
_logger = logging.getLogger(__name__)


class SlotControl:
    """Loads and unloads experts. Used from one event loop, which it never holds up.

    Weights are read on a thread of their own, one load at a time. What is held is an immutable
    snapshot that `dispatch` is given anew at each change; `announce` then publishes the lease.
    """

    def __init__(
        self,
        *,
        worker_id: str,
        dispatch: DispatchService,
        stats: WorkerStats,
        tracer: Tracer,
        announce: Callable[[], Awaitable[None]],
    ) -> None:
        self._worker_id = worker_id
        self._dispatch = dispatch
        self._stats = stats
        self._tracer = tracer
        self._announce = announce
        self._stopping = asyncio.Event()
        self._is_loading = False
        self._loader: ExpertLoader | None = None
        self._experts: HeldExperts | None = None
        self._memory: WeightMemory | None = None

    @property
    def loader(self) -> ExpertLoader | None:
        """None until `start` is done."""
        return self._loader

    @property
    def experts(self) -> HeldExperts | None:
        """None until `start` is done."""
        return self._experts

    @property
    def is_loading(self) -> bool:
        """Also while a load that was given up has not noticed yet."""
        return self._is_loading

    @property
    def memory_limit_bytes(self) -> int:
        """What the weights of all slots may take; 0 until `start` is done."""
        return self._memory.limit_bytes if self._memory else 0

    def memory_free_bytes(self) -> int:
        """What further slots may take; 0 until `start` is done."""
        if self._memory is None or self._experts is None:
            return 0
        device = self._experts.device
        return self._memory.free_bytes(self._experts.weight_bytes, device_free_bytes(device))

    async def start(
        self,
        open_loader: Callable[[], ExpertLoader],
        choose: Callable[[ExpertLoader], Collection[Slot]],
        *,
        num_threads: int,
        limit_bytes: int | None,
    ) -> None:
        """Open the checkpoint, load the slots chosen of it, and have `dispatch` take frames.

        Raises `ConfigurationError`, `CheckpointError`, or `LoadingCancelledError` after `stop`.
        """

        def read(cancelled: threading.Event) -> tuple[ExpertLoader, HeldExperts]:
            set_num_threads(num_threads)
            loader = open_loader()
            slots = sorted(choose(loader))
            _check_limit(loader.weight_bytes(slots), limit_bytes)
            return loader, loader.load(slots, cancelled)

        loader, experts = await self._in_background(read)
        self._loader, self._experts = loader, experts
        self._memory = WeightMemory(
            limit_bytes,
            held_bytes=experts.weight_bytes,
            device_free_bytes=device_free_bytes(experts.device),
        )
        self._dispatch.open(experts, num_threads=num_threads)

    def stop(self) -> None:
        """Give up what is being loaded, and refuse changes from now on."""
        self._stopping.set()

    async def load(
        self, slots: Collection[Slot], *, carrier: Mapping[str, str] | None = None
    ) -> None:
        """Hold these too; returns when they are announced. Cancelling it gives the loading up.

        Raises `InvalidRequestError` (no such slot), `WorkerMemoryError`, `WorkerRefusedError`
        (another load runs, or the worker is loading or draining) or `CheckpointError` naming file
        and tensor; what was held is then held on. `carrier` is the caller's trace context.
        """
        loader, experts, memory = self._started()
        check_slots(loader.config, slots)
        new = sorted(set(slots) - experts.digests.keys())
        if not new:
            return
        if self._is_loading:
            raise WorkerRefusedError(
                "this worker is loading other slots; ask again when it is done"
            )
        wanted_bytes = loader.weight_bytes(new)
        with self._span(SPAN_LOAD_SLOTS, new, carrier) as span:
            memory.check_room(
                wanted_bytes,
                held_bytes=experts.weight_bytes,
                device_free_bytes=device_free_bytes(experts.device),
            )
            del experts  # slots may be unloaded meanwhile
            started_s = time.monotonic()

            def read(cancelled: threading.Event) -> HeldExperts:
                torch.set_num_threads(1)  # of this thread: the others are for frames
                return loader.load(new, cancelled)

            try:
                loaded = await self._in_background(read)
            except LoadingCancelledError:
                raise _draining() from None
            self._adopt(self._held().with_slots(loaded))
            elapsed_s = time.monotonic() - started_s
            span.set_attribute(ATTR_NUM_BYTES, loaded.weight_bytes)
            _logger.info(
                "loaded slots %s in %.3f s: %d bytes of weights",
                format_slots(new),
                elapsed_s,
                loaded.weight_bytes,
            )
            self._stats.record_loaded(len(new), elapsed_s)
            await self._announce()

    async def unload(
        self, slots: Collection[Slot], *, carrier: Mapping[str, str] | None = None
    ) -> None:
        """Give these up; returns when that is announced. Their memory is released when the last
        frame that was accepted before is computed.

        Raises `InvalidRequestError` (no such slot) or `WorkerRefusedError` (nothing would be left,
        or the worker is loading or draining).
        """
        loader, experts, memory = self._started()
        check_slots(loader.config, slots)
        leaving = sorted(experts.digests.keys() & set(slots))
        if not leaving:
            return
        with self._span(SPAN_UNLOAD_SLOTS, leaving, carrier) as span:
            if len(leaving) == len(experts.digests):
                raise WorkerRefusedError(
                    f"slots {format_slots(leaving)} are all that this worker holds; "
                    "drain it instead"
                )
            memory.give_up([experts.layers[layer][expert] for layer, expert in leaving])
            kept = experts.without_slots(set(leaving))
            span.set_attribute(ATTR_NUM_BYTES, experts.weight_bytes - kept.weight_bytes)
            _logger.info(
                "unloaded slots %s: %d bytes of weights",
                format_slots(leaving),
                experts.weight_bytes - kept.weight_bytes,
            )
            self._adopt(kept)
            del experts
            self._stats.record_unloaded(len(leaving))
            await self._announce()

    def _adopt(self, experts: HeldExperts) -> None:
        self._experts = experts
        self._dispatch.replace(experts)

    def _started(self) -> tuple[ExpertLoader, HeldExperts, WeightMemory]:
        if self._stopping.is_set():
            raise _draining()
        if self._loader is None or self._experts is None or self._memory is None:
            raise WorkerRefusedError("this worker is still loading; ask again when it is ready")
        return self._loader, self._experts, self._memory

    def _held(self) -> HeldExperts:
        assert self._experts is not None
        return self._experts

    async def _in_background(self, work: Callable[[threading.Event], _T]) -> _T:
        """`work` on a thread of its own. When this is cancelled, or after `stop` with a
        `LoadingCancelledError`, the thread is told so and left alone."""
        cancelled = threading.Event()
        loading = in_daemon_thread(lambda: work(cancelled), name="load")
        self._is_loading = True
        loading.add_done_callback(self._loading_ended)
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
            if self._stopping.is_set():
                raise LoadingCancelledError
            return loading.result()
        finally:
            cancelled.set()
            stopping.cancel()

    def _loading_ended(self, _loading: asyncio.Future[_T]) -> None:
        self._is_loading = False

    @contextlib.contextmanager
    def _span(
        self, name: str, slots: Collection[Slot], carrier: Mapping[str, str] | None
    ) -> Iterator[Span]:
        attributes = {ATTR_WORKER_ID: self._worker_id, ATTR_SLOTS: format_slots(slots)}
        parent = extract_context(carrier or {})
        with self._tracer.start_as_current_span(
            name, context=parent, attributes=attributes, record_exception=False
        ) as span:
            try:
                yield span
            except Exception as error:
                span.set_attribute(ATTR_ERROR, str(error))
                _logger.warning("%s of %s failed: %s", name, attributes[ATTR_SLOTS], error)
                raise


def _check_limit(wanted_bytes: int, limit_bytes: int | None) -> None:
    if limit_bytes is not None and wanted_bytes > limit_bytes:
        raise ConfigurationError(
            f"EXPERTFLEET_WORKER_MEMORY_BYTES={limit_bytes}, but the slots to hold take "
            f"{wanted_bytes} bytes; raise it or give this worker fewer slots",
            setting="worker_memory_bytes",
        )


def _draining() -> WorkerRefusedError:
    return WorkerRefusedError("this worker is draining; it loads and unloads nothing any more")
