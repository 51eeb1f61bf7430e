"""The worker's lanes: which experts they compute with, and the frames that Python answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

import torch

from expert_service.dispatch import Answer, DispatchService
from expert_service.held_experts import HeldExperts
from expert_service.worker_stats import WorkerStats
from services.core.errors import ConfigurationError
from services.core.kernels.library import native_library
from services.core.kernels.moe import NativeExpert
from services.core.lane.server import HandedFrame, LaneServer, has_lanes
from services.core.registry import Slot

_RECORD_EVERY_S = 0.1
_BACKLOG = 128


class WorkerLane:
    """Serves lanes beside the Dispatch call of `dispatch`, which it is the `Lane` of.

    Frames that are plain and good are computed by the native server's own thread; `dispatch`
    answers all others, so that statuses and texts come from one place. What was computed natively
    is counted in `stats`, and given its spans, every `_RECORD_EVERY_S` and before `stats` is read.
    """

    def __init__(
        self,
        server: LaneServer,
        port: int,
        notify_fd: int,
        dispatch: DispatchService,
        stats: WorkerStats,
    ) -> None:
        self._server = server
        self._port = port
        self._notify_fd = notify_fd
        self._dispatch = dispatch
        self._stats = stats
        self._computed_with: list[HeldExperts] = []
        """The last is the current one; those before may still be computed with."""
        self._is_native = False
        self._is_open = True
        self._drained = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(notify_fd, self._on_news)
        self._timer = self._loop.call_later(_RECORD_EVERY_S, self._on_timer)
        stats.add_source(self.record)
        dispatch.attach(self)

    @classmethod
    def start(
        cls,
        host: str,
        port: int,
        *,
        max_frame_bytes: int,
        dispatch: DispatchService,
        stats: WorkerStats,
    ) -> WorkerLane | None:
        """Listen; port 0 takes a free one. None where there are no lanes on this machine.

        Raises `ConfigurationError` if it cannot listen there. Call on the event loop.
        """
        library = native_library()
        if library is None or not has_lanes(library):
            return None
        notify_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            with _listen(host, port) as listener:
                bound_port = listener.getsockname()[1]
                server = LaneServer(library, listener, notify_fd, max_frame_bytes)
        except OSError as error:
            os.close(notify_fd)
            raise ConfigurationError(
                f"the worker cannot listen for lanes on {host}:{port} ({error}); choose another "
                "lane_port, or turn dispatch_lane off",
                setting="lane_port",
            ) from error
        return cls(server, bound_port, notify_fd, dispatch, stats)

    @property
    def port(self) -> int:
        """Where clients connect; 0 while lanes would bring them nothing."""
        return self._port if self._is_native and self._is_open else 0

    def hold(self, experts: HeldExperts | None) -> None:
        """Compute with these from now on; None: nothing. If not all of them are native, every
        frame is `dispatch`'s."""
        if not self._is_open:
            return
        native = _native_experts(experts) if experts is not None else None
        self._is_native = native is not None
        if experts is not None and native is not None:
            self._computed_with.append(experts)
            self._server.set_experts(
                native,
                dtype=experts.dtype,
                hidden_size=experts.hidden_size,
                expert_bytes=experts.slot_bytes,
            )
        else:
            self._server.set_experts({}, dtype=torch.float32, hidden_size=0, expert_bytes=0)
        self._forget_replaced()

    async def drain(self) -> None:
        """Take no more connections, and return when everything is answered. After `hold(None)`."""
        if self._is_open:
            self._server.drain()
            await self._drained.wait()

    def close(self) -> None:
        """Cut the connections. Blocks until what is computed at the moment is done."""
        if not self._is_open:
            return
        self.record()
        self._is_open = False
        self._timer.cancel()
        self._loop.remove_reader(self._notify_fd)
        self._server.close()
        os.close(self._notify_fd)
        self._computed_with.clear()
        self._drained.set()

    def record(self) -> None:
        """Count what was computed natively since the last time."""
        if not self._is_open:
            return
        for computed in self._server.take_computed():
            if computed.position == 0:
                self._stats.record_busy(computed.compute_us)
            self._stats.record_frame(
                layer=computed.layer,
                expert_ids=computed.expert_ids,
                rows_per_expert=computed.rows_per_expert,
                queue_us=computed.queue_us,
                compute_us=computed.compute_us,
                batch_rows=computed.batch_rows,
                traceparent=computed.traceparent,
            )
            self._dispatch.spans.record_frame(
                computed.traceparent,
                layer=computed.layer,
                num_tokens=computed.num_tokens,
                expert_ids=computed.expert_ids,
                rows_per_expert=computed.rows_per_expert,
                arrived_ns=computed.arrived_ns,
                queue_us=computed.queue_us,
                compute_us=computed.compute_us,
            )

    def is_connected(self, connection: int) -> bool:
        return self._is_open and self._server.is_connected(connection)

    def reply(self, connection: int, answer: Answer) -> None:
        if self._is_open:
            self._server.reply(connection, answer.frame, request_bytes=answer.request_bytes)

    def _on_timer(self) -> None:
        self.record()
        self._timer = self._loop.call_later(_RECORD_EVERY_S, self._on_timer)

    def _on_news(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._notify_fd)
        while (handed := self._server.next_handed()) is not None:
            self._accept(handed)
        self._forget_replaced()
        if self._server.is_drained():
            self._drained.set()

    def _accept(self, handed: HandedFrame) -> None:
        source = _LaneFrame(self, handed.connection)
        if handed.total_bytes > len(handed.message):
            self._dispatch.refuse_too_large(handed.total_bytes, handed.message, source)
        else:
            self._dispatch.accept(handed.message, source)

    def _forget_replaced(self) -> None:
        """Let go of experts that nothing computes with any more."""
        num_current = 1 if self._is_native else 0
        if self._server.num_tables() <= num_current:
            del self._computed_with[: len(self._computed_with) - num_current]


class _LaneFrame:
    """Where the answer to one frame goes. The native server counts the bytes in hand."""

    def __init__(self, lane: WorkerLane, connection: int) -> None:
        self._lane = lane
        self._connection = connection

    def is_open(self) -> bool:
        return self._lane.is_connected(self._connection)

    def take(self, num_bytes: int) -> None:
        pass

    def accept(self, num_bytes: int) -> None:
        pass

    def put_answer(self, answer: Answer) -> None:
        self._lane.reply(self._connection, answer)


def _native_experts(held: HeldExperts) -> dict[Slot, NativeExpert] | None:
    """None if the native server cannot compute all of them."""
    native = {
        (layer, expert): weights.native
        for layer, experts in held.layers.items()
        for expert, weights in experts.items()
        if weights.native is not None
    }
    return native if native and len(native) == len(held.digests) else None


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server(
        (host.strip("[]"), port),
        family=family,
        backlog=_BACKLOG,
        dualstack_ipv6=family == socket.AF_INET6 and host.strip("[]") == "::",
    )
