"""What `expertfleet plan --calibrate` measures, with tiny models and short runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from services.cli.calibration import dispatch, engine, kernels, timing
from services.cli.calibration.fit import fit_calibration
from services.cli.calibration.random_weights import random_config, write_checkpoint
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.planning.calibration import read_calibration

SMALL, LARGE = (64, 64), (128, 128)


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_random_checkpoint_has_every_tensor_of_its_config(tmp_path: Path) -> None:
    config = random_config(*SMALL, num_layers=2)
    write_checkpoint(tmp_path / "random", config)
    checkpoint = Checkpoint.open(str(tmp_path / "random"))
    slots = [(layer, expert) for layer in range(2) for expert in range(8)]
    checkpoint.require(slots=slots, non_expert=True)
    assert checkpoint.config.hidden_size == config.hidden_size
    assert checkpoint.config.num_key_value_heads == config.num_key_value_heads


def test_the_parts_measure_enough_for_a_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "MOST_SECONDS_PER_FIGURE", 0.02)
    monkeypatch.setattr(kernels, "time_s", lambda work, **_: timing.time_s(work, seconds=0.01))
    monkeypatch.setattr(kernels, "WIDTHS", (SMALL, LARGE))
    monkeypatch.setattr(kernels, "HEAD_SHAPES", ((64, 64), (256, 64)))
    monkeypatch.setattr(kernels, "EXPERT_ROWS", (1, 4))
    monkeypatch.setattr(kernels, "ATTENTION_ROWS", (1, 4))
    monkeypatch.setattr(kernels, "CACHE_BYTES", 1 << 18)
    monkeypatch.setattr(kernels, "NUM_DECODER_LAYERS", 2)
    monkeypatch.setattr(dispatch, "WIDTH", SMALL)
    monkeypatch.setattr(dispatch, "NUM_WORKERS", (2,))
    monkeypatch.setattr(dispatch, "NUM_TOKENS", (1, 4))
    monkeypatch.setattr(dispatch, "SECONDS_PER_FIGURE", 0.05)
    monkeypatch.setattr(engine, "NUM_STEPS", 16)
    monkeypatch.setattr(engine, "NUM_SEQUENCES", (1, 2))

    # With one thread, a busy machine stalls no parallel regions.
    measured = {"num_cores": 1} | kernels.measure_kernels(1)
    measured |= dispatch.measure_dispatch(1, tmp_path)
    measured |= engine.measure_engine(1, tmp_path)

    assert {call["num_tokens"] for call in measured["dispatch"]} == {1, 4}
    assert all(call["seconds"] > 0 for call in measured["dispatch"])
    assert all(seconds > 0 for seconds in (*measured["engine_s"], *measured["local_s"]))
    calibration = fit_calibration(measured)
    assert set(calibration.experts) == {1}
    assert calibration.costs.step_s + calibration.costs.sequence_s > 0
    path = tmp_path / "calibration.json"
    path.write_text(calibration.to_json())
    assert read_calibration(path) == calibration
