"""What this machine offers: cores and GPUs, and a fair share of them for each process."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    num_cores: int
    num_gpus: int

    @staticmethod
    def detect() -> Hardware:
        return Hardware(num_cores=len(os.sched_getaffinity(0)), num_gpus=_count_gpus())

    def worker_threads(self, num_workers: int) -> int:
        """Torch threads per worker: all workers together fill the cores; at least one each."""
        return max(1, self.num_cores // num_workers)

    def shard_threads(self, num_shards: int) -> int:
        """Threads per shard: all cores, since a shard waits while its workers compute, and they
        while it does; at least one each."""
        return max(1, self.num_cores // num_shards)

    def worker_device(self, index: int, num_shards: int, device: str) -> str:
        """Workers take the GPUs after those of the shards, in turn; without GPUs the CPU."""
        if device not in ("auto", "cuda"):
            return device
        if self.num_gpus == 0:
            return "cpu" if device == "auto" else device
        return f"cuda:{(num_shards + index) % self.num_gpus}"


def _count_gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
