"""`expertfleet up` as a person uses it: start, Ctrl-C, mistakes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.product import DEMO_MODEL, Product


def _up(*arguments: str, timeout_s: float = 200) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli", "up", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.mark.parametrize("arguments", [("--workers", "2"), ("--no-workers",)])
def test_without_ray_ctrl_c_ends_everything_within_ten_seconds(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """With Ray, other files' products show it at their end."""
    product = Product(tmp_path / "state", "--no-ray", *arguments).start()
    body = {"model": "demo", "prompt": "import os\n", "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{product.url}/v1/completions", json=body, timeout=120)
    assert answer.json()["choices"][0]["text"]
    product.check_ctrl_c()


def test_a_second_instance_is_refused_and_told_about_the_first(product: Product) -> None:
    second = _up("--model", str(DEMO_MODEL), "--state-dir", str(product.state_dir))
    assert second.returncode == 2
    assert product.process is not None
    assert str(product.process.pid) in second.stderr
    assert "--state-dir" in second.stderr
    assert product.is_ready()


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
