from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from services.cli import spare_process
from services.cli.child import Child, ChildSpec
from services.cli.spare_process import WORKER_COMMAND, SpareProcess
from services.core.errors import EXIT_BAD_INPUT
from tests.support.eventually import eventually

NO_MODEL = [*WORKER_COMMAND, "--model", "/nowhere", "--experts", "0", "--worker-id", "expert-7"]


@pytest.fixture
async def spare(tmp_path: Path) -> AsyncIterator[SpareProcess]:
    spare = SpareProcess({}, tmp_path / "spare.log", renew_after_s=0.0)
    yield spare
    await spare.stop()


def _spec(tmp_path: Path, command: list[str] = NO_MODEL, **environment: str) -> ChildSpec:
    return ChildSpec(
        name="expert-7",
        command=command,
        log_file=tmp_path / "expert-7.log",
        environment=environment,
    )


async def _ready(spare: SpareProcess) -> int:
    await eventually(lambda: spare.pid is not None, timeout_s=60)
    assert spare.pid is not None
    return spare.pid


async def test_the_next_worker_is_what_was_the_spare_and_there_is_another(
    spare: SpareProcess, tmp_path: Path
) -> None:
    spare.start()
    first = await _ready(spare)
    process = await spare.spawn(_spec(tmp_path))
    assert process.pid == first
    # It has the arguments, and says in its own log what is wrong with them.
    assert await process.wait() == EXIT_BAD_INPUT
    assert "/nowhere" in (tmp_path / "expert-7.log").read_text()
    assert await _ready(spare) != first


async def test_it_has_the_environment_that_the_worker_was_to_have(
    spare: SpareProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare.start()
    await _ready(spare)
    monkeypatch.setenv("EXPERTFLEET_SEEN", "by all")
    monkeypatch.delenv("HOME", raising=False)
    process = await spare.spawn(_spec(tmp_path, EXPERTFLEET_DTYPE="nothing"))
    assert await process.wait() == EXIT_BAD_INPUT
    assert "EXPERTFLEET_DTYPE" in (tmp_path / "expert-7.log").read_text()


async def test_a_child_that_is_no_worker_is_started_as_ever(
    spare: SpareProcess, tmp_path: Path
) -> None:
    spare.start()
    waiting = await _ready(spare)
    process = await spare.spawn(_spec(tmp_path, [sys.executable, "-c", "print('up')"]))
    assert await process.wait() == 0
    assert (tmp_path / "expert-7.log").read_text() == "up\n"
    assert spare.pid == waiting


@pytest.mark.parametrize("is_started", [False, True])
async def test_without_a_spare_a_worker_is_started_as_ever(
    tmp_path: Path, is_started: bool
) -> None:
    spare = SpareProcess({}, tmp_path / "spare.log", renew_after_s=600.0)
    if is_started:
        spare.start()
    process = await spare.spawn(_spec(tmp_path))
    assert await process.wait() == EXIT_BAD_INPUT
    await spare.stop()


async def test_a_spare_that_was_killed_is_not_used(spare: SpareProcess, tmp_path: Path) -> None:
    spare.start()
    dead = await _ready(spare)
    os.kill(dead, signal.SIGKILL)
    await eventually(lambda: not psutil.pid_exists(dead))
    process = await spare.spawn(_spec(tmp_path))
    assert process.pid != dead
    assert await process.wait() == EXIT_BAD_INPUT
    assert await _ready(spare) != dead


async def test_a_spare_that_cannot_import_is_none(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('broken')")
    spare = SpareProcess({"PYTHONPATH": str(tmp_path)}, tmp_path / "spare.log", renew_after_s=0.0)
    spare.start()
    log = tmp_path / "spare.log"
    await eventually(lambda: log.exists() and "broken" in log.read_text(), timeout_s=60)
    await eventually(lambda: spare._process is None, timeout_s=60)
    assert spare.pid is None
    await spare.stop()


async def test_a_supervised_worker_that_dies_comes_back_from_the_spare(
    spare: SpareProcess, tmp_path: Path
) -> None:
    spare.start()
    await _ready(spare)
    code = "import time; print('up', flush=True); time.sleep(60)"
    child = Child(_spec(tmp_path, [sys.executable, "-c", code]), lambda _: None, spare.spawn)
    await child.start()
    assert child.pid is not None
    waiting = await _ready(spare)
    child.spec = _spec(tmp_path)
    os.kill(child.pid, signal.SIGKILL)
    await eventually(lambda: child.failure is not None, timeout_s=60)
    assert child.pid == waiting
    await child.stop(1.0)


async def test_a_renewed_spare_is_another_process(spare: SpareProcess) -> None:
    await spare.renew()
    assert spare.pid is None
    spare.start()
    first = await _ready(spare)
    await spare.renew()
    assert not psutil.pid_exists(first)
    assert await _ready(spare) != first


async def test_where_memory_is_short_there_is_none(
    spare: SpareProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spare_process, "memory_available", lambda: 1 << 30)
    spare.start()
    await asyncio.sleep(0.3)
    assert spare.status() == []


async def test_it_ends_with_whoever_started_it(spare: SpareProcess) -> None:
    spare.start()
    pid = await _ready(spare)
    assert spare.status()[0]["pid"] == pid
    await spare.stop()
    assert not psutil.pid_exists(pid)
