"""Fake workers behind real lanes: sockets on loopback, answered by threads, with faults at will."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from protos import experts_pb2
from router_service.dispatch.dispatcher import RemoteExperts
from router_service.dispatch.lane_transport import LaneTransport
from services.core.memory_registry import MemoryRegistry
from services.core.placement import plan_placement
from services.core.registry import WorkerRecord
from tests.support.eventually import eventually
from tests.support.fake_workers import FakeTransport, FakeWorker, random_model, tiny_config
from tests.support.kernels import built_library
from tests.support.records import worker_record

GREETING = b"EFLANE1\n"


@dataclass(kw_only=True)
class LaneWorker(FakeWorker):
    """A `FakeWorker` whose frames come over a lane; described as any other fake."""

    server: LaneServer = field(init=False)

    def __post_init__(self) -> None:
        self.server = LaneServer(self)

    @property
    def record(self) -> WorkerRecord:
        # The host is where the lane is; the port is only for telling the fakes apart.
        endpoint = f"127.0.0.1:{self.server.port}"
        return worker_record(self.worker_id, self.slots, endpoint=endpoint)

    def describe(self) -> experts_pb2.DescribeResponse:
        description = super().describe()
        description.lane_port = self.server.port
        return description

    def kill(self) -> None:
        self.server.drop_connections()
        super().kill()


class LaneServer:
    """Listens for lanes of one worker."""

    def __init__(self, worker: FakeWorker, greeting: bytes = GREETING) -> None:
        self.worker = worker
        self.num_connections = 0
        self._greeting = greeting
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def drop_connections(self) -> None:
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop_connections()
        for thread in self._threads:
            thread.join(5.0)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open.add(connection)
            self.num_connections += 1
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(self._greeting)
            stream = connection.makefile("rb")
            if stream.read(len(GREETING)) == GREETING:
                while len(length := stream.read(4)) == 4:
                    self._answer(connection, stream.read(*struct.unpack("<I", length)))
        self._open.discard(connection)

    def _answer(self, connection: socket.socket, frame: bytes) -> None:
        faults = self.worker.faults
        if faults and faults[0] == "break":
            faults.popleft()
            connection.shutdown(socket.SHUT_RDWR)
            return
        answer = self.worker.answer(frame)
        if answer is not None:
            connection.sendall(struct.pack("<I", len(answer)) + answer)


@contextlib.contextmanager
def lane_workers(
    num_workers: int,
    *,
    replicas: int = 1,
    top_k: int = 2,
    num_experts: int = 4,
    num_layers: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Iterator[list[LaneWorker]]:
    """`replicas` workers of each of `num_workers` parts of one model: a0, a1, ..., b0, b1, ..."""
    config = tiny_config(top_k=top_k, num_experts=num_experts, num_layers=num_layers)
    model = random_model(config, dtype)
    plan = plan_placement(config.num_hidden_layers, config.num_local_experts, num_workers)
    workers = [
        LaneWorker(
            worker_id=f"{'abc'[copy]}{index}",
            config=config,
            model=model,
            slots=part.slots(),
            dtype=dtype,
        )
        for copy in range(replicas)
        for index, part in enumerate(plan)
    ]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.server.close()


def lane_transport(workers: Sequence[LaneWorker], *, is_required: bool = True) -> LaneTransport:
    return LaneTransport(
        FakeTransport(workers), built_library(), max_frame_bytes=1 << 20, is_required=is_required
    )


@asynccontextmanager
async def remote(workers: Sequence[LaneWorker], **options: Any) -> AsyncIterator[RemoteExperts]:
    """Dispatch to all of them, which takes part once each has been seen."""
    registry = MemoryRegistry()
    for worker in workers:
        await registry.publish(worker.record, 1e9)
    settings: dict[str, Any] = {"refresh_s": 0.01, "expert_wait_s": 60.0, "call_timeout_s": 60.0}
    settings |= {"transport": lane_transport(workers)}
    experts = RemoteExperts(
        workers[0].config,
        registry=registry,
        dtype=workers[0].dtype,
        **settings | options,
    )
    try:
        await experts.wait_ready()
        await eventually(lambda: len(experts._pool.view.links) == len(workers))
        yield experts
    finally:
        await experts.close()
