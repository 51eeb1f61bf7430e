"""Server-sent events: one response that streams, ends on a disconnect, and tells errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.boundary import RequestInfo
from services.gateway.disconnect import run_until_disconnect
from services.gateway.errors import ClientDisconnectedError, error_json

DONE_EVENT = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": waiting\n\n"
_LAST_WORD_TIMEOUT_S = 5.0


class EventStreamResponse(Response):
    """Sends the chunks of `events`, each one or several whole events, as they come.

    The answer's status waits for the first chunk for up to `keep_alive_s`, so that an error before
    the first token has its own status; then comments keep the connection alive. A later error
    becomes a last `data: {"error": ...}` event, without `[DONE]`. `events` is closed in any case.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        info: RequestInfo,
        *,
        timeout_s: float,
        keep_alive_s: float = 10.0,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._info = info
        self._timeout_s = timeout_s
        self._keep_alive_s = keep_alive_s
        self._is_started = False
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            work = self._send_events(send)
            await run_until_disconnect(receive, work, timeout_s=self._timeout_s)
        except ClientDisconnectedError:
            raise
        except Exception as error:  # the process boundary, once the answer has begun
            if not self._is_started:
                raise
            self._info.fail(error)
            body = b"data: " + error_json(error, self._info.request_id) + b"\n\n"
            last_word = self._send_chunk(send, body, is_last=True)
            await run_until_disconnect(receive, last_word, timeout_s=_LAST_WORD_TIMEOUT_S)

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events):
            chunk = await self._first_chunk(send)
            await self._send_chunk(send, chunk)
            async for chunk in self._events:
                await self._send_chunk(send, chunk)
            await self._send_chunk(send, b"", is_last=True)

    async def _first_chunk(self, send: Send) -> bytes:
        first = asyncio.ensure_future(anext(self._events))
        try:
            while not (await asyncio.wait({first}, timeout=self._keep_alive_s))[0]:
                await self._send_chunk(send, _KEEP_ALIVE)
            return first.result()
        finally:
            first.cancel()
            await asyncio.wait({first})

    async def _send_chunk(self, send: Send, chunk: bytes, *, is_last: bool = False) -> None:
        if not self._is_started:
            self._is_started = True
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
        await send({"type": "http.response.body", "body": chunk, "more_body": not is_last})


class EventTemplate:
    """Events that differ in their `choices` only; the rest is serialised once.

    `fields` are the members that all events share. With `has_usage` every event says
    `"usage": null` until the one that tells it, as OpenAI's stream does.
    """

    def __init__(self, fields: dict[str, Any], *, has_usage: bool) -> None:
        self._head = f'data: {dumps(fields)[:-1]},"choices":['
        self._tail = '],"usage":null}\n\n' if has_usage else "]}\n\n"

    def choice(self, choice_json: str) -> str:
        return f"{self._head}{choice_json}{self._tail}"

    def usage(self, usage: dict[str, Any]) -> str:
        return f'{self._head}],"usage":{dumps(usage)}}}\n\n'


def dumps(value: Any) -> str:
    """Compact JSON; text stays as it is."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
