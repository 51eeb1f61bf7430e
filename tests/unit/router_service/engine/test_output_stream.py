from __future__ import annotations

import asyncio

import pytest

from router_service.engine.output_stream import OutputHub, OutputStream
from router_service.loop_thread import LoopThread
from services.core.errors import UnavailableError
from services.core.generation import GenerationDelta, TokenLogprob


def _delta(index: int, token: int, **options: object) -> GenerationDelta:
    return GenerationDelta(index=index, token_ids=(token,), **options)  # type: ignore[arg-type]


async def test_deltas_that_pile_up_arrive_together_merged_by_completion() -> None:
    stream = OutputStream(asyncio.get_running_loop())
    logprob = TokenLogprob(token_id=1, logprob=-0.5)
    stream.push(_delta(0, 1, logprobs=(logprob,), num_cached_tokens=4))
    stream.push(_delta(1, 7))
    stream.push(_delta(0, 2, logprobs=(logprob,), num_cached_tokens=4))
    stream.push(GenerationDelta(index=0, finish_reason="stop", stop_token_id=9))
    merged = await stream.next()
    assert merged == (
        GenerationDelta(
            index=0,
            token_ids=(1, 2),
            logprobs=(logprob, logprob),
            finish_reason="stop",
            stop_token_id=9,
        ),
        _delta(1, 7),
    )


async def test_a_closed_stream_gives_what_is_left_and_then_ends() -> None:
    stream = OutputStream(asyncio.get_running_loop())
    stream.push(_delta(0, 1))
    stream.close()
    assert await stream.next() == (_delta(0, 1),)
    assert await stream.next() == ()


async def test_a_failed_stream_gives_what_is_left_and_then_raises() -> None:
    stream = OutputStream(asyncio.get_running_loop())
    stream.push(_delta(0, 1))
    stream.close(UnavailableError("gone"))
    assert await stream.next() == (_delta(0, 1),)
    with pytest.raises(UnavailableError, match="gone"):
        await stream.next()


async def test_a_flush_wakes_each_loop_once_however_many_streams_it_has() -> None:
    loop = asyncio.get_running_loop()
    calls = 0
    original = loop.call_soon_threadsafe

    def counting(*args: object) -> object:
        nonlocal calls
        calls += 1
        return original(*args)  # type: ignore[arg-type]

    loop.call_soon_threadsafe = counting  # type: ignore[method-assign,assignment]
    hub = OutputHub()
    streams = [OutputStream(loop) for _ in range(20)]
    waiting = [asyncio.ensure_future(stream.next()) for stream in streams]
    await asyncio.sleep(0)
    for stream in streams:
        hub.push(stream, _delta(0, 1))
        hub.push(stream, _delta(1, 2))
    assert hub.flush() == []
    assert await asyncio.gather(*waiting) == [(_delta(0, 1), _delta(1, 2))] * 20
    assert calls == 1


async def test_tokens_pushed_from_another_thread_all_arrive_in_order() -> None:
    thread = LoopThread("pusher")
    thread.start()
    stream = OutputStream(asyncio.get_running_loop())

    async def push_many() -> None:
        hub = OutputHub()
        for token in range(500):
            hub.push(stream, _delta(0, token))
            hub.flush()
            if token % 7 == 0:
                await asyncio.sleep(0)
        hub.close(stream)
        hub.flush()

    pushing = asyncio.ensure_future(thread.run(push_many()))
    tokens: list[int] = []
    while deltas := await stream.next():
        tokens += deltas[0].token_ids
    await pushing
    await thread.stop()
    assert tokens == list(range(500))


async def test_streams_of_a_loop_that_was_closed_are_reported() -> None:
    dead = asyncio.new_event_loop()
    dead.close()
    stream = OutputStream(dead)
    hub = OutputHub()
    hub.push(stream, _delta(0, 1))
    assert hub.flush() == [stream]
    assert hub.flush() == []
