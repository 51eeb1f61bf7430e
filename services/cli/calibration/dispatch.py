"""Measures layer calls to real worker processes on loopback, as a shard makes them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from router_service.dispatch.dispatcher import RemoteExperts
from router_service.dispatch.lane_choice import chosen_transport
from router_service.experts import StepContext
from router_service.loop_thread import LoopThread
from services.cli.calibration.random_weights import (
    NUM_EXPERTS,
    TOP_K,
    random_config,
    write_checkpoint,
)
from services.cli.calibration.timing import typical_s
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.errors import UnavailableError
from services.core.kernels.choice import set_num_threads
from services.core.model_config import ModelConfig
from services.core.placement import WorkerSlots, plan_placement, worker_threads
from services.core.registry_json import format_ranges
from services.core.settings import Settings, load_settings
from services.core.static_registry import StaticRegistry, parse_endpoints
from services.core.tls import PeerTls, peer_tls

WIDTH = (1024, 3584)
NUM_LAYERS = 2
NUM_WORKERS = (1, 2, 4)
NUM_TOKENS = (1, 4, 8, 32, 128)
SECONDS_PER_FIGURE = 0.8
READY_TIMEOUT_S = 120.0
_LISTENING = re.compile(r"listening on (\S+), ")
_READY = re.compile(r"\bready$")


def measure_dispatch(num_cores: int, scratch: Path) -> dict[str, Any]:
    """Typical seconds of a layer call, by number of workers and tokens."""
    torch.manual_seed(0)
    folder = scratch / "dispatch"
    write_checkpoint(folder, random_config(*WIDTH, num_layers=NUM_LAYERS))
    config = Checkpoint.open(str(folder)).config
    calls = []
    for num_workers in NUM_WORKERS:
        threads = worker_threads(num_cores, num_workers)
        settings = load_settings(model=str(folder), device="cpu", num_threads=threads)
        with _running_workers(settings, config, num_workers) as endpoints:
            for num_tokens, seconds in zip(
                NUM_TOKENS,
                _layer_calls(config, endpoints, num_cores, peer_tls(settings)),
                strict=True,
            ):
                calls.append(
                    {"num_workers": num_workers, "num_tokens": num_tokens, "seconds": seconds}
                )
    return {"dispatch_width": WIDTH, "dispatch": calls}


def _layer_calls(
    config: ModelConfig, endpoints: str, num_cores: int, tls: PeerTls | None
) -> list[float]:
    thread = LoopThread("engine")
    thread.start()
    try:
        return thread.run_blocking(_time_calls(config, endpoints, num_cores, tls))
    finally:
        thread.call_soon(thread.loop.stop)


async def _time_calls(
    config: ModelConfig, endpoints: str, num_threads: int, tls: PeerTls | None
) -> list[float]:
    set_num_threads(num_threads)
    experts = RemoteExperts(
        config,
        registry=StaticRegistry(parse_endpoints(endpoints), tls=tls),
        dtype=torch.bfloat16,
        transport=chosen_transport("auto", max_frame_bytes=256 << 20, tls=tls),
    )
    await experts.wait_ready()
    try:
        with torch.inference_mode():
            return [await _call_s(experts, config, num_tokens) for num_tokens in NUM_TOKENS]
    finally:
        await experts.close()


async def _call_s(experts: RemoteExperts, config: ModelConfig, num_tokens: int) -> float:
    """Calls go through the layers in turn, each with a gate of its own."""
    hidden_states = torch.randn(num_tokens, config.hidden_size, dtype=torch.bfloat16)
    context = StepContext()
    times: list[float] = []
    end = time.perf_counter() + SECONDS_PER_FIGURE
    while len(times) < 12 or time.perf_counter() < end:
        weights, ids = torch.randn(num_tokens, NUM_EXPERTS).softmax(-1).topk(TOP_K)
        started = time.perf_counter()
        await experts.forward(len(times) % NUM_LAYERS, hidden_states, ids, weights, context)
        times.append(time.perf_counter() - started)
    return typical_s(times[2:])


@contextlib.contextmanager
def _running_workers(settings: Settings, config: ModelConfig, num_workers: int) -> Iterator[str]:
    """Yields their endpoints as `host:port,host:port`; all are ended at the end."""
    workers: list[_Worker] = []
    try:
        for index, slots in enumerate(
            plan_placement(config.num_hidden_layers, config.num_local_experts, num_workers)
        ):
            workers.append(_Worker(settings, f"calibrate-{index}", slots))
        yield ",".join(worker.wait_ready() for worker in workers)
    finally:
        for worker in workers:
            worker.process.send_signal(signal.SIGTERM)
        for worker in workers:
            worker.process.wait(timeout=60)


class _Worker:
    def __init__(self, settings: Settings, worker_id: str, slots: WorkerSlots) -> None:
        command: Sequence[str] = [
            *(sys.executable, "-m", "expert_service", "--worker-id", worker_id),
            *("--experts", format_ranges(slots.experts), "--layers", format_ranges(slots.layers)),
            *("--port", "0", "--metrics-port", "0"),
        ]
        self.process = subprocess.Popen(
            command,
            env=os.environ | settings.as_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._endpoint = ""
        self._log: list[str] = []
        self._settled = threading.Event()
        threading.Thread(target=self._follow_log, daemon=True).start()

    def wait_ready(self) -> str:
        """Its endpoint; raises `UnavailableError` with its log if it ends or takes too long."""
        if not self._settled.wait(READY_TIMEOUT_S) or self.process.poll() is not None:
            raise UnavailableError(f"a worker did not get ready:\n{''.join(self._log[-12:])}")
        return self._endpoint

    def _follow_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._log.append(line)
            if found := _LISTENING.search(line):
                self._endpoint = found[1]
            if _READY.search(line.rstrip()):
                self._settled.set()
        self._settled.set()
