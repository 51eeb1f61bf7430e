from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from services.cli.command_queue import CommandQueue
from services.cli.control import ControlError, ControlServer, Handler, Progress, ask
from services.core.errors import NotFoundError, UnavailableError


@asynccontextmanager
async def running(path: Path, **handlers: Handler) -> AsyncIterator[Path]:
    server = ControlServer(path, handlers)
    await server.start()
    try:
        yield path
    finally:
        await server.close()


async def test_a_command_tells_its_progress_and_then_its_result(tmp_path: Path) -> None:
    async def count(request: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
        for number in range(request["to"]):
            progress(f"at {number}")
            await asyncio.sleep(0)
        return {"reached": request["to"]}

    heard: list[str] = []
    async with running(tmp_path / "c.sock", count=count) as path:
        result = await ask(path, {"command": "count", "to": 3}, on_progress=heard.append)
    assert result == {"reached": 3}
    assert heard == ["at 0", "at 1", "at 2"]


async def test_errors_come_back_in_words(tmp_path: Path) -> None:
    async def refuse(_: Mapping[str, Any], __: Progress) -> Mapping[str, Any]:
        raise NotFoundError("there is no worker expert-9")

    async def crash(_: Mapping[str, Any], __: Progress) -> Mapping[str, Any]:
        raise ZeroDivisionError("oh")

    async with running(tmp_path / "c.sock", refuse=refuse, crash=crash) as path:
        with pytest.raises(ControlError, match="no worker expert-9"):
            await ask(path, {"command": "refuse"})
        with pytest.raises(ControlError, match="ZeroDivisionError"):
            await ask(path, {"command": "crash"})
        with pytest.raises(ControlError, match="crash, refuse"):
            await ask(path, {"command": "dance"})


async def test_what_is_not_json_is_refused_and_the_server_lives_on(tmp_path: Path) -> None:
    async def ping(_: Mapping[str, Any], __: Progress) -> Mapping[str, Any]:
        return {"pong": True}

    async with running(tmp_path / "c.sock", ping=ping) as path:
        for garbage in (b"\n", b"\xff\x00\n", b"[]\n", b'{"command": []}\n', b"x" * (2 << 20)):
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(garbage)
            assert b"error" in await asyncio.wait_for(reader.readline(), 60)
            writer.close()
        assert await ask(path, {"command": "ping"}) == {"pong": True}


async def test_a_caller_that_hangs_up_does_not_stop_its_command(tmp_path: Path) -> None:
    begun, release, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slow(_: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
        begun.set()
        await release.wait()
        progress("into the void")
        ended.set()
        return {}

    async with running(tmp_path / "c.sock", slow=slow) as path:
        asking = asyncio.create_task(ask(path, {"command": "slow"}))
        await asyncio.wait_for(begun.wait(), 60)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        release.set()
        await asyncio.wait_for(ended.wait(), 60)


async def test_closing_cancels_what_runs_and_tells_the_caller(tmp_path: Path) -> None:
    begun = asyncio.Event()

    async def endless(_: Mapping[str, Any], __: Progress) -> Mapping[str, Any]:
        begun.set()
        await asyncio.Event().wait()
        return {}

    async with running(tmp_path / "c.sock", endless=endless) as path:
        asking = asyncio.create_task(ask(path, {"command": "endless"}))
        await asyncio.wait_for(begun.wait(), 60)
    with pytest.raises(UnavailableError, match="closed"):
        await asyncio.wait_for(asking, 60)
    with pytest.raises(UnavailableError, match="nobody"):
        await ask(path, {"command": "endless"})


async def test_commands_are_carried_out_on_the_thread_that_waits_for_them(tmp_path: Path) -> None:
    path = tmp_path / "q.sock"
    seen: list[tuple[str, str]] = []
    listening = threading.Event()

    class Over(BaseException):
        pass

    def execute(command: Mapping[str, Any]) -> None:
        seen.append((str(command["word"]), threading.current_thread().name))
        if command["word"] == "bad":
            raise UnavailableError("not now")
        if command["word"] == "end":
            raise Over

    def main() -> None:
        with pytest.raises(Over), CommandQueue(path, ["say"]) as commands:
            listening.set()
            commands.carry_out(execute)

    thread = threading.Thread(target=main, name="the-main-one")
    thread.start()
    assert await asyncio.to_thread(listening.wait, 60)
    assert await ask(path, {"command": "say", "word": "good"}) == {}
    with pytest.raises(ControlError, match="not now"):
        await ask(path, {"command": "say", "word": "bad"})
    with pytest.raises(UnavailableError):
        await ask(path, {"command": "say", "word": "end"})
    await asyncio.to_thread(thread.join, 60)
    assert not thread.is_alive()
    assert seen == [(word, "the-main-one") for word in ("good", "bad", "end")]
