"""Requests that an engine gets together, whatever the machine is busy with."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from router_service.engine.engine import Engine

T = TypeVar("T")


async def all_at_once(engine: Engine, asking: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What each of them returns, each of which asks the engine.

    The engine has all requests, in their order, before it plans a step with any, so that its
    steps and evictions are the same in every run.
    """
    may_go_on = threading.Event()
    engine._thread.call_soon(may_go_on.wait)
    try:
        answers = asyncio.gather(*asking)
        await asyncio.sleep(0)  # their first steps, in which they submit
    finally:
        may_go_on.set()
    return list(await answers)
