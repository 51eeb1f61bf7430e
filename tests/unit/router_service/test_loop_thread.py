from __future__ import annotations

import asyncio
import threading

import pytest

from router_service.loop_thread import LoopThread


async def test_coroutines_run_on_the_thread_and_return_here() -> None:
    thread = LoopThread("worker")
    thread.start()
    thread.start()

    async def where() -> str:
        return threading.current_thread().name

    assert await thread.run(where()) == "worker"
    await thread.stop()
    assert not thread.is_alive


async def test_cancelling_the_caller_cancels_the_coroutine() -> None:
    thread = LoopThread("worker")
    thread.start()
    cancelled = threading.Event()
    started = threading.Event()

    async def wait() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    call = asyncio.ensure_future(thread.run(wait()))
    assert await asyncio.to_thread(started.wait, 5)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await asyncio.to_thread(cancelled.wait, 5)
    await thread.stop()


async def test_stopping_cancels_what_still_runs_and_refuses_more() -> None:
    thread = LoopThread("worker")
    thread.start()
    ended = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    thread.call_soon(lambda: thread.loop.create_task(wait()))
    await thread.stop()
    assert ended.is_set()
    assert not thread.call_soon(print)
    await thread.stop()
