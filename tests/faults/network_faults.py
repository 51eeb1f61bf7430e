"""The network between shards and a worker that has a replica: slow, cut, or silent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.faults.fault import MAX_GAP_S, MIN_THROUGHPUT, Fault, Trial
from tests.faults.scene import Replica

SLOW_S = 0.5


def _victim(trial: Trial) -> Replica:
    replica = trial.random.choice(sorted(trial.scene.replicas.values(), key=lambda r: r.worker_id))
    num_connections = sum(len(route.connections) for route in replica.routes)
    if not num_connections:
        trial.problems.append(f"{replica.worker_id} is not connected through the proxy")
    return replica


@contextmanager
def _slow(trial: Trial) -> Iterator[None]:
    victim = _victim(trial)
    for route in victim.routes:
        trial.scene.proxy.delay(route, SLOW_S)
    try:
        yield
    finally:
        _restore(trial, victim)


@contextmanager
def _cut(trial: Trial) -> Iterator[None]:
    victim = _victim(trial)
    for route in victim.routes:
        trial.scene.proxy.cut(route, refuse=True)
    try:
        yield
    finally:
        _restore(trial, victim)


@contextmanager
def _half_open(trial: Trial) -> Iterator[None]:
    victim = _victim(trial)
    for route in victim.routes:
        trial.scene.proxy.silence(route)
    try:
        yield
    finally:
        _restore(trial, victim)


def _restore(trial: Trial, victim: Replica) -> None:
    for route in victim.routes:
        trial.scene.proxy.restore(route)


FAULTS = (
    Fault(
        name="worker-slow",
        row="a slow worker (+500 ms)",
        what="500 ms more in each direction to a worker that has a replica",
        inject=_slow,
        max_gap_s=MAX_GAP_S,
        min_throughput=MIN_THROUGHPUT,
    ),
    Fault(
        name="connection-cut",
        row="a connection cut by the network",
        what="connections to a worker that has a replica are reset, and refused to the end",
        inject=_cut,
        max_gap_s=MAX_GAP_S,
        min_throughput=MIN_THROUGHPUT,
    ),
    Fault(
        name="half-open",
        row="half-open sockets",
        what="connections to a worker that has a replica stay open and pass nothing",
        inject=_half_open,
        max_gap_s=MAX_GAP_S,
        min_throughput=MIN_THROUGHPUT,
    ),
)
