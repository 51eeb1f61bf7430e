from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.core.checkpoints.checkpoint import Checkpoint
from services.core.checkpoints.tensor_names import expert_tensor_names, non_expert_tensor_names
from services.core.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from services.core.model_config import load_model_config
from services.core.quantization.formats import QUANTIZED_FORMATS, QuantizedFormat
from services.core.quantization.rounding import quantize
from services.core.quantization.writer import QuantizationPlan, quantize_checkpoint
from tests.support.checkpoints import Layout, make_checkpoint

W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
SHAPE = (96, 64)


def quantized(
    source: Path,
    folder: Path,
    experts: QuantizedFormat | None = "int8",
    shard: QuantizedFormat | None = None,
    **options: Any,
) -> Checkpoint:
    plan = QuantizationPlan(experts=experts, shard=shard)
    quantize_checkpoint(Checkpoint.open(str(source)), folder, plan, **options)
    return Checkpoint.open(str(folder))


@pytest.mark.parametrize("layout", ["classic", "fused", "mistral"])
@pytest.mark.parametrize("weight_format", QUANTIZED_FORMATS)
def test_a_written_weight_is_read_back_as_it_was_rounded(
    tmp_path: Path, weight_format: QuantizedFormat, layout: Layout
) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.bfloat16, layout=layout)
    checkpoint = quantized(source, tmp_path / "copy", weight_format)
    expected = quantize(Checkpoint.open(str(source)).tensor(W1, SHAPE), weight_format)
    rows = checkpoint.rows_of(W1, SHAPE)
    assert rows.weight_format == weight_format  # type: ignore[attr-defined]
    for part in (slice(0, 96), slice(31, 40)):
        found = rows.quantized(part)  # type: ignore[attr-defined]
        assert torch.equal(found.values, expected.values[part])
        assert torch.equal(found.scales, expected.scales[part])
    assert torch.equal(checkpoint.tensor(W1, SHAPE), expected.dequantized(torch.bfloat16))


def test_all_else_is_copied_as_it_is(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.bfloat16, sharded=True)
    (source / "tokenizer.json").write_text("{}")
    checkpoint = quantized(source, tmp_path / "copy", "int4", shard_bytes=20_000)
    original = Checkpoint.open(str(source))
    assert checkpoint.non_expert_digest() == original.non_expert_digest()
    assert checkpoint.slot_digest(1, 2) != original.slot_digest(1, 2)
    assert (checkpoint.folder / "tokenizer.json").read_text() == "{}"
    assert len(list(checkpoint.folder.glob("*.safetensors"))) > 3
    assert not list(tmp_path.glob("*.partial"))
    index = json.loads((checkpoint.folder / "model.safetensors.index.json").read_text())
    stored = {
        name: file for file in set(index["weight_map"].values())
        for name in load_file(checkpoint.folder / file)
    }  # fmt: skip
    assert stored == index["weight_map"]


def test_attention_and_head_are_quantized_on_request_and_norms_and_gate_never(
    tmp_path: Path,
) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    checkpoint = quantized(source, tmp_path / "copy", "int4", "int8")
    config = checkpoint.config
    formats = {
        name: checkpoint.quantized_format(name)
        for name in (*non_expert_tensor_names(config), *expert_tensor_names(0, 1))
    }
    for name, weight_format in formats.items():
        if "experts" in name:
            assert weight_format == "int4"
        elif "self_attn" in name or name == "lm_head.weight":
            assert weight_format == "int8"
        else:
            assert weight_format is None, name


def test_a_dense_model_is_quantized_as_part_of_the_shard(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dense=True, dtype=torch.bfloat16)
    with pytest.raises(ConfigurationError, match="nothing to quantise"):
        quantized(source, tmp_path / "copy", "int8")
    checkpoint = quantized(source, tmp_path / "copy", None, "int8")
    assert checkpoint.quantized_format("model.layers.0.mlp.gate_proj.weight") == "int8"


def test_what_is_quantized_already_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    quantized(source, tmp_path / "copy")
    with pytest.raises(CheckpointError, match="quantised already"):
        quantized(tmp_path / "copy", tmp_path / "again", "int4")
    with pytest.raises(ConfigurationError, match="exists already"):
        quantized(source, tmp_path / "copy")


def test_a_run_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="lm_head"):
        quantized(source, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_faults_of_a_quantized_checkpoint_name_file_and_tensor(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    folder = quantized(source, tmp_path / "copy", "int4").folder
    file = folder / "model-00001-of-00001.safetensors"
    whole = load_file(file)

    def fault(**changes: torch.Tensor) -> str:
        save_file(whole | {W1 + part: tensor for part, tensor in changes.items()}, file)
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(str(folder)).tensor(W1, SHAPE)
        assert str(file) in caught.value.message and W1 in caught.value.message
        return caught.value.message

    scale = whole[W1 + "_scale"]
    assert "has dtype I8" in fault(_packed=torch.zeros(96, 8, dtype=torch.int8))
    assert "has shape [96, 9]" in fault(_packed=torch.zeros(96, 9, dtype=torch.int32))
    assert "has shape [95, 1]" in fault(_scale=scale[:95].clone())
    assert "nan" in fault(_scale=torch.full_like(scale, float("nan")))
    del whole[W1 + "_scale"]
    assert "lacks tensor" in fault()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"quantization_status": "frozen"}, "not stored compressed"),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}}, "float"),
        ({"config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "channel"}}}}, "channel"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    folder = quantized(source, tmp_path / "copy").folder
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=said):
        load_model_config(folder)


def test_scales_of_groups_of_128_are_read(tmp_path: Path) -> None:
    """As other programs write them."""
    source = make_checkpoint(tmp_path / "source", dtype=torch.bfloat16, intermediate_size=192)
    folder = quantized(source, tmp_path / "copy", "int4").folder
    w2 = expert_tensor_names(0, 0)[1]
    file = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    scales = tensors[w2 + "_scale"][:, [0, 2]].clone()
    save_file(tensors | {w2 + "_scale": scales}, file)
    rows = Checkpoint.open(str(folder)).rows_of(w2, (64, 192)).quantized(slice(0, 64))  # type: ignore[attr-defined]
    assert torch.equal(rows.scales, scales[:, [0, 0, 1]])
