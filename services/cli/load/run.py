"""Runs a workload against a gateway."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from services.cli.load.client import LoadClient, RequestRecord
from services.cli.load.workload import Conversation


async def run_workload(
    client: LoadClient,
    conversations: Sequence[Conversation],
    *,
    max_concurrency: int | None,
    on_done: Callable[[RequestRecord], None] = lambda _: None,
) -> list[RequestRecord]:
    """All conversations' requests, in the order they ended.

    `max_concurrency` bounds the conversations under way. One that comes due while there is no
    place waits, and that wait counts in its TTFT, as it would for a user; without a bound the
    arrivals do not depend on the answers (an open loop).
    """
    started_at = time.perf_counter()
    places = asyncio.Semaphore(max_concurrency or len(conversations) or 1)
    records: list[RequestRecord] = []

    async def converse(conversation: Conversation) -> None:
        due_at = None
        if conversation.at_s is not None:
            due_at = started_at + conversation.at_s
            await asyncio.sleep(max(0.0, due_at - time.perf_counter()))
        async with places:
            history: list[int] = []
            for number, turn in enumerate(conversation.turns):
                history += turn.token_ids
                record = await client.complete(
                    history,
                    turn.max_tokens,
                    session_id=conversation.session_id,
                    turn=number,
                )
                if number == 0 and due_at is not None:
                    record.started_at = due_at
                records.append(record)
                on_done(record)
                if record.error is not None:
                    return
                history += record.token_ids
                if number + 1 < len(conversation.turns):
                    await asyncio.sleep(conversation.think_s)

    async with asyncio.TaskGroup() as group:
        for conversation in conversations:
            group.create_task(converse(conversation))
    return records
