"""Processes that die, hang, or are restarted on purpose."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from tests.faults.fault import MAX_GAP_S, MIN_THROUGHPUT, Fault, Trial
from tests.support.product import REPOSITORY

_RESTART_TIMEOUT_S = 240


@contextmanager
def _kill_worker(trial: Trial) -> Iterator[None]:
    trial.scene.own_worker(trial.random.randrange(2)).kill()
    yield


@contextmanager
def _kill_replica(trial: Trial) -> Iterator[None]:
    """Its supervisor, the scene, restarts it only when the load is over."""
    replica = trial.random.choice(sorted(trial.scene.replicas.values(), key=lambda r: r.worker_id))
    assert replica.process is not None
    replica.process.kill()
    replica.process.wait()
    yield


@contextmanager
def _stop_worker(trial: Trial) -> Iterator[None]:
    worker = trial.scene.own_worker(trial.random.randrange(2))
    worker.suspend()
    try:
        yield
    finally:
        worker.resume()


@contextmanager
def _kill_shard(trial: Trial) -> Iterator[None]:
    os.kill(trial.random.choice(trial.scene.shards())["pid"], signal.SIGKILL)
    yield


@contextmanager
def _kill_all_shards(trial: Trial) -> Iterator[None]:
    for shard in trial.scene.shards():
        os.kill(shard["pid"], signal.SIGKILL)
    yield


@contextmanager
def _stop_shard(trial: Trial) -> Iterator[None]:
    shard = psutil.Process(trial.random.choice(trial.scene.shards())["pid"])
    shard.suspend()
    try:
        yield
    finally:
        if shard.is_running():
            shard.resume()


@contextmanager
def _restart_all(trial: Trial) -> Iterator[None]:
    before = {each["pid"] for each in trial.scene.workers() + trial.scene.shards()}
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "services.cli", "restart", "all"),
            *("--state-dir", str(trial.scene.product.state_dir)),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=_RESTART_TIMEOUT_S,
        check=False,
    )
    if ended.returncode:
        trial.problems.append(f"restart ended with {ended.returncode}: {ended.stderr[-500:]}")
    yield
    left = before & {each["pid"] for each in trial.scene.workers() + trial.scene.shards()}
    if left:
        trial.problems.append(f"{len(left)} processes were not restarted")


FAULTS = (
    Fault(
        name="worker-killed",
        row="SIGKILL of a worker that has a replica",
        what="SIGKILL of one of two workers that hold the same experts; it stays away",
        inject=_kill_replica,
        max_gap_s=MAX_GAP_S,
        min_throughput=MIN_THROUGHPUT,
    ),
    Fault(
        name="worker-restarted",
        row="SIGKILL of a worker that has a replica",
        what="the same, and its supervisor restarts it at once, which takes a core for seconds",
        inject=_kill_worker,
        max_gap_s=MAX_GAP_S,
    ),
    Fault(
        name="only-worker-killed",
        row="SIGKILL of a worker without a replica",
        what="SIGKILL of the only worker of half of the experts; its supervisor restarts it",
        inject=_kill_worker,
        hold_s=10.0,
        needs_no_replica=True,
    ),
    Fault(
        name="worker-stopped",
        row="SIGSTOP (a hang, not a death)",
        what="SIGSTOP of a worker that has a replica, SIGCONT at the end",
        inject=_stop_worker,
        max_gap_s=MAX_GAP_S,
        min_throughput=MIN_THROUGHPUT,
    ),
    Fault(
        name="shard-killed",
        row="SIGKILL of an attention shard mid-stream",
        what="SIGKILL of one of two attention shards",
        inject=_kill_shard,
    ),
    Fault(
        name="all-shards-killed",
        row="SIGKILL of an attention shard mid-stream",
        what="SIGKILL of every attention shard at once",
        inject=_kill_all_shards,
        hold_s=20.0,
    ),
    Fault(
        name="shard-stopped",
        row="SIGSTOP (a hang, not a death)",
        what="SIGSTOP of one of two attention shards, SIGCONT at the end",
        inject=_stop_shard,
    ),
    Fault(
        name="rolling-restart",
        row="rolling restart of every process, one by one",
        what="`expertfleet restart all`; no expert has a second worker outside of it",
        inject=_restart_all,
        hold_s=1.0,
        needs_no_replica=True,
        is_for_soak=False,
    ),
)
