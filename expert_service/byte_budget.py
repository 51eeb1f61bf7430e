"""Backpressure: how many bytes of frames may be in hand before reading stops."""

from __future__ import annotations

import asyncio


class ByteBudget:
    """Counts bytes between `take` and `release`. Used from one event loop.

    A frame is always taken whole once there is any room, so the count may pass the limit by one
    frame of every waiting stream.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._in_hand_bytes = 0
        self._has_room = asyncio.Event()
        self._is_empty = asyncio.Event()
        self._has_room.set()
        self._is_empty.set()

    @property
    def in_hand_bytes(self) -> int:
        return self._in_hand_bytes

    def take(self, num_bytes: int) -> None:
        self._in_hand_bytes += num_bytes
        self._is_empty.clear()
        if self._in_hand_bytes >= self._limit_bytes:
            self._has_room.clear()

    def release(self, num_bytes: int) -> None:
        self._in_hand_bytes -= num_bytes
        if self._in_hand_bytes < self._limit_bytes:
            self._has_room.set()
        if not self._in_hand_bytes:
            self._is_empty.set()

    async def wait_for_room(self) -> None:
        while not self._has_room.is_set():
            await self._has_room.wait()

    async def wait_until_empty(self) -> None:
        await self._is_empty.wait()
