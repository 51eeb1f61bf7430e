"""Real worker processes, and what the kernel and they themselves say of them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from protos import experts_pb2
from services.cli.fleet import MALLOC_ENVIRONMENT
from services.core.grpc_options import DESCRIBE_METHOD, GRPC_ENVIRONMENT
from services.core.model_config import ModelConfig
from services.core.placement import WorkerSlots, plan_placement, worker_threads
from services.core.registry_json import format_ranges
from services.core.settings import Settings
from services.core.telemetry import METRIC_WORKER_TOKENS

READY_TIMEOUT_S = 600.0
_LISTENING = re.compile(r"listening on (\S+), metrics on (\S+)")
_LOADED = re.compile(r"loaded \d+ experts of .* in ([\d.]+) s:")
_READY = re.compile(r"\bready$")


@dataclass(slots=True, kw_only=True)
class MeasuredWorker:
    """One `python -m expert_service`. Figures are bytes unless their names say otherwise.

    `ready_s` is from the start of the process until it is ready, `load_s` the part of it in which
    weights were read and packed. `process_bytes_read` is the kernel's count of all bytes it read,
    its Python modules among them.
    """

    worker_id: str
    placement: WorkerSlots
    process: subprocess.Popen[str]
    started_at: float = field(default_factory=time.monotonic)
    ready: threading.Event = field(default_factory=threading.Event)
    log: list[str] = field(default_factory=list)
    endpoint: str = ""
    metrics_endpoint: str = ""
    ready_s: float = 0.0
    load_s: float = 0.0
    weight_bytes: int = 0
    checkpoint_bytes_read: int = 0
    process_bytes_read: int = 0
    ready_peak_bytes: int = 0
    peak_bytes: int = 0
    num_rows: int = 0

    def wait_ready(self) -> None:
        """Return once the worker is ready; raise with its log if it ends before."""
        if not self.ready.wait(READY_TIMEOUT_S) or self.process.poll() is not None:
            raise SystemExit(f"{self.worker_id} did not get ready:\n{''.join(self.log)}")
        self.ready_peak_bytes = peak_rss_bytes(self.process.pid)

    def read_figures(self) -> None:
        """What it holds, and memory, reads and rows until now; the process must still run."""
        described = describe_worker(self.endpoint)
        self.weight_bytes = described.weight_bytes
        self.checkpoint_bytes_read = described.checkpoint_bytes_read
        self.peak_bytes = peak_rss_bytes(self.process.pid)
        self.process_bytes_read = _proc_number(self.process.pid, "io", "rchar")
        with urllib.request.urlopen(f"http://{self.metrics_endpoint}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        samples = [line for line in lines if line.startswith(METRIC_WORKER_TOKENS)]
        self.num_rows = int(sum(float(line.rpartition(" ")[2]) for line in samples))

    def follow_log(self) -> None:
        """Keep its log until it ends, and note when it is ready."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := _LISTENING.search(line):
                self.endpoint, self.metrics_endpoint = found[1], found[2]
            if found := _LOADED.search(line):
                self.load_s = float(found[1])
            if _READY.search(line.rstrip()):
                self.ready_s = time.monotonic() - self.started_at
                self.ready.set()
        self.ready.set()


@contextlib.contextmanager
def start_workers(
    folder: Path,
    config: ModelConfig,
    num_workers: int,
    settings: Settings,
    *,
    module: Sequence[str] = ("expert_service",),
) -> Iterator[list[MeasuredWorker]]:
    """All workers of a placement, started together; ended at the end.

    Each has `settings.num_threads` threads, or as many as the launcher gives it. `module` is what
    is run, with what it wants before a worker's own arguments.
    """
    cores = len(os.sched_getaffinity(0))
    num_threads = settings.num_threads or worker_threads(cores, num_workers)
    environment = os.environ | MALLOC_ENVIRONMENT | GRPC_ENVIRONMENT
    environment |= settings.override(num_threads=num_threads).as_environment()
    workers: list[MeasuredWorker] = []
    try:
        for index, placement in enumerate(
            plan_placement(config.num_hidden_layers, config.num_local_experts, num_workers)
        ):
            worker_id = f"worker-{index}"
            command = [sys.executable, "-m", *module, "--model", str(folder)]
            command += ["--worker-id", worker_id, "--port", "0"]
            command += ["--experts", format_ranges(placement.experts)]
            command += ["--layers", format_ranges(placement.layers)]
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            workers.append(
                MeasuredWorker(worker_id=worker_id, placement=placement, process=process)
            )
            threading.Thread(target=workers[-1].follow_log, daemon=True).start()
        yield workers
    finally:
        for worker in workers:
            worker.process.send_signal(signal.SIGTERM)
        for worker in workers:
            worker.process.wait(timeout=60)


def describe_worker(endpoint: str) -> experts_pb2.DescribeResponse:
    with grpc.insecure_channel(endpoint) as channel:
        describe = channel.unary_unary(
            DESCRIBE_METHOD,
            request_serializer=experts_pb2.DescribeRequest.SerializeToString,
            response_deserializer=experts_pb2.DescribeResponse.FromString,
        )
        response: experts_pb2.DescribeResponse = describe(experts_pb2.DescribeRequest(), timeout=30)
        return response


def lanes_of(endpoints: str) -> list[str]:
    """Where the lanes of workers are, of those that have them, as host:port."""
    lanes = []
    for endpoint in endpoints.split(","):
        if port := describe_worker(endpoint).lane_port:
            lanes.append(f"{endpoint.rpartition(':')[0]}:{port}")
    return lanes


def peak_rss_bytes(pid: int) -> int:
    """The most resident memory a process has had, mapped files included."""
    return _proc_number(pid, "status", "VmHWM") * 1024


def _proc_number(pid: int, file: str, name: str) -> int:
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    raise ValueError(f"/proc/{pid}/{file} has no {name}")
