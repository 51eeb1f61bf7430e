"""Control commands for a process whose main thread carries them out, one after the other."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from router_service.loop_thread import LoopThread
from services.cli.control import ControlServer, Progress
from services.core.errors import ExpertfleetError

Command = Mapping[str, Any]


class CommandQueue:
    """Listens at `path` for `commands` from a thread of its own, while it is entered."""

    def __init__(self, path: Path, commands: Iterable[str]) -> None:
        self._thread = LoopThread("control")
        self._server = ControlServer(path, dict.fromkeys(commands, self._enqueue))
        self._waiting: queue.SimpleQueue[tuple[Command, Future[None]]] = queue.SimpleQueue()

    def __enter__(self) -> CommandQueue:
        self._thread.start()
        self._thread.run_blocking(self._server.start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.run_blocking(self._server.close())

    def carry_out(self, execute: Callable[[Command], None]) -> None:
        """Wait for commands and execute them on this thread, for ever.

        Whoever gave a command is told of its `ExpertfleetError`; any other exception, such as a
        signal handler's, ends this.
        """
        while True:
            command, done = self._waiting.get()
            try:
                execute(command)
            except ExpertfleetError as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    async def _enqueue(self, command: Command, _: Progress) -> Mapping[str, Any]:
        done: Future[None] = Future()
        self._waiting.put((command, done))
        await asyncio.wrap_future(done)
        return {}
