"""What waits in a gateway is bounded, and large bodies do not hold its event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from services.core.errors import OverloadedError
from services.gateway import body as body_module
from services.gateway.intake import Intake
from services.gateway.schemas.completions import CompletionBody
from tests.support.eventually import eventually
from tests.support.fake_shard import FakeShard, repeats, says
from tests.unit.gateway.http import client_of, error_of

URL = "/v1/completions"


def test_so_many_may_wait_and_one_more_when_one_has_left() -> None:
    intake = Intake(max_requests=2, max_bytes=100)
    first, _second = intake.enter(), intake.enter()
    with pytest.raises(OverloadedError, match="2 requests wait"):
        intake.enter()
    first.leave()
    first.leave()
    intake.enter()
    assert intake.num_requests == 2


def test_their_bodies_may_hold_so_many_bytes_and_one_alone_any_number() -> None:
    intake = Intake(max_requests=10, max_bytes=100)
    large, small = intake.enter(), intake.enter()
    large.hold(1000)
    with pytest.raises(OverloadedError, match="1000 bytes"):
        small.hold(1)
    large.leave()
    small.hold(60)
    small.hold(40)
    assert intake.num_bytes == 100
    small.leave()
    assert (intake.num_requests, intake.num_bytes) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_past_the_bound_requests_get_429_until_others_have_a_token(
    model_folder: Path, stream: bool
) -> None:
    first_token, end = asyncio.Event(), asyncio.Event()
    shard = FakeShard(lambda _: [first_token, *says([9])[:1], end, *says([9])[1:]])
    async with client_of(shard, model_folder, max_waiting_requests=2) as client:

        async def ask() -> int:
            response = await client.post(URL, json={"prompt": "x", "stream": stream})
            return response.status_code

        async def is_taken() -> bool:
            return await ask() == 200

        waiting = [asyncio.ensure_future(ask()) for _ in range(2)]
        await eventually(lambda: len(shard.requests) == 2)
        refused = await client.post(URL, json={"prompt": "x"})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert error_of(refused)["code"] == "overloaded"
        assert len(shard.requests) == 2, "refused at once"
        first_token.set()
        late = asyncio.ensure_future(eventually(is_taken))
        await eventually(lambda: len(shard.requests) == 3)
        assert shard.num_closed == 0, "the first two go on"
        end.set()
        assert await asyncio.gather(*waiting) == [200, 200]
        await late


@pytest.mark.parametrize(
    "wrong",
    [{"prompt": "x", "temperature": 9}, {"prompt": [10**9]}, {"prompt": "x", "model": "other"}],
)
async def test_a_request_that_fails_takes_no_place(
    model_folder: Path, wrong: dict[str, Any]
) -> None:
    shard = FakeShard(repeats([9]))
    async with client_of(shard, model_folder, max_waiting_requests=1) as client:
        for _ in range(3):
            assert (await client.post(URL, json=wrong)).status_code in (400, 404)
        assert (await client.post(URL, json={"prompt": "x"})).status_code == 200


async def test_bodies_past_the_bound_get_429(model_folder: Path) -> None:
    end = asyncio.Event()
    shard = FakeShard(lambda _: [end, *says([9])])
    async with client_of(shard, model_folder, max_waiting_bytes=1024) as client:
        asked = {"prompt": [9] * 200, "max_tokens": 4, "user": "u" * 400}
        waiting = asyncio.ensure_future(client.post(URL, json=asked))
        await eventually(lambda: len(shard.requests) == 1)
        refused = await client.post(URL, json=asked)
        assert refused.status_code == 429
        assert "bytes" in error_of(refused)["message"]
        end.set()
        assert (await waiting).status_code == 200
        assert (await client.post(URL, json=asked)).status_code == 200


@pytest.mark.parametrize("is_large", [False, True])
async def test_only_large_bodies_are_parsed_beside_the_event_loop(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    threads: list[threading.Thread] = []
    parse = CompletionBody.model_validate_json

    def spy(content: bytes) -> CompletionBody:
        threads.append(threading.current_thread())
        return parse(content)

    monkeypatch.setattr(CompletionBody, "model_validate_json", spy)
    shard = FakeShard(repeats([9]))
    pad = " " * (body_module.MAX_INLINE_BYTES if is_large else 10)
    content = json.dumps({"prompt": "x"}) + pad
    async with client_of(shard, model_folder) as client:
        headers = {"content-type": "application/json"}
        good = await client.post(URL, content=content, headers=headers)
        bad = await client.post(URL, content="{" + content, headers=headers)
    assert (good.status_code, bad.status_code) == (200, 400)
    assert [thread is threading.main_thread() for thread in threads] == [not is_large] * 2


@pytest.mark.parametrize(("given", "reached"), [(None, 0), (-8, -8), (3, 3), (8, 8)])
@pytest.mark.parametrize("chat", [False, True])
async def test_the_priority_reaches_the_shard(
    model_folder: Path, given: int | None, reached: int, chat: bool
) -> None:
    shard = FakeShard(repeats([9]))
    asked = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    url = "/v1/chat/completions" if chat else URL
    async with client_of(shard, model_folder) as client:
        response = await client.post(url, json=asked | {"priority": given})
    assert response.status_code == 200
    assert [request.priority for request in shard.requests] == [reached]


@pytest.mark.parametrize("wrong", [-9, 9, 0.5, "high"])
async def test_another_priority_is_refused(model_folder: Path, wrong: object) -> None:
    shard = FakeShard(repeats([9]))
    async with client_of(shard, model_folder) as client:
        response = await client.post(URL, json={"prompt": "x", "priority": wrong})
    assert response.status_code == 400
    assert error_of(response)["param"] == "priority"
