"""Requests outlive their shards: what is lost half-way is sent again and goes on where it was.

The gateway keeps the tokens it was given. When the shard that had a request is gone, it sends the
prompt and those tokens to another one, under the same id and with the same sampling and seed. Draws
depend on seed and position alone, so the completion goes on as it would have.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final, cast

from services.core.errors import LossReason, ShardLostError, UnavailableError
from services.core.generation import (
    GenerateRequest,
    GenerationDelta,
    ResumedChoice,
    ShardClient,
)

MAX_DEATHS: Final = 3
"""So many shards may die on a request, without a new token in between, before it is given up."""
SUSPECT_DEATHS: Final = 2
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Resubmission:
    """A request is about to be sent again. `attempt` counts from 1; `num_tokens` are its emitted
    ones, of all choices that go on."""

    attempt: int
    reason: LossReason
    num_tokens: int


class EmittedTokens:
    """What the `n` choices of one request have come to."""

    def __init__(self, n: int) -> None:
        self._token_ids: list[list[int]] = [[] for _ in range(n)]
        self._is_finished = [False] * n

    def add(self, deltas: Sequence[GenerationDelta]) -> None:
        for delta in deltas:
            self._token_ids[delta.index] += delta.token_ids
            if delta.finish_reason is not None:
                self._is_finished[delta.index] = True

    def finish(self, index: int) -> None:
        """Choice `index` needs no more tokens, whatever its shard thinks."""
        self._is_finished[index] = True

    @property
    def is_complete(self) -> bool:
        return all(self._is_finished)

    def unfinished(self) -> list[int]:
        return [index for index, finished in enumerate(self._is_finished) if not finished]

    def num_tokens(self, index: int) -> int:
        return len(self._token_ids[index])

    def resumed(self) -> tuple[ResumedChoice, ...]:
        pairs = zip(self._token_ids, self._is_finished, strict=True)
        return tuple(
            ResumedChoice(is_finished=True) if finished else ResumedChoice(token_ids=tuple(tokens))
            for tokens, finished in pairs
        )


class Losses:
    """How often a request was lost since its last new token, and what follows from it.

    Pure: times are arguments, readings of one monotonic clock.
    """

    def __init__(self, *, shard_wait_s: float) -> None:
        self._shard_wait_s = shard_wait_s
        self._num_losses = 0
        self._num_deaths = 0
        self._unreachable_since: float | None = None

    @property
    def is_suspect(self) -> bool:
        """It may be the request itself that ends the shards."""
        return self._num_deaths >= SUSPECT_DEATHS

    def progressed(self) -> None:
        """New tokens came: whatever was before, this request can be served."""
        self._num_losses = self._num_deaths = 0
        self._unreachable_since = None

    def lost(self, error: ShardLostError, *, sent_at: float, now: float) -> float:
        """Seconds to wait before it is sent again. Raises `UnavailableError` to give it up."""
        if self._shard_wait_s == 0:
            raise error
        if error.reason == "died":
            self._died(error)
        else:
            self._not_taken(error, sent_at, now)
        self._num_losses += 1
        if self._num_losses == 1:
            return 0.0
        return min(_FIRST_PAUSE_S * 2.0 ** (self._num_losses - 2), _LONGEST_PAUSE_S)

    def _died(self, error: ShardLostError) -> None:
        self._unreachable_since = None
        self._num_deaths += 1
        if self._num_deaths >= MAX_DEATHS:
            raise UnavailableError(
                f"{self._num_deaths} attention shards were lost one after another while they had "
                f"the request, without a new token; it is not sent again ({error.message})"
            ) from error

    def _not_taken(self, error: ShardLostError, sent_at: float, now: float) -> None:
        if self._unreachable_since is None:
            # One that drains or hangs may have had the request for long.
            self._unreachable_since = sent_at if error.reason == "unreachable" else now
        if now - self._unreachable_since >= self._shard_wait_s:
            raise UnavailableError(
                f"no attention shard took the request within {self._shard_wait_s:g} s "
                f"({error.message})"
            ) from error


class ResubmittingShards:
    """Sends requests to `shard` until they are complete, and again when a shard is lost.

    A request on which shards died twice is suspected of having ended them, so of these only one at
    a time is with the shards until it gets a new token. Thus a request that ends every shard it
    touches takes no innocent ones with it, and ends `MAX_DEATHS` shards at most. With
    `shard_wait_s` 0 there is no other shard: nothing is sent again.
    """

    def __init__(
        self,
        shard: ShardClient,
        *,
        shard_wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shard = shard
        self._shard_wait_s = shard_wait_s
        self._clock = clock
        self._suspects = asyncio.Lock()

    async def generate(
        self,
        request: GenerateRequest,
        emitted: EmittedTokens,
        on_resubmit: Callable[[Resubmission], None],
    ) -> AsyncGenerator[tuple[GenerationDelta, ...], None]:
        """As `ShardClient.generate`, over as many shards as it takes.

        `emitted`, at first empty, is kept up to date here; the caller may `finish` choices of it.
        `on_resubmit` is told before each attempt after the first, of those in a row that reach no
        shard only once. Raises what the shard raised,
        but `ShardLostError` only where nothing is sent again, and `UnavailableError` in the end.
        """
        losses = Losses(shard_wait_s=self._shard_wait_s)
        sending, attempt, is_waiting = request, 0, False
        while True:
            sent_at = self._clock()
            try:
                async with aclosing(self._attempt(sending, losses)) as stream:
                    async for deltas in stream:
                        emitted.add(deltas)
                        yield deltas
                        if emitted.is_complete:
                            return
                raise ShardLostError(
                    f"The attention shard ended request {request.request_id} before it was complete"
                )
            except ShardLostError as error:
                pause_s = losses.lost(error, sent_at=sent_at, now=self._clock())
                reason = error.reason
            if at_limit := self._at_limit(request, emitted):
                emitted.add(at_limit)
                yield at_limit
                if emitted.is_complete:
                    return
            await asyncio.sleep(pause_s)
            sending = replace(request, resumed=emitted.resumed())
            if reason == "unreachable" and is_waiting:
                continue
            is_waiting = reason == "unreachable"
            attempt += 1
            num_tokens = sum(emitted.num_tokens(index) for index in emitted.unfinished())
            on_resubmit(Resubmission(attempt=attempt, reason=reason, num_tokens=num_tokens))

    async def _attempt(
        self, request: GenerateRequest, losses: Losses
    ) -> AsyncGenerator[tuple[GenerationDelta, ...], None]:
        is_alone = losses.is_suspect
        if is_alone:
            await self._suspects.acquire()
        try:
            stream = cast(
                "AsyncGenerator[tuple[GenerationDelta, ...]]", self._shard.generate(request)
            )
            async with aclosing(stream):
                async for deltas in stream:
                    losses.progressed()
                    if is_alone:
                        self._suspects.release()
                        is_alone = False
                    yield deltas
        finally:
            if is_alone:
                self._suspects.release()

    @staticmethod
    def _at_limit(request: GenerateRequest, emitted: EmittedTokens) -> tuple[GenerationDelta, ...]:
        """The end of choices that have all their tokens; only the word that they end was lost."""
        limit = request.sampling.max_tokens
        return tuple(
            GenerationDelta(index=index, finish_reason="length")
            for index in emitted.unfinished()
            if emitted.num_tokens(index) >= limit
        )
