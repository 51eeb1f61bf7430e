from __future__ import annotations

import asyncio

from router_service.engine.deferred_emission import DeferredEmission


class _Steps:
    """Runs steps and notes what happened in which order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.emission = DeferredEmission(lambda: self.events.append("emit"))

    async def step(self, number: int, *, num_waits: int) -> None:
        for _ in range(2):
            self.emission.dispatching()
        asyncio.get_running_loop().call_soon(self.events.append, f"sent {number}")
        for _ in range(num_waits):
            await asyncio.sleep(0)
        self.events.append(f"end {number}")
        self.emission.end_step()
        await asyncio.sleep(0)


async def test_tokens_go_out_once_the_next_step_s_frames_are_sent() -> None:
    steps = _Steps()
    for number in range(3):
        await steps.step(number, num_waits=5)
    expected = ["sent 0", "emit", "end 0", "sent 1", "emit", "end 1", "sent 2", "emit", "end 2"]
    assert steps.events == expected


async def test_with_experts_that_never_wait_they_go_out_at_the_end_of_their_step() -> None:
    steps = _Steps()
    for number in range(2):
        await steps.step(number, num_waits=0)
    assert steps.events == ["end 0", "emit", "sent 0", "end 1", "emit", "sent 1"]


async def test_a_step_that_does_not_wait_after_one_that_did_emits_for_both() -> None:
    steps = _Steps()
    await steps.step(0, num_waits=5)
    await steps.step(1, num_waits=0)
    assert steps.events[-3:] == ["end 1", "emit", "sent 1"]
