"""A real store server for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.core.store_server import StoreServer, start_server


@contextmanager
def running_redis(
    directory: Path, *, unix_socket: bool = False, maxmemory_bytes: int = 64 << 20
) -> Iterator[StoreServer]:
    """A server on a free port, or on a unix socket in `directory`; ended on leaving."""
    server = start_server(
        directory,
        port=None if unix_socket else 0,
        unix_socket=directory / "store.sock" if unix_socket else None,
        maxmemory_bytes=maxmemory_bytes,
    )
    try:
        yield server
    finally:
        server.stop()
