"""The process of a side, as the one that measures sees it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import cpu_seconds
from benchmarks.sides import SideSpec

READY_TIMEOUT_S = 900.0
JOB_TIMEOUT_S = 600.0
END_TIMEOUT_S = 60.0
ROOT = Path(__file__).resolve().parent.parent


class SideFailedError(Exception):
    """A side ended or fell silent; says which, and the end of its log."""


class SideProcess:
    """Started on construction, in a process group of its own.

    With `pauses` its whole group is stopped between jobs: some runtimes' idle threads go on
    spinning, which would be measured with the next side. The group stays in this session, so the
    kernel ends a stopped group whose parent has died.
    """

    def __init__(self, spec: SideSpec, log: Path) -> None:
        self.spec = spec
        self.pauses = False
        self.versions: dict[str, str] = {}
        self._log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                spec.command,
                cwd=ROOT,
                env=os.environ | spec.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                process_group=0,
            )

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        """Return when it can take jobs. Raises `SideFailedError`."""
        self.versions = self._read(READY_TIMEOUT_S).get("versions", {})

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Its result. Raises `SideFailedError`."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SideFailedError(f"{self.name} has ended\n{self._last_lines()}") from None
        result = self._read(JOB_TIMEOUT_S)
        if self.pauses:
            self._signal(signal.SIGSTOP)
        return result

    def cpu_s(self) -> float:
        """CPU seconds its running processes have used."""
        return cpu_seconds([self.pid])

    def close(self) -> None:
        """End it by the end of its input, and whatever is left of its group by force."""
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            return
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=END_TIMEOUT_S)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        if not readable:
            raise SideFailedError(
                f"{self.name} did not answer within {timeout_s:.0f} s\n{self._last_lines()}"
            )
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait(timeout=END_TIMEOUT_S)
            raise SideFailedError(f"{self.name} ended with status {status}\n{self._last_lines()}")
        return dict(json.loads(line))

    def _last_lines(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


@contextlib.contextmanager
def running_sides(specs: Sequence[SideSpec], logs: Path) -> Iterator[list[SideProcess]]:
    """All of them, loaded one after the other and idle; closed at the end."""
    with contextlib.ExitStack() as stack:
        sides = []
        for spec in specs:
            side = SideProcess(spec, logs / f"{spec.name}.log")
            stack.callback(side.close)
            side.wait_ready()
            sides.append(side)
        yield sides
