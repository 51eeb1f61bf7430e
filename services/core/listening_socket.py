"""A listening socket that outlives the processes which serve it.

The launcher opens it and offers it on a unix socket; each gateway process takes it from there.
They all accept from one queue, so a new gateway can take over from one that drains, and while none
runs, new connections wait in the queue instead of being refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from services.core.errors import ConfigurationError, UnavailableError
from services.core.settings import Settings

_PEER_CREDENTIALS = struct.Struct("iII")
_GREETING = b"L"


def open_listener(host: str, port: int, *, reuse_port: bool) -> socket.socket:
    """A bound TCP socket; connections are refused until somebody calls `listen` on it.

    With `reuse_port` another process of this user may bind the port as well, each with a queue of
    its own. Raises `ConfigurationError` where the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"{host}:{port} cannot be listened on ({error.strerror}); "
            "choose another with --host and --port",
            setting="port",
        ) from error
    listener.setblocking(False)
    return listener


def gateway_listener(settings: Settings) -> socket.socket:
    """The launcher's socket where `settings` name its offer, else one of this process's own.

    Blocks for a moment. Raises `UnavailableError` when the launcher does not answer.
    """
    if settings.listen_socket is not None:
        return take_listener(settings.listen_socket)
    return open_listener(settings.host, settings.port, reuse_port=True)


def take_listener(path: Path, *, timeout_s: float = 10.0) -> socket.socket:
    """Take the socket that a `ListenerOffer` hands out at `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
            greeting, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
        except OSError as error:
            raise UnavailableError(
                f"the launcher does not hand out the gateway's socket at {path} ({error}); "
                "is it running?"
            ) from error
    if greeting != _GREETING or not descriptors:
        raise UnavailableError(f"no socket came from {path}; the launcher is stopping")
    listener = socket.socket(fileno=descriptors[0])
    listener.setblocking(False)
    return listener


class ListenerOffer:
    """Hands `listener` to every process of this user that connects to `path`.

    `on_taken` hears the process id of each. The caller keeps, and closes, `listener`.
    """

    def __init__(
        self, listener: socket.socket, path: Path, on_taken: Callable[[int], None]
    ) -> None:
        self._listener = listener
        self._path = path
        self._on_taken = on_taken
        self._server: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.setblocking(False)
        self._server.bind(str(self._path))
        self._path.chmod(0o600)
        self._server.listen()
        self._task = asyncio.create_task(self._serve(self._server), name="listener-offer")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._server is not None:
            self._server.close()
        self._path.unlink(missing_ok=True)

    async def _serve(self, server: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(server)
            with connection, contextlib.suppress(OSError):
                socket.send_fds(connection, [_GREETING], [self._listener.fileno()])
                self._on_taken(_peer_pid(connection))


def _peer_pid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size
    )
    return int(_PEER_CREDENTIALS.unpack(credentials)[0])
