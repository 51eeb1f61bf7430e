from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.types import Message

from services.core.errors import OverloadedError
from services.gateway.console import event_stream
from services.gateway.console.event_stream import FleetEventStream

DEADLINE_S = 30.0
VIEW = b'{"at":1}'


class Views:
    """What a feed would give: `given`, then nothing for ever."""

    def __init__(self, *given: bytes | None) -> None:
        self._given = given
        self.is_closed = False

    async def all(self) -> AsyncGenerator[bytes | None, None]:
        try:
            for view in self._given:
                yield view
            await asyncio.Event().wait()
        finally:
            self.is_closed = True


async def stays() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def test_views_are_events_and_silence_is_a_comment() -> None:
    views, sent, leaving = Views(VIEW, None, VIEW), list[Message](), asyncio.Event()

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) == 4:
            leaving.set()

    async def leaves() -> Message:
        await leaving.wait()
        return {"type": "http.disconnect"}

    async with asyncio.timeout(DEADLINE_S):
        await FleetEventStream(views.all())({"type": "http"}, leaves, send)
    start, *bodies = sent
    headers = dict(start["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-store"
    event = b"event: fleet\ndata: " + VIEW + b"\n\n"
    assert bodies[0]["body"] == b"retry: 1000\n\n" + event
    assert bodies[1]["body"].startswith(b": ")
    assert bodies[2]["body"] == event
    assert [body["more_body"] for body in bodies] == [True, True, True, False]
    assert views.is_closed


async def test_a_page_that_takes_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "_SEND_TIMEOUT_S", 0.05)
    views, num_sent = Views(VIEW, VIEW), 0

    async def send(message: Message) -> None:
        nonlocal num_sent
        num_sent += 1
        if num_sent > 2:
            await asyncio.Event().wait()

    async with asyncio.timeout(DEADLINE_S):
        await FleetEventStream(views.all())({"type": "http"}, stays, send)
    assert (num_sent, views.is_closed) == (3, True)


async def test_a_draining_server_ends_the_stream_in_good_order() -> None:
    views, sent, draining = Views(VIEW), list[Message](), asyncio.Event()

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) == 2:
            draining.set()

    scope: dict[str, Any] = {"type": "http", "expertfleet.draining": draining}
    async with asyncio.timeout(DEADLINE_S):
        await FleetEventStream(views.all())(scope, stays, send)
    assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    assert views.is_closed


async def test_a_refusal_comes_before_the_answer_has_begun() -> None:
    async def refuse() -> AsyncGenerator[bytes | None, None]:
        raise OverloadedError("too many")
        yield None

    async def send(message: Message) -> None:
        raise AssertionError(message)

    with pytest.raises(OverloadedError):
        await FleetEventStream(refuse())({"type": "http"}, stays, send)
