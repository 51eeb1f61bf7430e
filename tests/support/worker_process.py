"""A real expert worker: its own process, its own port, reaped by whoever started it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

REPOSITORY = Path(__file__).parents[2]
_LISTENING = re.compile(r"listening on (\S+), metrics on (\S+)")


@dataclass(kw_only=True)
class WorkerProcess:
    """`endpoint` and `metrics_endpoint` are host:port; `log` is what it wrote so far."""

    process: subprocess.Popen[str]
    endpoint: str = ""
    metrics_endpoint: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Its exit status, once it has ended and all of its log was read."""
        return self.process.wait(timeout_s)

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Return when its health is SERVING; fail with its log if it ends before."""
        request = health_pb2.HealthCheckRequest(service="")
        with grpc.insecure_channel(self.endpoint) as channel:
            statuses = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=timeout_s)
            with contextlib.suppress(grpc.RpcError):
                for response in statuses:
                    if response.status == health_pb2.HealthCheckResponse.SERVING:
                        return
        raise AssertionError(f"the worker did not get ready:\n{self.log}")


@contextlib.contextmanager
def running_worker(
    model: Path,
    experts: str | None,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    wait_ready: bool = True,
) -> Iterator[WorkerProcess]:
    """Start `python -m expert_service` on free ports of 127.0.0.1 and kill it at the end.

    `environment` is added to a copy of this process's without EXPERTFLEET_* and REDIS_URL.
    Without `experts` the arguments say what it holds.
    """
    held = () if experts is None else ("--experts", experts)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "expert_service"),
            *("--model", str(model), *held, *arguments),
        ],
        cwd=REPOSITORY,
        env=_clean_environment() | dict(environment or {}),
        stderr=subprocess.PIPE,
        text=True,
    )
    worker = WorkerProcess(process=process)
    reader = threading.Thread(target=_read_log, args=(worker,), daemon=True)
    reader.start()
    try:
        _wait_listening(worker)
        if wait_ready:
            worker.wait_ready()
        yield worker
    finally:
        process.kill()
        process.wait()
        reader.join()


def run_worker_to_end(
    model: Path | str, experts: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Exit status and log of a worker that is expected to refuse to start."""
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "expert_service"),
            *("--model", str(model), "--experts", experts, *arguments),
        ],
        cwd=REPOSITORY,
        env=_clean_environment() | dict(environment or {}),
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    return ended.returncode, ended.stderr


def _clean_environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("EXPERTFLEET_") and name != "REDIS_URL"
    }
    return kept | {"EXPERTFLEET_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _read_log(worker: WorkerProcess) -> None:
    assert worker.process.stderr is not None
    for line in worker.process.stderr:
        worker.lines.append(line)
        if match := _LISTENING.search(line):
            worker.metrics_endpoint = match[2]
            worker.endpoint = match[1]


def _wait_listening(worker: WorkerProcess, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not worker.endpoint:
        if worker.process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"the worker did not listen:\n{worker.log}")
        time.sleep(0.02)
