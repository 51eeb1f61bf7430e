"""Whoever leaves, and whenever: nobody else's answer changes, and no block is lost.

Aborts happen on the engine's loop a drawn number of its turns after the request came, so also
between a step's plan and its micro-batches, and while experts are waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router_service.engine.engine import Engine
from router_service.engine.output_stream import OutputStream
from services.core.generation import GenerateRequest
from tests.support.eventually import eventually
from tests.support.fake_decoder import (
    FakeDecoder,
    collect,
    fake_engine,
    fake_request,
    greedy_tokens,
)

MOST_TURNS = 160


@dataclass(frozen=True)
class Visitor:
    """`leaves_after` turns of the engine's loop; None: stays to the end."""

    prompt: tuple[int, ...]
    max_tokens: int
    leaves_after: int | None


PROMPTS = st.one_of(
    st.sampled_from([tuple(range(1, length)) for length in (3, 9, 14)]),  # with common prefixes
    st.lists(st.integers(0, 99), min_size=1, max_size=12).map(tuple),
)
VISITORS = st.lists(
    st.builds(
        Visitor,
        prompt=PROMPTS,
        max_tokens=st.integers(1, 20),
        leaves_after=st.one_of(st.none(), st.integers(0, MOST_TURNS)),
    ),
    min_size=2,
    max_size=9,
)
ENGINES = st.fixed_dictionaries(
    {
        "num_micro_batches": st.integers(1, 3),
        "num_blocks": st.sampled_from([12, 20, 64]),  # of few blocks some are taken back
        "max_num_batched_tokens": st.sampled_from([5, 32]),
    }
)


@given(visitors=VISITORS, options=ENGINES, num_yields=st.integers(0, 2))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whoever_leaves_changes_nobody_elses_answer_and_takes_no_block_along(
    visitors: list[Visitor], options: dict[str, Any], num_yields: int
) -> None:
    asyncio.run(
        _serve(visitors, fake_engine(decoder=FakeDecoder(4, num_yields=num_yields), **options))
    )


async def _serve(visitors: list[Visitor], engine: Engine) -> None:
    _let_leave(engine, visitors)
    engine._thread.start()
    requests = [
        fake_request(visitor.prompt, visitor.max_tokens, request_id=str(number))
        for number, visitor in enumerate(visitors)
    ]
    answers = [asyncio.create_task(collect(engine.generate(request))) for request in requests]
    await asyncio.sleep(0)  # so that all come before the first step
    engine.start()
    try:
        async with asyncio.timeout(60):
            for visitor, answer in zip(visitors, answers, strict=True):
                if visitor.leaves_after is None:
                    (completion,) = await answer
                    assert completion.token_ids == greedy_tokens(visitor.prompt, visitor.max_tokens)
        for answer in answers:
            answer.cancel()
        await asyncio.gather(*answers, return_exceptions=True)
        await eventually(lambda: engine.stats().num_running == engine.stats().num_waiting == 0)
        assert engine.stats().kv_blocks_used == 0
    finally:
        await engine.stop(1)


def _let_leave(engine: Engine, visitors: list[Visitor]) -> None:
    submit = engine._submit

    def submit_and_leave(request: GenerateRequest, stream: OutputStream) -> None:
        submit(request, stream)
        turns = visitors[int(request.request_id)].leaves_after
        if turns is not None:
            _after(turns, lambda: engine._request_abort(stream))

    engine._submit = submit_and_leave  # type: ignore[method-assign]


def _after(turns: int, act: Callable[[], None]) -> None:
    if turns:
        asyncio.get_running_loop().call_soon(_after, turns - 1, act)
    else:
        act()
