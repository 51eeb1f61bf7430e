from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from services.core.asgi_server import AsgiServer
from services.core.listening_socket import open_listener

HOST = "127.0.0.1"
GET = b"GET %s HTTP/1.1\r\nHost: here\r\n\r\n"
DEADLINE_S = 60.0


class App:
    """`/slow` sends its head at once and its end when `release` is set; the rest answers "ok"."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.num_begun = 0
        self.is_shut_down = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            self.is_shut_down = True
            await send({"type": "lifespan.shutdown.complete"})
            return
        self.num_begun += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/slow":
            await send({"type": "http.response.body", "body": b"begin ", "more_body": True})
            await self.release.wait()
        await send({"type": "http.response.body", "body": b"ok"})


class Client:
    """One connection; what comes is collected."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, port: int) -> Client:
        return cls(*await asyncio.open_connection(HOST, port))

    def send(self, path: bytes) -> None:
        self._writer.write(GET % path)

    async def until(self, end: bytes) -> bytes:
        return await asyncio.wait_for(self._reader.readuntil(end), DEADLINE_S)

    async def until_closed(self) -> bytes:
        """Raises ConnectionResetError where the connection was reset."""
        received = await asyncio.wait_for(self._reader.read(), DEADLINE_S)
        self._writer.close()
        return received


@asynccontextmanager
async def serving(app: App, *, drain_timeout_s: float = 50.0) -> AsyncIterator[AsgiServer]:
    server = AsgiServer(
        app, open_listener(HOST, 0, reuse_port=True), drain_timeout_s=drain_timeout_s
    )
    await server.start()
    try:
        yield server
    finally:
        app.release.set()
        await server.stop()


async def test_draining_refuses_new_connections_and_finishes_open_responses() -> None:
    app = App()
    async with serving(app) as server:
        port = server.port
        client = await Client.connect(port)
        client.send(b"/slow")
        await client.until(b"begin ")
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0)
        with pytest.raises(OSError):
            while True:  # the socket is closed within a few turns of the loop
                (await Client.connect(port))._writer.close()
        assert not stopping.done()
        app.release.set()
        assert b"ok" in await client.until_closed()
        await asyncio.wait_for(stopping, DEADLINE_S)
        assert app.is_shut_down


async def test_a_request_on_a_connection_accepted_just_before_is_answered_not_reset() -> None:
    app = App()
    async with serving(app) as server:
        clients = [await Client.connect(server.port) for _ in range(8)]
        stopping = asyncio.create_task(server.stop())
        for client in clients[:4]:
            client.send(b"/")
        await asyncio.sleep(0.3)
        for client in clients[4:]:
            client.send(b"/")
        answers = await asyncio.gather(*(client.until_closed() for client in clients))
        assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)
        assert all(b"connection: close" in answer for answer in answers)
        await asyncio.wait_for(stopping, DEADLINE_S)


async def test_a_connection_is_kept_for_longer_than_clients_keep_theirs() -> None:
    """The openai client gives up an idle one after 5 s, as uvicorn does if it is not told."""
    async with serving(App()) as server:
        client = await Client.connect(server.port)
        for pause_s in (5.5, 0):
            client.send(b"/")
            assert b"ok" in await client.until(b"\r\n0\r\n\r\n")
            await asyncio.sleep(pause_s)


async def test_readiness_is_refused_while_draining_and_only_then() -> None:
    app = App()
    async with serving(app) as server:
        client = await Client.connect(server.port)
        client.send(b"/readyz")
        assert b" 200 " in await client.until(b"\r\n\r\n")
        assert b"ok" in await client.until(b"\r\n0\r\n\r\n")
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0.05)
        client.send(b"/readyz")
        answer = await client.until_closed()
        assert b" 503 " in answer
        assert b'"draining"' in answer
        await asyncio.wait_for(stopping, DEADLINE_S)


async def test_connections_that_stay_idle_are_closed_in_good_order() -> None:
    async with serving(App()) as server:
        client = await Client.connect(server.port)
        loop = asyncio.get_running_loop()
        started = loop.time()
        await asyncio.wait_for(server.stop(), DEADLINE_S)
        assert loop.time() - started < 20
        assert await client.until_closed() == b""


async def test_what_does_not_end_within_the_bound_is_cut_off() -> None:
    app = App()
    async with serving(app, drain_timeout_s=0.3) as server:
        client = await Client.connect(server.port)
        client.send(b"/slow")
        await client.until(b"begin ")
        await asyncio.wait_for(server.stop(), DEADLINE_S)
        assert b"ok" not in await client.until_closed()
        assert app.is_shut_down


async def test_a_long_draining_can_be_cut_short() -> None:
    app = App()
    async with serving(app) as server:
        client = await Client.connect(server.port)
        client.send(b"/slow")
        await client.until(b"begin ")
        stopping = asyncio.create_task(server.stop(60.0))
        await asyncio.sleep(0.1)
        assert not stopping.done()
        server.drain_within(0.0)
        await asyncio.wait_for(stopping, DEADLINE_S)
        await client.until_closed()
