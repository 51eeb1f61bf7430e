"""Wait for what other threads, processes or clocks bring about."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable


async def eventually(
    condition: Callable[[], bool | Awaitable[bool]], *, timeout_s: float = 60.0
) -> None:
    """Return once `condition` holds; raise `TimeoutError` if it does not within `timeout_s`.

    The time only bounds a failure: give one only where it says something of what is tested.
    """
    async with asyncio.timeout(timeout_s):
        while True:
            holds = condition()
            if await holds if inspect.isawaitable(holds) else holds:
                return
            await asyncio.sleep(0.01)
