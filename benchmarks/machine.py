"""What a figure was measured on, and how busy the machine was with other things."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

PACKAGES = ("torch", "transformers", "grpcio", "ray")


def describe_machine() -> str:
    """One line: processor, cores, memory, Python and package versions."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    memory_gib = psutil.virtual_memory().total / 2**30
    cores = len(os.sched_getaffinity(0))
    return (
        f"{_processor()}, {cores} cores, {memory_gib:.0f} GiB; "
        f"Python {platform.python_version()}, {versions}"
    )


class ForeignLoad:
    """Share of the machine's cores that processes other than the given ones used meanwhile."""

    def __init__(self, own_pids: Sequence[int]) -> None:
        self._own_pids = own_pids
        self._start = (time.monotonic(), busy_seconds(), self._own_s())

    def stop(self) -> float:
        """Foreign CPU seconds per core second since construction, 0 to 1."""
        now = (time.monotonic(), busy_seconds(), self._own_s())
        wall, busy, own = (after - before for after, before in zip(now, self._start, strict=True))
        cores = psutil.cpu_count() or 1
        return max(0.0, busy - own) / (wall * cores)

    def _own_s(self) -> float:
        return cpu_seconds(self._own_pids)


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU seconds of these processes and their running descendants."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            for process in [root, *root.children(recursive=True)]:
                times = process.cpu_times()
                total += times.user + times.system
    return total


def busy_seconds() -> float:
    """Of all cores since the machine started, without what the host took."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - getattr(times, "steal", 0.0))


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
    except OSError:
        return platform.machine()
    by_name = {key.strip(): value.strip() for key, value in fields.items()}
    extensions = [
        name
        for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
        if name in by_name.get("flags", "").split()
    ]
    return f"{by_name.get('model name', platform.machine())} ({' '.join(extensions[:2])})"
