from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from opentelemetry import trace
from starlette.types import Message

from services.core.errors import OverloadedError
from services.gateway.boundary import RequestInfo
from services.gateway.errors import ClientDisconnectedError
from services.gateway.sse import EventStreamResponse, EventTemplate

DEADLINE_S = 60.0


class Connection:
    """The server's side of one HTTP exchange: what was sent, and a way to hang up."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.is_sent = asyncio.Event()
        self.hung_up = asyncio.Event()
        self.can_take = asyncio.Event()
        self.can_take.set()

    async def receive(self) -> Message:
        await self.hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await self.can_take.wait()
        self.sent.append(message)
        self.is_sent.set()

    @property
    def bodies(self) -> list[bytes]:
        return [m["body"] for m in self.sent if m["type"] == "http.response.body"]


class Events:
    """Yields `chunks`; an event is waited for and an error raised. Knows when it was closed."""

    def __init__(self, *chunks: bytes | asyncio.Event | Exception) -> None:
        self._chunks = chunks
        self.num_given = 0
        self.closed = asyncio.Event()

    async def run(self) -> AsyncGenerator[bytes, None]:
        try:
            for chunk in self._chunks:
                if isinstance(chunk, asyncio.Event):
                    await chunk.wait()
                elif isinstance(chunk, Exception):
                    raise chunk
                else:
                    self.num_given += 1
                    yield chunk
        finally:
            self.closed.set()


def new_info() -> RequestInfo:
    return RequestInfo(request_id="req-1", span=trace.INVALID_SPAN)


async def respond(connection: Connection, events: Events, **options: Any) -> RequestInfo:
    info = new_info()
    response = EventStreamResponse(events.run(), info, **({"timeout_s": DEADLINE_S} | options))
    async with asyncio.timeout(DEADLINE_S):
        await response({"type": "http"}, connection.receive, connection.send)
    return info


async def test_every_chunk_is_one_write_in_an_event_stream() -> None:
    connection, events = Connection(), Events(b"one", b"two+three")
    await respond(connection, events)
    start = connection.sent[0]
    headers = dict(start["headers"])
    assert start["status"] == 200
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-cache" and b"content-length" not in headers
    assert connection.bodies == [b"one", b"two+three", b""]
    assert [m["more_body"] for m in connection.sent[1:]] == [True, True, False]
    assert events.closed.is_set()


@pytest.mark.parametrize("num_chunks", [0, 2], ids=["before the first", "in mid-stream"])
async def test_a_client_that_hangs_up_closes_the_events_at_once(num_chunks: int) -> None:
    never = asyncio.Event()
    connection, events = Connection(), Events(*[b"x"] * num_chunks, never)
    task = asyncio.create_task(respond(connection, events))
    while num_chunks > len(connection.bodies):
        connection.is_sent.clear()
        await connection.is_sent.wait()
    await asyncio.sleep(0)
    connection.hung_up.set()
    with pytest.raises(ClientDisconnectedError):
        await task
    assert events.closed.is_set()
    assert connection.bodies == [b"x"] * num_chunks


async def test_an_error_before_the_first_chunk_is_raised_and_nothing_sent() -> None:
    connection = Connection()
    with pytest.raises(OverloadedError):
        await respond(connection, Events(OverloadedError("full")))
    assert connection.sent == []


async def test_a_later_error_is_a_last_event_and_counts_as_that_error() -> None:
    connection = Connection()
    info = await respond(connection, Events(b"one", OverloadedError("full")))
    assert connection.bodies[0] == b"one"
    last = connection.sent[-1]
    assert last["more_body"] is False
    assert json.loads(last["body"].removeprefix(b"data: "))["error"]["code"] == "overloaded"
    assert info.status == 429


async def test_comments_keep_a_connection_alive_that_waits_for_its_first_token() -> None:
    release = asyncio.Event()
    connection, events = Connection(), Events(release, b"one")
    task = asyncio.create_task(respond(connection, events, keep_alive_s=0.01))
    while len(connection.bodies) < 3:
        connection.is_sent.clear()
        await connection.is_sent.wait()
    release.set()
    await task
    assert connection.bodies[0].startswith(b":") and connection.bodies[0].endswith(b"\n\n")
    assert connection.bodies[-2:] == [b"one", b""]


async def test_a_slow_client_holds_the_events_back() -> None:
    connection, events = Connection(), Events(*[b"x"] * 100)
    connection.can_take.clear()
    task = asyncio.create_task(respond(connection, events))
    for _ in range(50):
        await asyncio.sleep(0)
    assert events.num_given <= 1
    connection.can_take.set()
    await task
    assert events.num_given == 100


async def test_a_cancelled_response_closes_its_events() -> None:
    connection, events = Connection(), Events(b"x", asyncio.Event())
    task = asyncio.create_task(respond(connection, events))
    await connection.is_sent.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert events.closed.is_set()


@pytest.mark.parametrize("has_usage", [False, True])
def test_events_are_valid_json_whatever_their_text(has_usage: bool) -> None:
    template = EventTemplate({"id": 'a"b', "model": "ü"}, has_usage=has_usage)
    text = template.choice(json.dumps({"text": 'new\nline "quoted" \u2028'}))
    assert text.startswith("data: ") and text.endswith("\n\n")
    assert "\n" not in text[:-2]
    event = json.loads(text.removeprefix("data: "))
    assert event["choices"] == [{"text": 'new\nline "quoted" \u2028'}]
    assert (event["id"], event["model"]) == ('a"b', "ü")
    assert ("usage" in event) == has_usage
    usage = json.loads(template.usage({"total_tokens": 3}).removeprefix("data: "))
    assert (usage["choices"], usage["usage"]) == ([], {"total_tokens": 3})
