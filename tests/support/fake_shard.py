"""A `ShardClient` that says what a test wrote down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

from services.core.generation import (
    FinishReason,
    GenerateRequest,
    GenerationDelta,
    SessionInfo,
    TokenLogprob,
)

Step = tuple[GenerationDelta, ...] | Exception | asyncio.Event
"""Deltas to yield together, an error to raise, or an event to wait for."""
Script = Callable[[GenerateRequest], Sequence[Step]]


class FakeShard:
    """Plays `script(request)` for each request; remembers requests and how they ended.

    A script tells the whole completion; of a resumed request only what is new is played.

    `num_closed` counts requests whose iterator is over, for whatever reason, and `closed` can be
    waited for. `num_aborted` counts those closed before their script was.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[GenerateRequest] = []
        self.sessions: dict[tuple[str, str], SessionInfo] = {}
        self.not_ready: Exception | None = None
        self.num_closed = 0
        self.num_aborted = 0
        self.started = asyncio.Event()
        self.closed = asyncio.Event()
        self._streams: list[AsyncGenerator[tuple[GenerationDelta, ...], None]] = []

    def generate(
        self, request: GenerateRequest
    ) -> AsyncGenerator[tuple[GenerationDelta, ...], None]:
        stream = self._play(request)
        self._streams.append(stream)  # kept, so that only its reader can close it
        return stream

    async def _play(
        self, request: GenerateRequest
    ) -> AsyncGenerator[tuple[GenerationDelta, ...], None]:
        self.requests.append(request)
        self.started.set()
        is_complete = False
        try:
            resumed = _Resumed(request)
            for step in self.script(request):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                elif news := resumed.news(step):
                    await asyncio.sleep(0)
                    yield news
            is_complete = True
        finally:
            self.num_closed += 1
            self.num_aborted += not is_complete
            self.closed.set()

    async def get_session(self, tenant: str, session_id: str) -> SessionInfo | None:
        return self.sessions.get((tenant, session_id))

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        return self.sessions.pop((tenant, session_id), None) is not None

    async def check_ready(self) -> None:
        if self.not_ready is not None:
            raise self.not_ready


class _Resumed:
    """Takes away what a request brought along of its completions."""

    def __init__(self, request: GenerateRequest) -> None:
        self._is_finished = {i for i, choice in enumerate(request.resumed) if choice.is_finished}
        self._known = {i: list(choice.token_ids) for i, choice in enumerate(request.resumed)}

    def news(self, deltas: tuple[GenerationDelta, ...]) -> tuple[GenerationDelta, ...]:
        own = [self._own_news(delta) for delta in deltas if delta.index not in self._is_finished]
        return tuple(delta for delta in own if delta is not None)

    def _own_news(self, delta: GenerationDelta) -> GenerationDelta | None:
        known = self._known.get(delta.index, [])
        count = min(len(known), len(delta.token_ids))
        if not count:
            return delta
        assert tuple(known[:count]) == delta.token_ids[:count], "resumed with other tokens"
        del known[:count]
        if count == len(delta.token_ids) and delta.finish_reason is None:
            return None
        logprobs = None if delta.logprobs is None else delta.logprobs[count:]
        return replace(delta, token_ids=delta.token_ids[count:], logprobs=logprobs)


def dying(script: Script, *, after: Sequence[int], error: Exception | None = None) -> Script:
    """Shards that play `script` and are lost: the first after `after[0]` steps, and so on; who
    comes after them plays to the end. Without an `error` their streams just end.

    Steps count those that a resumed request is not told any more.
    """
    lives = iter(after)

    def play(request: GenerateRequest) -> Sequence[Step]:
        steps = script(request)
        num_steps = next(lives, None)
        if num_steps is None:
            return steps
        return [*steps[:num_steps], *([error] if error is not None else [])]

    return play


def says(
    token_ids: Sequence[int],
    *,
    index: int = 0,
    finish_reason: FinishReason = "stop",
    stop_token_id: int | None = None,
    num_cached_tokens: int = 0,
    num_restored_tokens: int = 0,
    logprobs: Sequence[TokenLogprob] | None = None,
) -> list[tuple[GenerationDelta, ...]]:
    """One delta a token, then a last one that only finishes choice `index`."""
    deltas = [
        GenerationDelta(
            index=index,
            token_ids=(token_id,),
            logprobs=None if logprobs is None else (logprobs[position],),
            num_cached_tokens=num_cached_tokens,
            num_restored_tokens=num_restored_tokens,
        )
        for position, token_id in enumerate(token_ids)
    ]
    last = GenerationDelta(
        index=index,
        finish_reason=finish_reason,
        stop_token_id=stop_token_id,
        num_cached_tokens=num_cached_tokens,
        num_restored_tokens=num_restored_tokens,
    )
    return [(delta,) for delta in (*deltas, last)]


def repeats(token_ids: Sequence[int]) -> Script:
    """Every choice of every request says `token_ids`, in step; cut at the request's limit."""

    def script(request: GenerateRequest) -> Sequence[Step]:
        limit = request.sampling.max_tokens
        reason: FinishReason = "length" if len(token_ids) > limit else "stop"
        scripts = [
            says(token_ids[:limit], index=index, finish_reason=reason) for index in range(request.n)
        ]
        return [
            tuple(delta for deltas in together for delta in deltas)
            for together in zip(*scripts, strict=True)
        ]

    return script
