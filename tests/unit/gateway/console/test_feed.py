from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from services.core.errors import OverloadedError, UnavailableError
from services.core.registry import WorkerRecord
from services.gateway.console.activity import Activity, Served
from services.gateway.console.feed import ConsoleFeed
from tests.support.eventually import eventually
from tests.support.records import worker_record
from tests.unit.gateway.console.scene import FixedRegistry, feed_of

NEVER_S = 1000.0


def lease(name: str, *, written_at: float = 1.0, **changes: Any) -> WorkerRecord:
    return worker_record(name, written_at=written_at, **changes)


async def next_view(views: Any) -> dict[str, Any]:
    async with asyncio.timeout(10.0):
        content = await anext(views)
    assert content is not None
    view: dict[str, Any] = json.loads(content)
    return view


def listening(feed: ConsoleFeed) -> Any:
    return aclosing(feed.listen(keep_alive_s=NEVER_S))


async def test_a_listener_gets_the_fleet_at_once_and_then_its_changes(model_folder: Path) -> None:
    registry = FixedRegistry(lease("a"))
    feed = feed_of(registry, model_folder)
    async with listening(feed) as views:
        first = await next_view(views)
        assert [each["worker_id"] for each in first["workers"]] == ["a"]
        registry.set([lease("a"), lease("b", state="loading")])
        second = await next_view(views)
        assert [each["state"] for each in second["workers"]] == ["ready", "loading"]
    await feed.close()


async def test_where_nothing_changes_a_listener_is_told_so(model_folder: Path) -> None:
    feed = feed_of(FixedRegistry(lease("a")), model_folder)
    async with aclosing(feed.listen(keep_alive_s=0.1)) as views:
        assert await anext(views) is not None
        assert await anext(views) is None
        assert await anext(views) is None
    await feed.close()


async def test_a_slow_listener_gets_the_newest_view_and_no_backlog(model_folder: Path) -> None:
    registry = FixedRegistry(lease("a"))
    feed = feed_of(registry, model_folder)
    async with listening(feed) as slow, listening(feed) as quick:
        await next_view(slow)
        await next_view(quick)
        for number in range(5):
            registry.set([lease("a", written_at=2.0 + number, num_frames=number + 1)])
            assert (await next_view(quick))["workers"][0]["num_frames"] == number + 1
        assert (await next_view(slow))["workers"][0]["num_frames"] == 5
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await anext(slow)
    await feed.close()


async def test_one_reader_serves_all_listeners(model_folder: Path) -> None:
    registry = FixedRegistry(lease("a"))
    feed = feed_of(registry, model_folder, interval_s=NEVER_S)
    async with listening(feed) as one, listening(feed) as two, listening(feed) as three:
        for views in (one, two, three):
            await next_view(views)
        assert await feed.view() == await feed.view()
        assert registry.num_reads == 1
    await feed.close()


async def test_listeners_are_bounded_and_leave_room_when_they_go(model_folder: Path) -> None:
    feed = feed_of(FixedRegistry(), model_folder, max_listeners=1)
    async with listening(feed) as views:
        await next_view(views)
        with pytest.raises(OverloadedError):
            await anext(feed.listen(keep_alive_s=NEVER_S))
        assert feed.num_listeners == 1
    assert feed.num_listeners == 0
    async with listening(feed) as views:
        await next_view(views)
    await feed.close()


async def test_while_nobody_listens_the_fleet_is_read_but_seldom(model_folder: Path) -> None:
    registry = FixedRegistry(lease("a"))
    feed = feed_of(registry, model_folder)
    feed.start()
    await eventually(lambda: registry.num_reads == 1)
    await asyncio.sleep(0.2)
    assert registry.num_reads == 1, "the idle interval is a minute here, the other one 20 ms"
    async with listening(feed) as views:
        await next_view(views)
        registry.set([])
        assert (await next_view(views))["workers"] == []
    await feed.close()


async def test_a_store_that_is_away_loses_no_worker(model_folder: Path) -> None:
    registry = FixedRegistry(lease("a"))
    feed = feed_of(registry, model_folder)
    async with listening(feed) as views:
        await next_view(views)
        registry.error = UnavailableError("store away")
        away = await next_view(views)
        assert (away["store"], away["workers"][0]["state"]) == ("away", "ready")
        registry.error = None
        assert (await next_view(views))["store"] == "ok"
    await feed.close()


async def test_without_a_registry_the_gateways_own_requests_are_told(model_folder: Path) -> None:
    activity = Activity()
    feed = feed_of(None, model_folder, activity=activity)
    async with listening(feed) as views:
        first = await next_view(views)
        assert (first["store"], first["workers"], first["slow_requests"]) == ("none", [], [])
        served = Served(
            model="m", num_prompt_tokens=1, num_generated_tokens=1, ttft_s=1.0, tpot_s=None
        )
        activity.request_ended(served, request_id="r", trace_id=None, status=200, took_s=1.0)
        assert (await next_view(views))["slow_requests"][0]["request_id"] == "r"
    await feed.close()


async def test_a_reader_that_a_bug_ended_is_told_of_and_begins_anew(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = FixedRegistry(lease("a"))
    feed = feed_of(registry, model_folder)
    async with listening(feed) as views:
        await next_view(views)
        registry.error = RuntimeError("bug")  # type: ignore[assignment]
        waiting = asyncio.ensure_future(anext(views))
        await eventually(lambda: "the console's reader ended" in caplog.text)
        waiting.cancel()
        await asyncio.wait({waiting})
    registry.error = None
    registry.set([lease("b")])
    async with listening(feed) as views:
        await next_view(views)
        registry.set([])
        while (await next_view(views))["workers"]:
            pass
    await feed.close()
