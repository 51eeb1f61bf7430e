"""What a container's probes and hooks say of an expert worker."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from expert_service import probe
from protos import experts_pb2
from services.core.grpc_options import DRAIN_METHOD

ROOT = Path(__file__).parents[2]


class Worker:
    """Health and Drain as a worker has them."""

    def __init__(self) -> None:
        self.is_drained = False
        self.health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self.server = grpc.aio.server()
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        service, _, name = DRAIN_METHOD.lstrip("/").partition("/")
        handler = grpc.unary_unary_rpc_method_handler(
            self.drain,
            request_deserializer=experts_pb2.DrainRequest.FromString,
            response_serializer=experts_pb2.DrainResponse.SerializeToString,
        )
        handlers = grpc.method_handlers_generic_handler(service, {name: handler})
        self.server.add_generic_rpc_handlers((handlers,))
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    async def drain(self, *_: object) -> experts_pb2.DrainResponse:
        self.is_drained = True
        return experts_pb2.DrainResponse()

    async def set_serving(self, is_serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        await self.health.set("", status.SERVING if is_serving else status.NOT_SERVING)


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    started = Worker()
    await started.server.start()
    yield started
    await started.server.stop(0)


async def ask(*arguments: str) -> int:
    return await asyncio.to_thread(probe.main, arguments)


async def test_a_worker_that_serves_is_healthy(worker: Worker) -> None:
    await worker.set_serving(True)
    assert await ask("health", "--endpoint", f"127.0.0.1:{worker.port}") == 0


async def test_a_worker_that_loads_or_drains_is_not(
    worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    await worker.set_serving(False)
    assert await ask("health", "--endpoint", f"127.0.0.1:{worker.port}") == 1
    assert "NOT_SERVING" in capsys.readouterr().err


async def test_every_address_of_a_name_is_asked(
    worker: Worker, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await worker.set_serving(True)
    answers = [(2, 1, 6, "", (host, worker.port)) for host in ("127.0.0.1", "127.0.0.2")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
    endpoint = f"experts.example:{worker.port}"
    # The worker listens on the first alone.
    assert await ask("health", "--every-address", "--endpoint", endpoint) == 1
    said = capsys.readouterr()
    assert f"127.0.0.1:{worker.port} serves" in said.out
    assert f"127.0.0.2:{worker.port}" in said.err


async def test_drain_tells_the_worker_to_finish(worker: Worker) -> None:
    assert await ask("drain", "--endpoint", f"127.0.0.1:{worker.port}") == 0
    assert worker.is_drained


def test_nobody_there_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(["health", "--endpoint", "127.0.0.1:1", "--timeout-s", "2"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_probe_starts_without_torch() -> None:
    code = "import expert_service.probe, sys; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "False"
