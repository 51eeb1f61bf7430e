"""The machine under the processes: no disk left, and a clock that jumps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from tests.faults.fault import Fault, Trial

_WRITERS = ("expert-", "replica-", "shard", "gateway")


@contextmanager
def _disk_full(trial: Trial) -> Iterator[None]:
    """No file may grow: every write to a trace file or a log fails, as on a full disk."""
    limits: dict[psutil.Process, tuple[int, int]] = {}
    for pid, role in trial.scene.processes().items():
        if role.startswith(_WRITERS):
            process = psutil.Process(pid)
            limits[process] = process.rlimit(psutil.RLIMIT_FSIZE)
            process.rlimit(psutil.RLIMIT_FSIZE, (1, limits[process][1]))
    if len(limits) < 6:
        trial.problems.append(f"only {len(limits)} processes were found to limit")
    try:
        yield
    finally:
        for process, limit in limits.items():
            with suppress(psutil.NoSuchProcess):
                process.rlimit(psutil.RLIMIT_FSIZE, limit)


@contextmanager
def _clock_jump(trial: Trial) -> Iterator[None]:
    """The store's leases are over at once, as after a jump of its clock; workers' go back."""
    with trial.scene.store() as store:
        store.flushall()
    _signal_replicas(trial, signal.SIGUSR1)
    try:
        yield
    finally:
        _signal_replicas(trial, signal.SIGUSR2)


def _signal_replicas(trial: Trial, number: signal.Signals) -> None:
    for replica in trial.scene.replicas.values():
        if replica.process is not None and replica.is_running:
            replica.process.send_signal(number)


FAULTS = (
    Fault(
        name="disk-full",
        row="disk full for the trace file",
        what="workers, shards and gateway cannot write to any file",
        inject=_disk_full,
    ),
    Fault(
        name="clock-jump",
        row="clock jump",
        what="two workers' clocks go back an hour, all leases of the store end at once",
        inject=_clock_jump,
    ),
)
