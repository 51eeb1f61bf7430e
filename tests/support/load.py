"""Steady load on a started product: streams of seeded conversations with answers known before.

Conversations repeat, so each has one right answer (greedy, reproducible): what the product gives
when nothing disturbs it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.cli.load.client import LoadClient, RequestRecord
from services.cli.load.lengths import Lengths
from services.cli.load.workload import Turn, WorkloadShape, draw_workload

TurnKey = tuple[int, int]
"""Number of the conversation, and of its turn."""
Answers = Mapping[TurnKey, tuple[int, ...]]
"""The token ids of every right answer."""

REQUEST_TIMEOUT_S = 180.0
_REFUSED_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """One conversation: several turns are a session, under a new id each time it is held."""

    number: int
    turns: Sequence[Turn]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One request that was sent; `num_refused` times the gateway answered 429 or 503 before."""

    key: TurnKey
    record: RequestRecord
    num_refused: int = 0


def draw_scripts(
    seed: int, *, vocab_size: int, num_single: int = 28, num_sessions: int = 6
) -> list[Script]:
    """Single requests of 4 to 300 prompt tokens, and sessions of two turns."""
    prompts = Lengths.parse("lognormal:48:1.0:300")
    singles = WorkloadShape(
        num_conversations=num_single,
        rate=None,
        prompt_tokens=prompts,
        output_tokens=Lengths.parse("24-96"),
        num_turns=1,
        think_s=0.0,
        vocab_size=vocab_size,
        seed=seed,
    )
    sessions = WorkloadShape(
        num_conversations=num_sessions,
        rate=None,
        prompt_tokens=prompts,
        output_tokens=Lengths.parse("24-64"),
        num_turns=2,
        think_s=0.0,
        vocab_size=vocab_size,
        seed=seed + 1,
    )
    drawn = draw_workload(singles) + draw_workload(sessions)
    return [Script(number=number, turns=each.turns) for number, each in enumerate(drawn)]


async def ask_all(
    url: str, scripts: Sequence[Script], *, num_streams: int
) -> dict[TurnKey, tuple[int, ...]]:
    """The answers of the product as it is now. Raises if one cannot be had."""
    answers: dict[TurnKey, tuple[int, ...]] = {}
    client = LoadClient(url, model=None, api_key=None, timeout_s=REQUEST_TIMEOUT_S)
    places = asyncio.Semaphore(num_streams)

    async def ask(script: Script) -> None:
        async with places:
            history: list[int] = []
            for number, turn in enumerate(script.turns):
                history += turn.token_ids
                record = await client.complete(history, turn.max_tokens)
                assert record.error is None, f"healthy, yet {script.number}: {record.error}"
                answers[script.number, number] = tuple(record.token_ids)
                history += record.token_ids

    try:
        await asyncio.gather(*map(ask, scripts))
    finally:
        await client.close()
    return answers


@dataclass(slots=True, kw_only=True)
class SteadyLoad:
    """`num_streams` clients at work, each with one conversation after another.

    With `retries_refused` an answer of 429 or 503 before the first token is tried again, as a
    client does that is told `Retry-After`; without it is a failure like any other. Session ids
    begin with `name`.
    """

    url: str
    scripts: Sequence[Script]
    num_streams: int
    seed: int
    retries_refused: bool = False
    name: str = "load"
    exchanges: list[Exchange] = field(default_factory=list)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _session_numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def run(self) -> None:
        """Until `stop`; then every request under way is seen through."""
        client = LoadClient(self.url, model=None, api_key=None, timeout_s=REQUEST_TIMEOUT_S)
        try:
            await asyncio.gather(
                *(self._stream(client, number) for number in range(self.num_streams))
            )
        finally:
            await client.close()

    def stop(self) -> None:
        self._stop.set()

    async def _stream(self, client: LoadClient, number: int) -> None:
        generator = random.Random(f"{self.seed}-{number}")
        while not self._stop.is_set():
            await self._converse(client, generator.choice(self.scripts))

    async def _converse(self, client: LoadClient, script: Script) -> None:
        session_id = None
        if len(script.turns) > 1:
            session_id = f"{self.name}-{self.seed}-{next(self._session_numbers)}"
        history: list[int] = []
        for number, turn in enumerate(script.turns):
            history += turn.token_ids
            exchange = await self._ask(client, (script.number, number), history, turn, session_id)
            self.exchanges.append(exchange)
            if exchange.record.error is not None or self._stop.is_set():
                return
            history += exchange.record.token_ids

    async def _ask(
        self,
        client: LoadClient,
        key: TurnKey,
        history: Sequence[int],
        turn: Turn,
        session_id: str | None,
    ) -> Exchange:
        num_refused = 0
        while True:
            record = await client.complete(
                history, turn.max_tokens, session_id=session_id, turn=key[1]
            )
            is_refused = record.error is not None and record.error.startswith(
                ("HTTP 429", "HTTP 503")
            )
            if not (self.retries_refused and is_refused):
                return Exchange(key=key, record=record, num_refused=num_refused)
            num_refused += 1
            await asyncio.sleep(_REFUSED_PAUSE_S)
