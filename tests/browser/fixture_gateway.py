"""A gateway that serves the real page and made-up data, and can be told to misbehave."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from services.gateway.console.contract import FleetView
from services.gateway.console.pages import INDEX, load_pages
from tests.support.product import free_port

END = None
"""In a stream's queue: close the connection."""


@dataclass
class FixtureGateway:
    """Set the fields at any time; `show` tells a view to every page that listens."""

    url: str
    loop: asyncio.AbstractEventLoop
    view: FleetView | None = None
    is_down: bool = False
    api_key: str | None = None
    admin_key: str | None = None
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    """What a path answers: status and JSON."""
    received: list[tuple[str, Any]] = field(default_factory=list)
    """Path and JSON body of every POST."""
    num_streams: int = 0
    """Streams opened so far."""
    num_refused: int = 0
    """Requests answered 503 so far."""
    _listeners: set[asyncio.Queue[FleetView | None]] = field(default_factory=set)

    def show(self, view: FleetView) -> None:
        self.view = view
        self._tell(view)

    def drop(self) -> None:
        """Close all streams and answer 503 from now on."""
        self.is_down = True
        self._tell(END)

    def reset(self) -> None:
        self.view, self.is_down, self.api_key, self.admin_key = None, False, None, None
        self.answers.clear()
        self.received.clear()
        self._tell(END)
        self.num_streams = self.num_refused = 0

    def _tell(self, view: FleetView | None) -> None:
        def tell() -> None:
            for listener in self._listeners:
                listener.put_nowait(view)

        self.loop.call_soon_threadsafe(tell)

    async def events(self, request: Request) -> Response:
        if refused := self._refused(request, self.api_key):
            return refused
        self.num_streams += 1
        return StreamingResponse(self._stream(), media_type="text/event-stream")

    async def _stream(self) -> AsyncIterator[str]:
        queue: asyncio.Queue[FleetView | None] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            yield ": hello\n\n"
            view = self.view
            if view is None:
                view = await queue.get()
            while view is not END:
                yield f"event: fleet\ndata: {json.dumps(view)}\n\n"
                view = await queue.get()
        finally:
            self._listeners.discard(queue)

    async def answer(self, request: Request) -> Response:
        is_admin = request.url.path.startswith("/admin/")
        if refused := self._refused(request, self.admin_key if is_admin else self.api_key):
            return refused
        if request.method == "POST":
            self.received.append((request.url.path, await request.json()))
        status, content = self.answers.get(
            request.url.path, (404, _error(f"There is no {request.method} {request.url.path}"))
        )
        return JSONResponse(content, status_code=status)

    def _refused(self, request: Request, key: str | None) -> Response | None:
        if self.is_down:
            self.num_refused += 1
            return JSONResponse(_error("The gateway is shutting down"), status_code=503)
        if key and request.headers.get("authorization") != f"Bearer {key}":
            return JSONResponse(
                _error("The API key is not one this gateway knows"), status_code=401
            )
        return None


@contextmanager
def running_gateway() -> Iterator[FixtureGateway]:
    """Serves on a loopback port, in a thread of its own, until the block ends."""
    port = free_port()
    loop = asyncio.new_event_loop()
    gateway = FixtureGateway(url=f"http://127.0.0.1:{port}", loop=loop)
    server = uvicorn.Server(
        uvicorn.Config(
            _application(gateway),
            host="127.0.0.1",
            port=port,
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(),), daemon=True)
    thread.start()
    try:
        yield gateway
    finally:
        gateway.drop()
        server.should_exit = True
        thread.join(timeout=30)
        loop.close()


def _application(gateway: FixtureGateway) -> Starlette:
    pages = load_pages()

    async def page(request: Request) -> Response:
        found = pages.get(request.path_params.get("asset", INDEX))
        return found.answer(None) if found else Response(status_code=404)

    return Starlette(
        routes=[
            Route("/", page),
            Route("/console/{asset}", page),
            Route("/v1/experts/events", gateway.events),
            Route("/{path:path}", gateway.answer, methods=["GET", "POST"]),
        ]
    )


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "code": "x"}}
