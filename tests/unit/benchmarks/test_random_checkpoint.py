from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import random_checkpoint
from benchmarks.random_checkpoint import SHAPES, RandomShape, write_random_checkpoint
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.errors import CheckpointError
from tests.support.checkpoints import load_oracle, make_checkpoint

TINY = RandomShape(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_transformers_and_expertfleet_both_load_what_is_written(tmp_path: Path) -> None:
    num_bytes = write_random_checkpoint(tmp_path, TINY, shard_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    checkpoint = Checkpoint.open(str(tmp_path))
    slots = [(layer, expert) for layer in range(2) for expert in range(8)]
    checkpoint.require(slots=slots, non_expert=True)
    tensors = load_all(tmp_path)
    assert sum(tensor.nbytes for tensor in tensors.values()) == num_bytes
    expected = tensors["model.layers.1.block_sparse_moe.experts.7.w2.weight"]
    assert torch.equal(checkpoint.expert(1, 7).w2, expected)
    logits = load_oracle(tmp_path, torch.float32)(torch.randint(256, (1, 50))).logits
    assert 0.3 < logits.std() < 3.0


def test_no_file_is_larger_than_asked_save_for_one_tensor_and_a_header(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, TINY, shard_bytes=100_000)
    assert all(file.stat().st_size < 110_000 for file in tmp_path.glob("*.safetensors"))


def test_weights_depend_on_the_seed_and_not_on_the_shards(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "a", TINY, seed=1)
    write_random_checkpoint(tmp_path / "b", TINY, seed=1, shard_bytes=50_000)
    write_random_checkpoint(tmp_path / "c", TINY, seed=2)
    a, b, c = (load_all(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a if a[name].dim() == 2)
    matrices = [tensor for tensor in a.values() if tensor.dim() == 2]
    assert len({tuple(tensor.flatten()[:8].tolist()) for tensor in matrices}) == len(matrices)


def test_a_tensor_of_several_parts_has_the_stated_variance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_checkpoint, "READ_BYTES", 4 * 1000)
    write_random_checkpoint(tmp_path, TINY)
    weight = load_all(tmp_path)["model.layers.0.self_attn.q_proj.weight"].float()
    assert weight.std().item() == pytest.approx(1 / math.sqrt(64), rel=0.1)
    assert abs(weight.mean().item()) < 0.02
    assert not torch.equal(weight.flatten()[:1000], weight.flatten()[1000:2000])


def test_the_named_shapes_are_those_of_the_targets() -> None:
    assert set(SHAPES) == {"bench-s", "bench-xs", "wide-7b", "wide-22b"}
    wide = SHAPES["wide-22b"]
    assert 3 * wide.hidden_size * wide.intermediate_size * 56 * 2 == pytest.approx(33.8e9, rel=1e-3)


def test_the_command_writes_the_layers_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "bench-xs", replace(TINY, num_hidden_layers=1))
    assert random_checkpoint.main(["bench-xs", str(tmp_path), "--layers", "3"]) == 0
    assert Checkpoint.open(str(tmp_path)).config.num_hidden_layers == 3
    assert "bench-xs" in capsys.readouterr().out


def test_a_named_checkpoint_that_is_there_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "bench-xs", TINY)

    def write(**options: int) -> int:
        folder = random_checkpoint.write_named_checkpoint("bench-xs", tmp_path, **options)
        return next(folder.glob("*.safetensors")).stat().st_ino

    first = write()
    (tmp_path / "kept").hardlink_to(next(tmp_path.glob("*.safetensors")))
    assert write() == first
    assert write(seed=1) != first
    assert write(seed=1, num_layers=1) != first
    assert Checkpoint.open(str(tmp_path)).config.num_hidden_layers == 1


def test_a_folder_that_holds_another_model_is_left_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="holds something else"):
        write_random_checkpoint(tmp_path, TINY)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
