"""Work that ends when the client goes away, or when it takes too long."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from services.gateway.errors import ClientDisconnectedError, RequestTimeoutError

T = TypeVar("T")


async def run_until_disconnect(
    receive: Receive, work: Coroutine[Any, Any, T], *, timeout_s: float
) -> T:
    """The result of `work`. To be called when the request's body was read.

    On a disconnect, and after `timeout_s`, `work` is cancelled and waited for, and
    `ClientDisconnectedError` or `RequestTimeoutError` is raised.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        done, _ = await asyncio.wait(
            {task, watcher}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if task in done:
            return task.result()
        if watcher in done:
            raise ClientDisconnectedError
        raise RequestTimeoutError(f"The request took longer than {timeout_s:g} s and was ended")
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.wait({task, watcher})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
