"""A TCP proxy on loopback that can misbehave: late, silent, cut off, or not there at all."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

_READ_BYTES = 1 << 18
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_CALL_TIMEOUT_S = 10.0
_T = TypeVar("_T")

Address = tuple[str, int] | Path
"""Host and port, or the path of a Unix socket."""


@dataclass(slots=True, eq=False)
class Route:
    """What is forwarded from one listening address to `target`, and how.

    `delay_s` is added in each direction. While `is_silent` connections stay open, and new ones are
    accepted, but no byte passes. While `is_refusing` new connections are reset.
    """

    target: Address
    delay_s: float = 0.0
    is_refusing: bool = False
    num_connections: int = 0
    flowing: asyncio.Event = field(default_factory=asyncio.Event)
    connections: set[_Connection] = field(default_factory=set)

    @property
    def is_silent(self) -> bool:
        return not self.flowing.is_set()


class FaultProxy:
    """Runs on a thread of its own; its methods may be called from any other."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._servers: dict[Route, asyncio.Server] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()

    def listen(self, address: Address, target: Address) -> Route:
        """Forward connections to `address` (port 0: see `port_of`) to `target` until `close`."""
        return self._call(self._listen(address, target))

    def port_of(self, route: Route) -> int:
        return int(self._servers[route].sockets[0].getsockname()[1])

    def delay(self, route: Route, seconds: float) -> None:
        self._call(self._change(route, delay_s=seconds))

    def silence(self, route: Route) -> None:
        """Half-open: nothing passes, nobody is told."""
        self._call(self._change(route, flows=False))

    def cut(self, route: Route, *, refuse: bool = False) -> None:
        """Reset every connection; with `refuse` also those that are tried until `restore`."""
        self._call(self._change(route, is_refusing=refuse, resets=True))

    def restore(self, route: Route) -> None:
        """Forward as at the start. What was held back by silence is reset: it was lost."""
        was_silent = route.is_silent
        self._call(
            self._change(route, delay_s=0.0, is_refusing=False, resets=was_silent, flows=True)
        )

    def end(self, route: Route) -> None:
        """Stop listening and reset what is connected."""
        self._call(self._end(route))

    def close(self) -> None:
        if self._loop.is_closed():
            return
        for route in list(self._servers):
            self.end(route)
        self._call(self._end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_TIMEOUT_S)
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_TIMEOUT_S)

    async def _listen(self, address: Address, target: Address) -> Route:
        route = Route(target)
        route.flowing.set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await _Connection(route, reader, writer).run()

        if isinstance(address, Path):
            server = await asyncio.start_unix_server(accept, address, limit=_READ_BYTES)
        else:
            server = await asyncio.start_server(accept, *address, limit=_READ_BYTES)
        self._servers[route] = server
        return route

    async def _change(
        self,
        route: Route,
        *,
        delay_s: float | None = None,
        is_refusing: bool | None = None,
        flows: bool | None = None,
        resets: bool = False,
    ) -> None:
        if delay_s is not None:
            route.delay_s = delay_s
        if is_refusing is not None:
            route.is_refusing = is_refusing
        if resets:
            for connection in list(route.connections):
                connection.reset()
        if flows is not None:
            (route.flowing.set if flows else route.flowing.clear)()

    async def _end(self, route: Route) -> None:
        self._servers.pop(route).close()
        await self._change(route, resets=True)

    async def _end_tasks(self) -> None:
        """None may be left to be collected once the loop is closed, wherever that happens."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Connection:
    """Two directions, each a reader and a writer with a queue of what is on its way between."""

    def __init__(
        self, route: Route, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._route = route
        self._client = (reader, writer)
        self._writers = [writer]
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Forward until either end closes or `reset`."""
        route = self._route
        route.connections.add(self)
        route.num_connections += 1
        try:
            if route.is_refusing:
                return
            target = route.target
            server = await (
                asyncio.open_unix_connection(target, limit=_READ_BYTES)
                if isinstance(target, Path)
                else asyncio.open_connection(*target, limit=_READ_BYTES)
            )
            self._writers.append(server[1])
            for writer in self._writers:
                _no_delay(writer)
            self._tasks = [
                asyncio.create_task(self._forward(self._client[0], server[1])),
                asyncio.create_task(self._forward(server[0], self._client[1])),
            ]
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass  # the target is not there: the client sees its connection reset
        finally:
            self.reset()
            route.connections.discard(self)
            # An end that broke told the other by the reset; nobody else wants to know.
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def reset(self) -> None:
        for task in self._tasks:
            task.cancel()
        for writer in self._writers:
            end = writer.get_extra_info("socket")
            if end is not None and end.fileno() >= 0 and end.family != socket.AF_UNIX:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        on_its_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._receive(reader, on_its_way))
            group.create_task(self._deliver(on_its_way, writer))

    async def _receive(
        self, reader: asyncio.StreamReader, on_its_way: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        while True:
            try:
                chunk = await reader.read(_READ_BYTES)
            except OSError:
                chunk = b""
            await on_its_way.put((time.monotonic() + self._route.delay_s, chunk))
            if not chunk:
                return

    async def _deliver(
        self, on_its_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            arrives_at, chunk = await on_its_way.get()
            if (wait_s := arrives_at - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            await self._route.flowing.wait()
            if not chunk:
                return
            writer.write(chunk)
            await writer.drain()


def _no_delay(writer: asyncio.StreamWriter) -> None:
    end = writer.get_extra_info("socket")
    if end is not None and end.family != socket.AF_UNIX:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
