"""The GPU benchmark at its toy size, run as it is run on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_timing import Ceilings, Deadline

ROOT = Path(__file__).parents[2]


def test_the_toy_run_measures_every_side_and_writes_its_page(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--toy", "--out", str(page)],
        cwd=ROOT,
        check=True,
        timeout=110,
        stdout=subprocess.DEVNULL,
    )
    figures = json.loads(page.with_suffix(".json").read_text())
    assert figures["skipped"] == []
    (model,) = figures["models"]
    sides = model["sides"]
    assert sides[:3] == ["in process", "in process, CUDA kernels", "over gRPC"]
    assert sides[3].startswith("transformers")
    for side in sides[1:]:
        assert model["agreement"][side]["relative_error"] < 0.02
    assert [(work["kind"], work["size"]) for work in model["workloads"]] == [
        ("decode", 1),
        ("decode", 4),
        ("prefill", 24),
    ]
    for work in model["workloads"]:
        assert work["active_experts"] > 0
        assert all(work["sides"][side]["ms"] > 0 for side in sides)
        assert work["over_grpc_ms"]["wire"] > 0
    (kernels,) = figures["kernels"]
    assert not [row for row in kernels["experts"] + kernels["layers"] if "failed" in row]
    text = page.read_text()
    assert "a CPU (no figure of a GPU)" in text
    assert "| decode 4 sequences |" in text


def test_without_a_gpu_it_says_so() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--device", "cuda:7"],
        cwd=ROOT,
        check=False,
        timeout=110,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert ran.returncode == 1
    assert "torch sees no GPU here" in ran.stderr


def test_what_does_not_fit_before_the_deadline_is_named() -> None:
    deadline = Deadline(0.0)
    assert not deadline.allows("decode 8", needs_s=1.0)
    assert deadline.skipped == ["decode 8: out of time"]


def test_a_floor_is_set_by_what_takes_longer() -> None:
    ceilings = Ceilings(read_bytes_per_s=100.0, copy_bytes_per_s=50.0, matmul_flops=1000.0)
    assert ceilings.floor_s(200.0, 1000.0) == 2.0
    assert ceilings.floor_s(50.0, 3000.0) == 3.0
