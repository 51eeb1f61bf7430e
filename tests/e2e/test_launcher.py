"""`expertfleet up` as a person uses it: start, Ctrl-C, mistakes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.product import DEMO_MODEL, Product
from tests.support.waiting import wait_until


def _up(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli", "up", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments", [("--workers", "2"), ("--no-ray",), ("--no-ray", "--no-workers")]
)
def test_ctrl_c_ends_everything_within_ten_seconds(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    product = Product(tmp_path / "state", *arguments).start()
    body = {"model": "demo", "prompt": "import os\n", "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{product.url}/v1/completions", json=body, timeout=60)
    assert answer.json()["choices"][0]["text"]
    family = product.family()
    ports = {
        connection.laddr.port
        for process in family
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert product.port in ports
    assert product.stop(signal.SIGINT) <= 10
    assert [process for process in family if _is_alive(process)] == []
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    left = {path.name for path in (tmp_path / "state").iterdir()}
    assert left <= {"logs", "traces", "up.out"}


def test_nothing_outlives_a_launcher_that_was_killed_outright(tmp_path: Path) -> None:
    product = Product(tmp_path / "state", "--workers", "2").start()
    family = product.family()
    assert product.process is not None
    product.process.kill()
    product.process.wait()
    wait_until(lambda: not any(map(_is_alive, family)), timeout_s=20, what=str(family))


def test_a_second_instance_is_refused_and_told_about_the_first(tmp_path: Path) -> None:
    first = Product(tmp_path / "state", "--no-ray", "--no-workers").start()
    try:
        second = _up("--model", str(DEMO_MODEL), "--state-dir", str(tmp_path / "state"))
        assert second.returncode == 2
        assert str(first.process.pid if first.process else "") in second.stderr
        assert "--state-dir" in second.stderr
        assert first.is_ready()
    finally:
        first.stop()


def test_a_busy_port_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = _up("--model", str(DEMO_MODEL), "--port", port, "--state-dir", str(tmp_path))
    assert done.returncode == 2
    assert port in done.stderr
    assert "--port" in done.stderr


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    done = _up("--model", str(tmp_path / "nothing"), "--state-dir", str(tmp_path / "state"))
    assert done.returncode == 2
    assert "nothing" in done.stderr


def test_a_truncated_shard_is_refused_by_name(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in DEMO_MODEL.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    done = _up("--model", str(model), "--state-dir", str(tmp_path / "state"), "--no-ray")
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr


def test_a_bad_setting_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", "up"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"EXPERTFLEET_BLOCK_SIZE": "zero"},
    )
    assert done.returncode == 2
    assert "EXPERTFLEET_BLOCK_SIZE" in done.stderr


def _is_alive(process: psutil.Process) -> bool:
    """A zombie has ended; the system's init may take its time to reap an orphan."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
