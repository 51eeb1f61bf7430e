from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from services.cli.child import Child, ChildFailedError, ChildSpec
from services.core.errors import EXIT_BAD_INPUT
from tests.support.eventually import eventually

SLEEP = "import time; print('up', flush=True); time.sleep(60)"
IGNORE_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP


def _child(tmp_path: Path, code: str, events: list[str] | None = None) -> Child:
    command: Sequence[str] = [sys.executable, "-c", code]
    spec = ChildSpec(name="part", command=command, log_file=tmp_path / "part.log")
    return Child(spec, (events if events is not None else []).append)


async def _until_up(child: Child, times: int = 1) -> None:
    log = child.spec.log_file
    await eventually(lambda: log.exists() and log.read_text().count("up") >= times)


async def test_a_child_that_dies_is_started_again(tmp_path: Path) -> None:
    events: list[str] = []
    child = _child(tmp_path, SLEEP, events)
    await child.start()
    try:
        await _until_up(child)
        first = child.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await _until_up(child, times=2)
        assert child.pid != first
        assert child.num_restarts == 1
        assert "SIGKILL" in events[0]
    finally:
        await child.stop(1.0)


async def test_bad_input_is_not_tried_again_and_its_words_are_kept(tmp_path: Path) -> None:
    child = _child(tmp_path, f"import sys; print('no such model'); sys.exit({EXIT_BAD_INPUT})")
    await child.start()
    await eventually(lambda: child.failure is not None)
    with pytest.raises(ChildFailedError, match="no such model"):
        child.check()
    assert child.num_restarts == 0
    await child.stop(1.0)


async def test_stopping_ends_a_child_that_ignores_sigterm(tmp_path: Path) -> None:
    child = _child(tmp_path, IGNORE_SIGTERM)
    await child.start()
    await _until_up(child)
    pid = child.pid
    assert pid is not None
    async with asyncio.timeout(60):
        await child.stop(0.2)
    assert not psutil.pid_exists(pid)


async def test_stopping_ends_what_the_child_has_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; "
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print('up', p.pid, flush=True); p.wait()"
    )
    child = _child(tmp_path, code)
    await child.start()
    await _until_up(child)
    grandchild = int(child.spec.log_file.read_text().split()[1])
    await child.stop(0.2)
    await eventually(lambda: not psutil.pid_exists(grandchild))


async def test_stopping_during_the_back_off_starts_nothing(tmp_path: Path) -> None:
    events: list[str] = []
    child = _child(tmp_path, "raise SystemExit(3)", events)
    await child.start()
    await eventually(lambda: bool(events))
    await child.stop(1.0)
    restarts = child.num_restarts
    await asyncio.sleep(0.5)
    assert child.num_restarts == restarts


async def test_a_stopped_process_can_be_killed_and_is_started_again(tmp_path: Path) -> None:
    child = _child(tmp_path, SLEEP)
    await child.start()
    try:
        await _until_up(child)
        first = child.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        child.kill()
        await _until_up(child, times=2)
        states: list[str] = [child.state]
    finally:
        await child.stop(1.0)
    assert child.pid != first
    assert [*states, child.state] == ["running", "stopped"]


async def test_a_planned_restart_runs_the_new_command_and_counts_as_no_death(
    tmp_path: Path,
) -> None:
    child = _child(tmp_path, SLEEP)
    await child.start()
    try:
        await _until_up(child)
        first = child.pid
        changed = dataclasses.replace(
            child.spec, command=[sys.executable, "-c", "print('changed');" + SLEEP]
        )
        await child.restart(changed, 5.0)
        await _until_up(child, times=2)
        assert "changed" in child.spec.log_file.read_text()
        assert child.pid != first
        assert child.num_restarts == 0
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        await _until_up(child, times=3)
        assert child.num_restarts == 1
    finally:
        await child.stop(1.0)
