"""An ASGI application on a TCP port, served by the event loop that is running."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn

from services.core.errors import ConfigurationError


class AsgiServer:
    """uvicorn without its hold on the process: whoever starts it also stops it.

    The socket has SO_REUSEPORT, so that a new process of the same user can take over the port
    from one that drains.
    """

    def __init__(self, app: Any, *, host: str, port: int, drain_timeout_s: float) -> None:
        self._socket = _listen(host, port)
        self._server = _AnnouncingServer(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=max(1, round(drain_timeout_s)),
            )
        )
        self._serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    async def start(self) -> None:
        """Return once requests are taken. Raises what the application's start-up raised."""
        self._serving = asyncio.create_task(self._serve())
        listening = asyncio.create_task(self._server.is_listening.wait())
        await asyncio.wait((self._serving, listening), return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if self._serving.done():
            await self._serving
            raise RuntimeError("the application did not start; see its log")

    async def stop(self) -> None:
        """Take no more connections, let running requests end within `drain_timeout_s`."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving

    async def _serve(self) -> None:
        await self._server.serve(sockets=[self._socket])


class _AnnouncingServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.is_listening.set()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"{host}:{port} cannot be listened on ({error.strerror}); choose another port",
            setting="port",
        ) from error
    listener.setblocking(False)
    return listener
