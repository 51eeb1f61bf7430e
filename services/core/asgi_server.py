"""An ASGI application on a listening socket, served by the event loop that is running."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable, Generator, Mapping, MutableMapping
from typing import Any

import uvicorn

from services.core.errors import DrainingError

KEEP_ALIVE_S = 75
"""How long a connection without a request is kept. Who closes first must not be the server: a
request on its way then is lost. Clients keep connections for 5 to 15 s, load balancers for 60."""
IDLE_LINGER_S = 1.0
"""How long a connection without a request is kept while draining: one that was just accepted, or
whose client is about to send, is answered instead of reset."""
_POLL_S = 0.02
_READINESS_PATH = "/readyz"
_DRAINING_KEY = "expertfleet.draining"

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class AsgiServer:
    """uvicorn without its hold on the process: whoever starts it also stops it.

    Draining takes no more connections, but answers what comes on open ones, each for the last time
    ("Connection: close"); `/readyz` is 503 meanwhile. The listening socket is closed here; where
    another process holds it too, new connections wait for that one.
    """

    def __init__(self, app: Any, listener: socket.socket, *, drain_timeout_s: float) -> None:
        self._app = app
        self._socket = listener
        self._drain_timeout_s = drain_timeout_s
        self._is_draining = False
        self._draining = asyncio.Event()
        self._server = _DrainingServer(
            uvicorn.Config(
                self._respond,
                interface="asgi3",
                log_level="warning",
                access_log=False,
                lifespan="on",
                timeout_keep_alive=KEEP_ALIVE_S,
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

    async def stop(self, drain_timeout_s: float | None = None) -> None:
        """Take no more connections, let running requests end within `drain_timeout_s`.

        What is left then is cut off. A second call waits for the first.
        """
        if not self._is_draining:
            self._is_draining = True
            self._draining.set()
            self._server.drain_within(
                self._drain_timeout_s if drain_timeout_s is None else drain_timeout_s
            )
        if self._serving is not None:
            await asyncio.shield(self._serving)

    def drain_within(self, drain_timeout_s: float) -> None:
        """Change the bound of a draining that has begun."""
        self._server.drain_within(drain_timeout_s)

    async def _serve(self) -> None:
        await self._server.serve(sockets=[self._socket])

    async def _respond(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        scope[_DRAINING_KEY] = self._draining
        if scope["type"] != "http" or not self._is_draining:
            await self._app(scope, receive, send)
        elif scope["path"] == _READINESS_PATH:
            await _refuse(_closing(send))
        else:
            await self._app(scope, receive, _closing(send))


def draining_of(scope: Mapping[str, Any]) -> asyncio.Event:
    """Set when the server of this request begins to drain; never, where that is unknown. Answers
    without an end of their own must then end."""
    event = scope.get(_DRAINING_KEY)
    return event if isinstance(event, asyncio.Event) else asyncio.Event()


class _DrainingServer(uvicorn.Server):
    """Signals are left to whoever runs the process."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_listening = asyncio.Event()
        self._deadline = 0.0
        self._is_ending = asyncio.Event()

    def drain_within(self, timeout_s: float) -> None:
        """Begin to drain, or change the bound of a draining that has begun."""
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self.should_exit = True
        self._is_ending.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.is_listening.set()

    async def main_loop(self) -> None:
        """As uvicorn's, which looks only ten times a second whether it should end."""
        ticking = asyncio.create_task(super().main_loop())
        await self._is_ending.wait()
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        await self._drain()
        # Running requests are cut off now: uvicorn cancels them and runs the lifespan's end.
        self.config.timeout_graceful_shutdown = 0 if self.server_state.tasks else 1
        await super().shutdown(sockets=[])

    async def _drain(self) -> None:
        """Until no connection is left, for at most the bound.

        A connection without a request is closed after `IDLE_LINGER_S`; connections that the kernel
        has handed over already, but uvicorn does not know yet, come within the first polls.
        """
        loop = asyncio.get_running_loop()
        idle_since: dict[Any, float] = {}
        settled = loop.time() + 3 * _POLL_S
        while (now := loop.time()) < self._deadline:
            connections = set(self.server_state.connections)
            if not connections and now > settled:
                return
            idle = {each for each in connections if _is_idle(each)}
            idle_since = {each: idle_since.get(each, now) for each in idle}
            for connection, since in idle_since.items():
                if now - since >= IDLE_LINGER_S:
                    connection.shutdown()
            await asyncio.sleep(_POLL_S)


def _is_idle(connection: Any) -> bool:
    """Whether no request is being answered on one of uvicorn's HTTP connections."""
    cycle = getattr(connection, "cycle", None)
    return cycle is None or bool(cycle.response_complete)


def _closing(send: _Send) -> _Send:
    """Tell the client that the connection ends with this response."""

    async def send_closing(message: _Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (b"connection", b"close")]
            message = {**message, "headers": headers}
        await send(message)

    return send_closing


async def _refuse(send: _Send) -> None:
    error = {
        "message": "This gateway is draining; another one takes over",
        "type": DrainingError.error_type,
        "param": None,
        "code": DrainingError.code,
    }
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send(
        {"type": "http.response.start", "status": DrainingError.http_status, "headers": headers}
    )
    await send({"type": "http.response.body", "body": body})
