"""All choices of one HTTP request, as the shard generates them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from services.core.generation import GenerateRequest
from services.gateway.choice import Choice, ChoiceUpdate
from services.gateway.resubmission import EmittedTokens, Resubmission, ResubmittingShards


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one HTTP request; the prompt counts once, whatever `n` is.

    A token that ended a choice (end of sequence, stop id) is not counted.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    restored_tokens: int


class PromptRun:
    """One prompt and its `n` choices. `on_resubmit` is told when its shard was lost."""

    def __init__(
        self,
        request: GenerateRequest,
        choices: Sequence[Choice],
        on_resubmit: Callable[[Resubmission], None],
    ) -> None:
        self.request = request
        self.choices = choices
        self._on_resubmit = on_resubmit

    async def updates(self, shards: ResubmittingShards) -> AsyncGenerator[list[ChoiceUpdate], None]:
        """Updates until every choice has finished; closing it aborts the shard's work.

        What the shard still sends for a choice that a stop string ended is left aside.
        """
        emitted = EmittedTokens(len(self.choices))
        async with aclosing(shards.generate(self.request, emitted, self._on_resubmit)) as stream:
            async for deltas in stream:
                batch: list[ChoiceUpdate] = []
                for delta in deltas:
                    choice = self.choices[delta.index]
                    if choice.finish_reason is None:
                        batch.append(choice.accept(delta))
                        if choice.finish_reason is not None:
                            emitted.finish(delta.index)
                if batch:
                    yield batch

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that no choice had to compute."""
        return min(choice.num_cached_tokens for choice in self.choices)

    @property
    def num_restored_tokens(self) -> int:
        return max(choice.num_restored_tokens for choice in self.choices)


class Generation:
    """The runs of all prompts, merged; choices are numbered prompt by prompt.

    `first_token_at` and `last_token_at` are readings of `time.perf_counter`, None before a token.
    `on_first_token` is called once, with the first token of any prompt.
    """

    def __init__(
        self,
        shards: ResubmittingShards,
        runs: Sequence[PromptRun],
        on_first_token: Callable[[], None],
    ) -> None:
        self._shards = shards
        self._on_first_token = on_first_token
        self.runs = runs
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None

    async def updates(self) -> AsyncGenerator[list[ChoiceUpdate], None]:
        """Updates in the order they come; those that came together stay together."""
        if len(self.runs) == 1:
            source = self.runs[0].updates(self._shards)
        else:
            source = _merge([run.updates(self._shards) for run in self.runs])
        async with aclosing(source):
            async for batch in source:
                self.last_token_at = time.perf_counter()
                if self.first_token_at is None:
                    self.first_token_at = self.last_token_at
                    self._on_first_token()
                yield batch

    @property
    def choices(self) -> list[Choice]:
        return [choice for run in self.runs for choice in run.choices]

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=sum(len(run.request.prompt_token_ids) for run in self.runs),
            completion_tokens=sum(choice.num_tokens for choice in self.choices),
            cached_tokens=sum(run.num_cached_tokens for run in self.runs),
            restored_tokens=sum(run.num_restored_tokens for run in self.runs),
        )


async def _merge(
    sources: Sequence[AsyncGenerator[list[ChoiceUpdate], None]],
) -> AsyncGenerator[list[ChoiceUpdate], None]:
    """Interleave `sources`. The first error ends all of them; so does closing."""
    # Unbounded, yet never more than the requests' max_tokens, as is what waits in the shard.
    queue: asyncio.Queue[list[ChoiceUpdate] | None] = asyncio.Queue()

    async def pump(source: AsyncGenerator[list[ChoiceUpdate], None]) -> None:
        async with aclosing(source):
            async for batch in source:
                queue.put_nowait(batch)

    async def pump_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for source in sources:
                    group.create_task(pump(source))
        finally:
            queue.put_nowait(None)

    pumps = asyncio.create_task(pump_all())
    try:
        is_over = False
        while not is_over:
            arrived = [await queue.get()]
            while not queue.empty():
                arrived.append(queue.get_nowait())
            is_over = arrived[-1] is None
            batch = [update for updates in arrived if updates for update in updates]
            if batch:
                yield batch
        await _finish(pumps)
    finally:
        pumps.cancel()
        await asyncio.wait({pumps})


async def _finish(pumps: asyncio.Task[None]) -> None:
    """Raise the first error of the pumps as it was, outside its group."""
    try:
        await pumps
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
