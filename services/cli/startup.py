"""Waiting for processes to come up, and whether there is memory for one more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import httpx
import psutil

from services.cli.child import Child
from services.core.errors import ExpertfleetError, UnavailableError

START_TIMEOUT_S = 1800.0
_MOST_DEATHS = 3
_PROCESS_BYTES = 300 << 20
"""What a process takes besides its weights."""


async def wait_until_up(
    what: str,
    condition: Callable[[], Awaitable[bool]],
    children: Sequence[Child],
    *,
    timeout_s: float = START_TIMEOUT_S,
) -> None:
    """Return once `condition` holds; while it raises because something is away, it does not.

    Raises `ExpertfleetError` when one of `children` gave up or dies again and again, with the end
    of its log, and after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    deaths_before = {child: child.num_restarts for child in children}
    while True:
        try:
            if await condition():
                return
        except (httpx.HTTPError, ExpertfleetError):
            pass
        for child in children:
            child.check()
            if child.num_restarts - deaths_before[child] > _MOST_DEATHS:
                raise UnavailableError(
                    f"{child.spec.name} dies again and again:\n{child.last_words()}\n"
                    f"(log: {child.spec.log_file})"
                )
        if time.monotonic() > deadline:
            logs = children[0].spec.log_file.parent if children else "none"
            raise UnavailableError(f"{what} not ready within {timeout_s:.0f} s; logs: {logs}")
        await asyncio.sleep(0.1)


def memory_available() -> int:
    """Bytes of this machine's memory that processes can still take."""
    return int(psutil.virtual_memory().available)


def resident_bytes(pid: int | None) -> int:
    """Memory of a process and all it has started, bytes; 0 when it has ended."""
    if pid is None:
        return 0
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(each.memory_info().rss for each in family)
    except psutil.NoSuchProcess:
        return 0


def fits_beside(wanted_bytes: int, available_bytes: int) -> bool:
    """Whether a process with `wanted_bytes` of its own can start beside all that run."""
    return wanted_bytes + wanted_bytes // 8 + _PROCESS_BYTES <= available_bytes
