"""`expertfleet restart` on a started product under load, and workers that hang.

That a restart with the same weights changes no answer is the fault lab's to show
(`python -m tests.faults rolling-restart`).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.core.kernels.library import native_library
from tests.support.product import DEMO_MODEL, Product, is_alive
from tests.support.waiting import wait_until

NUM_CLIENTS = 4
PROMPTS = [f"class Restart{number}:\n    def close(self):\n" for number in range(NUM_CLIENTS)]


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    numerics = ["--reproducible"] if native_library() else ["--dtype", "float32"]
    started = Product(
        tmp_path_factory.mktemp("restart") / "state",
        *("--workers", "1", "--replicas", "2", *numerics),
        environment={"EXPERTFLEET_HANG_TIMEOUT_S": "4"},
    ).start()
    try:
        yield started
    finally:
        started.stop()


def test_replicas_multiply_the_workers(restarted: Product) -> None:
    held = [(w["state"], len(w["slots"])) for w in restarted.experts()["workers"]]
    assert len(held) == 2
    assert len(set(held)) == 1


@pytest.mark.timeout(600)
def test_another_models_weights_take_over_under_load_and_never_mix(
    restarted: Product, tmp_path: Path
) -> None:
    other = _other_weights(tmp_path / "other")
    before = [_ask(restarted, prompt) for prompt in PROMPTS]
    pids_before = _pids(restarted, "workers") | _pids(restarted, "shards")
    with _load(restarted) as answers:
        assert "done" in _restart(restarted, "all", "--model", str(other))
    assert not pids_before & (_pids(restarted, "workers") | _pids(restarted, "shards"))
    after = [_ask(restarted, prompt) for prompt in PROMPTS]
    assert all(old != new for old, new in zip(before, after, strict=True))
    for of_client, old, new in zip(answers, before, after, strict=True):
        assert set(of_client) <= {old, new}
    assert len(_pids(restarted, "workers")) == 2


def test_a_model_of_another_shape_is_refused_and_nothing_changes(
    restarted: Product, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(DEMO_MODEL, other)
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(
        config.replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 1')
    )
    assert (other / "config.json").read_text() != config
    before = _pids(restarted, "workers")
    with pytest.raises(AssertionError, match=r"config\.json"):
        _restart(restarted, "all", "--model", str(other))
    assert _pids(restarted, "workers") == before


def test_a_worker_that_hangs_is_replaced_by_the_spare_process(restarted: Product) -> None:
    wait_until(lambda: "spare" in _command(restarted, "status"), what="a spare process")
    (spare,) = (
        each.pid
        for each in restarted.family()
        if "expert_service.spare" in each.cmdline() and not each.name().startswith("expert-")
    )
    victim = psutil.Process(min(_pids(restarted, "workers")))
    victim.send_signal(signal.SIGSTOP)
    wait_until(lambda: not victim.is_running(), what="the hung worker ended")
    wait_until(lambda: len(_pids(restarted, "workers")) == 2, what="its successor")
    assert spare in _pids(restarted, "workers")
    assert psutil.Process(spare).name().startswith("expert-")


def test_the_status_lists_every_process(restarted: Product) -> None:
    shown = _command(restarted, "status")
    assert all(name in shown for name in ("store", "expert-", "gateway and shards", "running"))


def test_nothing_outlives_a_launcher_that_was_killed_outright(restarted: Product) -> None:
    """Workers and Ray; the last test of this file."""
    family = restarted.family()
    assert len(family) > 4
    assert restarted.process is not None
    restarted.process.kill()
    restarted.process.wait()
    wait_until(lambda: not any(map(is_alive, family)), what=str(family))


@contextlib.contextmanager
def _load(product: Product) -> Iterator[list[list[str]]]:
    """Clients that ask one after the other, each its own prompt; raises what failed for any.

    Half of them take a new connection for each request, half keep theirs.
    """
    over = threading.Event()
    answers: list[list[str]] = [[] for _ in PROMPTS]

    def client(number: int) -> None:
        with httpx.Client(timeout=120) as kept:
            while not over.is_set():
                answers[number].append(_ask(product, PROMPTS[number], kept if number % 2 else None))

    with concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(NUM_CLIENTS)]
        try:
            yield answers
        finally:
            over.set()
        for each in clients:
            each.result()


def _ask(product: Product, prompt: str, client: httpx.Client | None = None) -> str:
    body = {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": 48,
        "temperature": 0,
        "ignore_eos": True,
    }
    post = client.post if client is not None else httpx.post
    response = post(f"{product.url}/v1/completions", json=body, timeout=120)
    return str(response.raise_for_status().json()["choices"][0]["text"])


def _restart(product: Product, *arguments: str) -> str:
    return _command(product, "restart", *arguments)


def _command(product: Product, *arguments: str) -> str:
    command = [sys.executable, "-m", "services.cli", *arguments]
    done = subprocess.run(
        [*command, "--state-dir", str(product.state_dir)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _pids(product: Product, what: str) -> set[int]:
    return {
        each["pid"] for each in product.experts()[what] if each.get("state", "ready") == "ready"
    }


def _other_weights(folder: Path) -> Path:
    """The demo model with other experts, same shape and tokeniser."""
    shutil.copytree(DEMO_MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if ".w2." in name:
            tensors[name] = torch.flip(tensor, (0,)).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
