"""Children of a process as the launcher is one: it speaks gRPC meanwhile, and it may die."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import psutil

from services.cli.child import ChildSpec, spawn_process
from tests.support.waiting import wait_until

NUM_CHILDREN = 30
LAUNCHER = """
import asyncio, os, sys
from pathlib import Path
from services.cli.child import ChildSpec, spawn_process

async def main():
    command = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)")
    log_file = Path(sys.argv[1])
    process = await spawn_process(ChildSpec(name="part", command=command, log_file=log_file))
    while "up" not in log_file.read_text():
        await asyncio.sleep(0.01)
    print(process.pid, flush=True)
    os._exit(1)

asyncio.run(main())
"""


async def test_children_live_that_begin_while_grpc_calls_are_in_flight(tmp_path: Path) -> None:
    spec = ChildSpec(
        name="part", command=(sys.executable, "-S", "-c", "print()"), log_file=tmp_path / "log"
    )
    async with _calls_in_flight():
        processes = [await spawn_process(spec) for _ in range(NUM_CHILDREN)]
        statuses = [await process.wait() for process in processes]
    assert statuses == [0] * NUM_CHILDREN


def test_a_child_ends_when_its_parent_has_died(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "log")]
    launcher = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    pid = int(launcher.stdout)
    wait_until(lambda: not psutil.pid_exists(pid), timeout_s=10, what="the child has ended")


@contextlib.asynccontextmanager
async def _calls_in_flight() -> AsyncIterator[None]:
    async def answer(request: bytes, _: object) -> bytes:
        await asyncio.sleep(0.01)
        return request

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("T", {"E": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/T/E", request_serializer=bytes, response_deserializer=bytes)

        async def ask() -> None:
            while True:
                await call(b"x" * 100_000)

        asking = [asyncio.create_task(ask()) for _ in range(8)]
        yield
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    await server.stop(None)
