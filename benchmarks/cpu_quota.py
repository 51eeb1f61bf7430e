"""Processes held to a share of a core, as a container's CPU limit holds them (cgroups v1 or v2).

So several workers of known size fit on few cores. Needs a cgroup that this process may divide,
which root has outside of most containers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_PERIOD_US = 10_000
"""Shorter than the usual 100 ms: a process that has used up its share waits for the next period."""


class NoCpuQuotaError(Exception):
    """Says why processes cannot be limited here."""


class CpuQuotas:
    """Each process that `limit` was called for has a group of its own."""

    def __init__(self, parent: Path, *, is_v2: bool) -> None:
        self._parent = parent
        self._is_v2 = is_v2
        self._groups: dict[int, Path] = {}

    def limit(self, pid: int, cores: float) -> None:
        """Hold a process and its threads to so many cores. Nothing if it has just ended."""
        group = self._parent / f"pid-{pid}"
        group.mkdir(exist_ok=True)
        self._groups[pid] = group
        quota_us = round(cores * _PERIOD_US)
        if self._is_v2:
            (group / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(quota_us))
        try:
            (group / "cgroup.procs").write_text(str(pid))
        except ProcessLookupError:
            group.rmdir()
            del self._groups[pid]

    @property
    def pids(self) -> set[int]:
        """Of processes that were limited."""
        return set(self._groups)

    def remove(self) -> None:
        """Once the processes have ended."""
        for group in (*self._groups.values(), self._parent):
            group.rmdir()


@contextmanager
def cpu_quotas() -> Iterator[CpuQuotas]:
    """Raises `NoCpuQuotaError`. The limited processes must have ended when this does."""
    is_v2 = (_ROOT / "cgroup.controllers").exists()
    root = _ROOT if is_v2 else _ROOT / "cpu"
    parent = root / f"expertfleet-{os.getpid()}"
    try:
        if is_v2:
            (root / "cgroup.subtree_control").write_text("+cpu")
        parent.mkdir()
        if is_v2:
            (parent / "cgroup.subtree_control").write_text("+cpu")
    except OSError as error:
        raise NoCpuQuotaError(f"no CPU limits can be set here: {error}") from error
    quotas = CpuQuotas(parent, is_v2=is_v2)
    try:
        yield quotas
    finally:
        quotas.remove()
