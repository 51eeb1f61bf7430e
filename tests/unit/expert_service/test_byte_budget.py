from __future__ import annotations

import asyncio

from expert_service.byte_budget import ByteBudget
from tests.support.eventually import eventually


async def test_there_is_room_until_the_limit_is_reached() -> None:
    budget = ByteBudget(100)
    budget.take(99)
    await asyncio.wait_for(budget.wait_for_room(), 60)
    budget.take(500)
    waiting = asyncio.create_task(budget.wait_for_room())
    await asyncio.sleep(0)
    assert not waiting.done()
    budget.release(500)
    await asyncio.wait_for(waiting, 60)
    assert budget.in_hand_bytes == 99


async def test_it_is_empty_when_everything_was_released() -> None:
    budget = ByteBudget(10)
    await asyncio.wait_for(budget.wait_until_empty(), 60)
    budget.take(3)
    budget.take(4)
    waiting = asyncio.create_task(budget.wait_until_empty())
    budget.release(3)
    await asyncio.sleep(0)
    assert not waiting.done()
    budget.release(4)
    await eventually(waiting.done)
