"""The store of leases and sessions: gone, hung, slow, full, or full of nonsense."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import redis

from tests.faults.fault import Fault, Trial

ROW = "Redis killed, full, slow, or holding garbage"
SLOW_S = 0.15
_GARBAGE_INTERVAL_S = 0.5


@contextmanager
def _kill(trial: Trial) -> Iterator[None]:
    trial.scene.store_process().kill()
    yield


@contextmanager
def _hang(trial: Trial) -> Iterator[None]:
    store = trial.scene.store_process()
    store.suspend()
    try:
        yield
    finally:
        store.resume()


@contextmanager
def _slow(trial: Trial) -> Iterator[None]:
    """Put a proxy at the store's address; its users are disconnected, and find the proxy."""
    scene = trial.scene
    address = scene.store_socket
    aside = address.with_suffix(".real")
    address.rename(aside)
    route = scene.proxy.listen(address, aside)
    scene.proxy.delay(route, SLOW_S)
    with scene.store(aside) as store:
        store.client_kill_filter(_type="normal")
    try:
        yield
    finally:
        if not route.num_connections:
            trial.problems.append("nobody connected to the store through the proxy")
        address.unlink(missing_ok=True)
        aside.rename(address)
        scene.proxy.end(route)


@contextmanager
def _full(trial: Trial) -> Iterator[None]:
    with trial.scene.store() as store:
        before = {
            name: str(store.config_get(name)[name]) for name in ("maxmemory", "maxmemory-policy")
        }
        store.config_set("maxmemory-policy", "noeviction")
        store.config_set("maxmemory", 1)
        try:
            yield
        finally:
            for name, value in before.items():
                store.config_set(name, value)


@contextmanager
def _garbage(trial: Trial) -> Iterator[None]:
    """Random bytes in place of every value, whatever its type, again and again."""
    done = threading.Event()

    def spoil() -> None:
        generator = random.Random(trial.random.random())
        with trial.scene.store() as store:
            while True:
                with suppress(redis.RedisError):
                    for key in store.scan_iter(count=1000):
                        store.set(key, generator.randbytes(generator.randrange(1, 4096)))
                if done.wait(_GARBAGE_INTERVAL_S):
                    return

    thread = threading.Thread(target=spoil, name="garbage")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


FAULTS = (
    Fault(name="store-killed", row=ROW, what="SIGKILL of the store", inject=_kill),
    Fault(
        name="store-hung", row=ROW, what="SIGSTOP of the store, SIGCONT at the end", inject=_hang
    ),
    Fault(
        name="store-slow",
        row=ROW,
        what="150 ms more in each direction to the store",
        inject=_slow,
    ),
    Fault(
        name="store-full",
        row=ROW,
        what="the store refuses every write, for longer than leases last",
        inject=_full,
        hold_s=10.0,
    ),
    Fault(
        name="store-garbage",
        row=ROW,
        what="all values in the store are overwritten with random bytes, twice a second",
        inject=_garbage,
    ),
)
