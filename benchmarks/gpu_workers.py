"""Starts `benchmarks.gpu_worker` processes and ends them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.gpu_timing import Deadline

_STOP_TIMEOUT_S = 10.0
_ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def seeded_workers(
    shape: str,
    *,
    num_layers: int,
    num_experts: int,
    num_workers: int,
    device: str,
    deadline: Deadline,
) -> Iterator[Callable[[], list[str]]]:
    """Workers that share the experts; they load while the caller goes on.

    Yields what waits for them and gives their endpoints; it raises `TimeoutError` past the
    deadline and `RuntimeError` when a worker ends.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // (num_workers + 1))
    processes = []
    try:
        for worker in range(num_workers):
            experts = ",".join(map(str, range(worker, num_experts, num_workers)))
            command = [sys.executable, "-m", "benchmarks.gpu_worker", "--shape", shape]
            command += ["--layers", str(num_layers), "--experts", experts]
            command += ["--device", device, "--threads", str(threads)]
            processes.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=_ROOT)
            )
        yield lambda: [_endpoint(process, deadline) for process in processes]
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _endpoint(process: subprocess.Popen[bytes], deadline: Deadline) -> str:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], max(0.0, deadline.remaining_s()))
    if not readable:
        raise TimeoutError("a worker was not ready before the deadline")
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a worker ended with status {process.wait()}; its error is above")
    return str(json.loads(line)["endpoint"])
