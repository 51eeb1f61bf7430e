from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from services.cli.main import app
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.errors import ConfigurationError
from services.core.settings import load_settings
from tests.support.checkpoints import make_checkpoint

RUNNER = CliRunner()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", dtype=torch.bfloat16)


def test_a_quantized_copy_is_written(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    arguments = ["quantize", str(model), str(out), "--expert-weights", "int4"]
    done = RUNNER.invoke(app, [*arguments, "--shard-weights", "int8", "--no-search"])
    assert done.exit_code == 0, done.output
    checkpoint = Checkpoint.open(str(out))
    assert checkpoint.quantized_format("lm_head.weight") == "int8"
    w1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert checkpoint.quantized_format(w1) == "int4"


def test_an_unknown_format_is_refused(model: Path, tmp_path: Path) -> None:
    done = RUNNER.invoke(
        app, ["quantize", str(model), str(tmp_path / "copy"), "--expert-weights", "int5"]
    )
    assert isinstance(done.exception, ConfigurationError)
    assert "int5" in done.exception.message
    assert not (tmp_path / "copy").exists()


def test_formats_to_hold_weights_in_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().expert_weights == load_settings().shard_weights == "auto"
    monkeypatch.setenv("EXPERTFLEET_EXPERT_WEIGHTS", "int4")
    assert (
        load_settings(shard_weights="int8").as_environment()
        | {
            "EXPERTFLEET_EXPERT_WEIGHTS": "int4",
            "EXPERTFLEET_SHARD_WEIGHTS": "int8",
        }
        == load_settings(shard_weights="int8").as_environment()
    )
    with pytest.raises(ConfigurationError, match="EXPERTFLEET_EXPERT_WEIGHTS"):
        load_settings(expert_weights="fp8")
