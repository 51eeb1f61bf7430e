"""The lab sees what it is there to see: a faked product lies to it in every way that matters."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from services.cli.load.client import RequestRecord
from services.cli.load.workload import Turn
from tests.faults.resources import Sample, growths
from tests.faults.verdict import BIN_S, Marks, Verdict, judge
from tests.support.eventually import eventually
from tests.support.load import Exchange, Script, SteadyLoad, ask_all

NUM_TOKENS = 12
NUM_REQUESTS = 12
VICTIM = 7
"""The request, by the order of coming, that the fake answers wrongly."""
PAUSE_S = 2.0

SCRIPTS = [
    Script(number=0, turns=[Turn(token_ids=(5, 6, 7), max_tokens=NUM_TOKENS)]),
    Script(number=1, turns=[Turn(token_ids=(8, 9), max_tokens=NUM_TOKENS)] * 2),
]

Event = tuple[float, list[int] | None]
"""Seconds to wait, then tokens to send; None: an error, and the end."""
Distort = Callable[[list[int]], list[Event]]


def plainly(tokens: list[int]) -> list[Event]:
    return [(0.0, [token]) for token in tokens]


def with_a_wrong_token(tokens: list[int]) -> list[Event]:
    return plainly([*tokens[:5], tokens[5] + 1, *tokens[6:]])


def with_a_lost_token(tokens: list[int]) -> list[Event]:
    return plainly(tokens[:5] + tokens[6:])


def without_the_last_token(tokens: list[int]) -> list[Event]:
    return plainly(tokens[:-1])


def with_a_repeated_token(tokens: list[int]) -> list[Event]:
    return plainly(tokens[:5] + tokens[4:])


def with_a_pause(tokens: list[int]) -> list[Event]:
    return [*plainly(tokens[:5]), (PAUSE_S, tokens[5:6]), *plainly(tokens[6:])]


def with_an_error(tokens: list[int]) -> list[Event]:
    return [*plainly(tokens[:5]), (0.0, None)]


async def test_an_undisturbed_product_is_found_right() -> None:
    verdict = await _verdict(plainly, SCRIPTS)
    assert verdict.is_right
    assert verdict.num_requests >= NUM_REQUESTS
    assert verdict.longest_gap_s < PAUSE_S


async def test_a_wrong_token_is_seen() -> None:
    verdict = await _verdict(with_a_wrong_token)
    assert (verdict.num_wrong_tokens, verdict.num_lost_tokens, verdict.num_failed) == (1, 0, 0)
    assert not verdict.is_right


@pytest.mark.parametrize("distort", [with_a_lost_token, without_the_last_token])
async def test_a_lost_token_is_seen(distort: Distort) -> None:
    verdict = await _verdict(distort)
    assert (verdict.num_lost_tokens, verdict.num_failed) == (1, 1)


async def test_a_repeated_token_is_seen() -> None:
    verdict = await _verdict(with_a_repeated_token)
    assert verdict.num_wrong_tokens >= 1
    assert not verdict.is_right


async def test_a_gap_is_seen() -> None:
    verdict = await _verdict(with_a_pause)
    assert verdict.is_right
    assert PAUSE_S <= verdict.longest_gap_s < 2 * PAUSE_S


async def test_an_error_in_a_stream_is_a_failure_and_no_silent_loss() -> None:
    verdict = await _verdict(with_an_error)
    assert (verdict.num_failed, verdict.num_lost_tokens) == (1, 0)
    assert verdict.errors == {"the fake's error": 1}


async def test_refused_requests_fail_unless_clients_may_be_told_to_come_again() -> None:
    async with _fake_product(plainly, num_refused=2) as url:
        load = SteadyLoad(url=url, scripts=SCRIPTS, num_streams=3, seed=1)
        await _run(load)
    assert sum(each.record.error is not None for each in load.exchanges) == 2
    async with _fake_product(plainly, num_refused=2) as url:
        load = SteadyLoad(url=url, scripts=SCRIPTS, num_streams=3, seed=1, retries_refused=True)
        await _run(load)
    assert [each for each in load.exchanges if each.record.error is not None] == []
    assert sum(each.num_refused for each in load.exchanges) == 2


def test_recovery_counts_from_the_fault_to_the_last_slow_seconds() -> None:
    def verdict(rates: list[float]) -> Verdict:
        arrivals = [
            (second + index * BIN_S, round(rate * BIN_S))
            for second, rate in enumerate(rates)
            for index in range(round(1 / BIN_S))
        ]
        record = RequestRecord(started_at=0.0, prompt_tokens=1, arrivals=arrivals)
        record.token_ids = [1] * sum(count for _, count in arrivals)
        marks = Marks(started_at=0.0, injected_at=5.0, undone_at=12.0, stopped_at=15.0)
        return judge(
            [Exchange(key=(0, 0), record=record)], {(0, 0): tuple(record.token_ids)}, marks
        )

    steady = verdict([100.0] * 15)
    assert (steady.recovery_s, round(steady.throughput_ratio, 6)) == (0.0, 1.0)
    dip = verdict([100.0] * 6 + [0.0] * 3 + [100.0] * 6)
    assert dip.recovery_s is not None
    assert 3.0 <= dip.recovery_s <= 4.0
    assert dip.throughput_ratio == pytest.approx(4 / 7, abs=0.1)
    assert verdict([100.0] * 6 + [10.0] * 9).recovery_s is None


def test_growth_is_told_from_noise() -> None:
    def samples(grow_bytes: float, grow_fds: float) -> list[Sample]:
        return [
            Sample(
                at_s=10.0 * step,
                role="gateway",
                num_processes=1,
                values={
                    "memory": (300 << 20) + grow_bytes * step + (step % 3 << 20),
                    "threads": 20 + step % 2,
                    "fds": 60 + grow_fds * step,
                    "sockets": 40,
                },
            )
            for step in range(100)
        ]

    assert not any(each.is_too_much for each in growths(samples(0, 0)))
    leaking = [each.name for each in growths(samples(2 << 20, 0.5)) if each.is_too_much]
    assert leaking == ["memory", "fds"]


async def _verdict(distort: Distort, scripts: Sequence[Script] = SCRIPTS[:1]) -> Verdict:
    """Of single requests, so that a wrong answer is not part of a later prompt."""
    async with _fake_product(plainly) as url:
        answers = await ask_all(url, scripts, num_streams=1)
    started_at = time.perf_counter()
    async with _fake_product(distort) as url:
        load = SteadyLoad(url=url, scripts=scripts, num_streams=3, seed=1)
        await _run(load)
    ended_at = time.perf_counter()
    marks = Marks(
        started_at=started_at, injected_at=started_at, undone_at=ended_at, stopped_at=ended_at
    )
    return judge(load.exchanges, answers, marks)


async def _run(load: SteadyLoad) -> None:
    running = asyncio.create_task(load.run())
    await eventually(lambda: len(load.exchanges) >= NUM_REQUESTS)
    load.stop()
    await running


@asynccontextmanager
async def _fake_product(distort: Distort, *, num_refused: int = 0) -> AsyncIterator[str]:
    """Answers with tokens that follow from the prompt; its `VICTIM`th answer is distorted."""
    num_asked = 0

    async def complete(request: web.Request) -> web.StreamResponse:
        nonlocal num_asked
        num_asked += 1
        number = num_asked
        body = await request.json()
        if number <= num_refused:
            return web.json_response({"error": {"message": "come again"}}, status=429)
        first = sum(body["prompt"]) % 997
        right = [first + index for index in range(body["max_tokens"])]
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for wait_s, tokens in (distort if number == VICTIM else plainly)(right):
            await asyncio.sleep(wait_s)
            if tokens is None:
                event: object = {"error": {"message": "the fake's error"}}
            else:
                event = {"choices": [{"index": 0, "text": "", "token_ids": tokens}]}
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write_eof()
        return response

    application = web.Application()
    application.router.add_post("/v1/completions", complete)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
