"""How tokens get from the engine's thread to the event loops of its callers.

The engine appends to a stream's buffer and, once per step, wakes each caller's loop with a single
`call_soon_threadsafe`, however many streams live there. What piles up while a caller is busy is
handed over together, one delta per completion.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from services.core.generation import GenerationDelta, TokenLogprob


class OutputStream:
    """The deltas of one request. `push` and `close` are the engine's, `next` is the caller's.

    Create it on the caller's running loop. The buffer is a deque: appends and pops are atomic, so
    the two threads need no lock.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.is_closed = False
        self._pending: deque[GenerationDelta] = deque()
        self._error: Exception | None = None
        self._wakeup = asyncio.Event()

    def push(self, delta: GenerationDelta) -> None:
        self._pending.append(delta)

    def close(self, error: Exception | None = None) -> None:
        """No more deltas come; `next` raises `error` once the buffer is empty."""
        self._error = error
        self.is_closed = True

    def wake(self) -> None:
        """Must run on the caller's loop, after `push` or `close`."""
        self._wakeup.set()

    async def next(self) -> tuple[GenerationDelta, ...]:
        """All that has come, merged per completion; empty when the stream has ended well."""
        while True:
            self._wakeup.clear()
            closed = self.is_closed
            deltas = [self._pending.popleft() for _ in range(len(self._pending))]
            if deltas:
                return _merge(deltas)
            if closed:
                if self._error is not None:
                    raise self._error
                return ()
            await self._wakeup.wait()


class OutputHub:
    """Collects the streams a step wrote to, and wakes their loops. Engine's thread only."""

    def __init__(self) -> None:
        self._touched: dict[asyncio.AbstractEventLoop, dict[OutputStream, None]] = {}

    def push(self, stream: OutputStream, delta: GenerationDelta) -> None:
        stream.push(delta)
        self._touched.setdefault(stream.loop, {})[stream] = None

    def close(self, stream: OutputStream, error: Exception | None = None) -> None:
        stream.close(error)
        self._touched.setdefault(stream.loop, {})[stream] = None

    def flush(self) -> list[OutputStream]:
        """Wake every loop that got something. Returns the streams whose loop is gone."""
        orphans: list[OutputStream] = []
        for loop, streams in self._touched.items():
            try:
                loop.call_soon_threadsafe(_wake_all, tuple(streams))
            except RuntimeError:  # the loop was closed under its callers
                orphans.extend(streams)
        self._touched.clear()
        return orphans


def _wake_all(streams: Iterable[OutputStream]) -> None:
    for stream in streams:
        stream.wake()


def _merge(deltas: list[GenerationDelta]) -> tuple[GenerationDelta, ...]:
    if len(deltas) == 1:
        return (deltas[0],)
    by_index: dict[int, list[GenerationDelta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    return tuple(_merge_one(group) for group in by_index.values())


def _merge_one(group: list[GenerationDelta]) -> GenerationDelta:
    last = group[-1]
    if len(group) == 1:
        return last
    logprobs: tuple[TokenLogprob, ...] | None = None
    if any(delta.logprobs is not None for delta in group):
        logprobs = tuple(item for delta in group for item in delta.logprobs or ())
    return GenerationDelta(
        index=last.index,
        token_ids=tuple(token for delta in group for token in delta.token_ids),
        logprobs=logprobs,
        finish_reason=last.finish_reason,
        stop_token_id=last.stop_token_id,
        num_cached_tokens=last.num_cached_tokens,
        num_restored_tokens=last.num_restored_tokens,
        expert_choices=b"".join(delta.expert_choices for delta in group),
    )
