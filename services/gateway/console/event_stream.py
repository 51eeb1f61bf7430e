"""`GET /v1/experts/events`: the feed as server-sent events, to one page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.core.asgi_server import draining_of

KEEP_ALIVE_S = 10.0
_KEEP_ALIVE = b": nothing new\n\n"
_OPENING = b"retry: 1000\n\n"
_SEND_TIMEOUT_S = 20.0


class FleetEventStream(Response):
    """`event: fleet` with each of `views`, a comment where there was none.

    Ends, in good order, when the page goes away, when it takes nothing for 20 s, and when the
    server drains: a page that stays open must not hold up a restart. It then connects anew.
    """

    media_type = "text/event-stream"

    def __init__(self, views: AsyncGenerator[bytes | None, None]) -> None:
        self.status_code = 200
        self.background = None
        self._views = views
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._views):
            first = await anext(self._views)  # raises before the answer has begun
            sending = asyncio.create_task(self._send_views(send, first))
            ends = {
                sending,
                asyncio.create_task(_disconnected(receive)),
                asyncio.create_task(draining_of(scope).wait()),
            }
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in ends:
                    task.cancel()
                await asyncio.wait(ends)
        if not sending.cancelled() and (error := sending.exception()) is not None:
            if isinstance(error, TimeoutError):
                return
            raise error
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_views(self, send: Send, first: bytes | None) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        await _send_chunk(send, _OPENING + _event(first))
        async for view in self._views:
            await _send_chunk(send, _event(view))


async def _send_chunk(send: Send, chunk: bytes) -> None:
    async with asyncio.timeout(_SEND_TIMEOUT_S):
        await send({"type": "http.response.body", "body": chunk, "more_body": True})


def _event(view: bytes | None) -> bytes:
    return _KEEP_ALIVE if view is None else b"event: fleet\ndata: " + view + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
