"""What this machine offers: cores and GPUs, and a fair share of them for each process."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from services.core.kernels.library import Isa, native_library
from services.core.placement import worker_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """`has_native_kernels`: the experts' products are not left to torch and OpenMP."""

    num_cores: int
    num_gpus: int
    has_native_kernels: bool = True

    @staticmethod
    def detect() -> Hardware:
        library = native_library()
        return Hardware(
            num_cores=len(os.sched_getaffinity(0)),
            num_gpus=_count_gpus(),
            has_native_kernels=library is not None and library.active_isa() >= Isa.AVX2,
        )

    def worker_threads(self, num_workers: int) -> int:
        """Threads per worker: the native kernels' as `placement.worker_threads` says; OpenMP's fill
        the cores just once, since it stalls where a thread has no core."""
        if self.has_native_kernels:
            return worker_threads(self.num_cores, num_workers)
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
