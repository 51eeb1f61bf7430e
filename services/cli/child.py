"""A supervised child process: started, watched, restarted with back-off, ended for certain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from services.core.errors import EXIT_BAD_INPUT, ExpertfleetError

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 10.0
STABLE_AFTER_S = 30.0
_DIES_WITH_PARENT = """\
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Run by the child itself before it becomes what was asked for. As `preexec_fn` it would need a
fork, and gRPC's threads do not outlive one: with calls in flight every third child died of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """What to run. `environment` is added to the launcher's own."""

    name: str
    command: Sequence[str]
    log_file: Path
    environment: Mapping[str, str] = field(default_factory=dict)


Spawn = Callable[[ChildSpec], Awaitable[asyncio.subprocess.Process]]
"""How a child's process comes to be; as `spawn_process` does."""


class ChildFailedError(ExpertfleetError):
    """A child refused its input (exit status 2) or could not be started."""


class Child:
    """Runs `spec` until stopped. A death is followed by a restart, save after bad input.

    `on_event` hears of starts and deaths in words. The child leads a process group of its own, gets
    SIGTERM when the launcher dies, and is ended together with what it started.
    """

    def __init__(
        self,
        spec: ChildSpec,
        on_event: Callable[[str], None] = log.warning,
        spawn: Spawn | None = None,
    ) -> None:
        self.spec = spec
        self._spawn = spawn or spawn_process
        self.num_restarts = 0
        self.failure: ChildFailedError | None = None
        self._on_event = on_event
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._process = await self._spawn(self.spec)
        self._watcher = asyncio.create_task(self._watch(), name=f"watch-{self.spec.name}")

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to end; it may still run."""
        return self._stopping

    @property
    def state(self) -> Literal["running", "starting again", "given up", "stopped"]:
        if self.failure is not None:
            return "given up"
        if self._process is not None and self._process.returncode is None:
            return "running"
        return "stopped" if self._stopping or self._process is None else "starting again"

    def check(self) -> None:
        """Raise what made the child give up for good, if anything did."""
        if self.failure is not None:
            raise self.failure

    def last_words(self, num_lines: int = 8) -> str:
        """The end of the child's log."""
        try:
            lines = self.spec.log_file.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-num_lines:])

    def kill(self) -> None:
        """End the whole group at once, as a crash would; it is started again."""
        if self._process is not None and self._process.returncode is None:
            _signal_group(self._process.pid, signal.SIGKILL)

    async def restart(
        self, spec: ChildSpec, timeout_s: float, *, number: signal.Signals = signal.SIGTERM
    ) -> None:
        """Stop, and start again as `spec` says; this counts as no death."""
        await self.stop(timeout_s, number=number)
        self.spec = spec
        self._stopping = False
        await self.start()

    async def stop(self, timeout_s: float, *, number: signal.Signals = signal.SIGTERM) -> None:
        """Signal `number`, then SIGKILL for the whole group after `timeout_s`."""
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            _signal(process.pid, number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await process.wait()
        if process is not None:
            await end_group(process)
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher

    async def _watch(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            assert self._process is not None
            started = time.monotonic()
            status = await self._process.wait()
            if self._stopping:
                return
            _signal_group(self._process.pid, signal.SIGKILL)
            if status == EXIT_BAD_INPUT:
                self.failure = ChildFailedError(
                    f"{self.spec.name} gave up:\n{self.last_words()}\n(log: {self.spec.log_file})"
                )
                return
            if time.monotonic() - started > STABLE_AFTER_S:
                backoff_s = FIRST_BACKOFF_S
            self._on_event(
                f"{self.spec.name} ended ({_reason(status)}); restart in {backoff_s:.1f} s"
            )
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
            self.num_restarts += 1
            self._process = await self._spawn(self.spec)


async def spawn_process(spec: ChildSpec, *, talks: bool = False) -> asyncio.subprocess.Process:
    """Its output goes to the log; with `talks` only its errors, and pipes lead to and from it. On
    Linux it gets SIGTERM when this process dies."""
    command = tuple(spec.command)
    if sys.platform == "linux":
        command = (sys.executable, "-IS", "-c", _DIES_WITH_PARENT, *command)
    with spec.log_file.open("ab") as log_file:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE if talks else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if talks else log_file,
            stderr=log_file,
            env=os.environ | spec.environment,
            start_new_session=True,
        )


async def end_group(process: asyncio.subprocess.Process) -> None:
    """End a child for certain, with all that it has started."""
    _signal_group(process.pid, signal.SIGKILL)
    if process.returncode is None:
        await process.wait()


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _reason(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
