"""What the autoscaler would do, without doing it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from services.autoscaler.actions import Action, Planned
from services.autoscaler.options import PolicyOptions
from services.autoscaler.policy import decide
from services.autoscaler.state import PolicyState
from services.autoscaler.window import LoadWindow
from services.core.errors import UnavailableError
from services.core.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """`at` is Unix seconds."""

    at: float
    planned: Planned


async def propose(
    registry: Registry, options: PolicyOptions, *, interval_s: float, watch_s: float | None
) -> AsyncIterator[Proposal]:
    """Proposals as they come up, for `watch_s` (None: for ever), each action once a minute.

    As nothing is done, later proposals are made for the fleet as it is, not as it would be. Raises
    `UnavailableError` if the store cannot be used from the start.
    """
    window, state = LoadWindow(), PolicyState()
    told: dict[Action, float] = {}
    started = time.monotonic()
    has_read = False
    while watch_s is None or time.monotonic() - started < watch_s:
        now = time.monotonic()
        try:
            window.add(await registry.snapshot(), now)
            has_read = True
        except UnavailableError:
            if not has_read:
                raise
        planned, state = decide(options, state, window.view(), now)
        for one in planned:
            if now - told.get(one.action, -60.0) >= 60.0:
                told[one.action] = now
                yield Proposal(at=time.time(), planned=one)
        await asyncio.sleep(interval_s)
