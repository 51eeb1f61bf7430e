"""Writes a quantised copy of a checkpoint, tensor by tensor.

Memory holds one shard's headers and one quantised weight, with a part of its unquantised form. The
copy is written into a folder beside the one asked for, which gets its name once everything in it is
complete: a run that was cut short leaves nothing that looks like a model.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from services.core.checkpoints.checkpoint import Checkpoint
from services.core.checkpoints.hub import METADATA_PATTERNS
from services.core.checkpoints.json_fields import read_json_object
from services.core.checkpoints.quantization_config import quantization_config
from services.core.checkpoints.quantized_tensors import PACKED, SCALE, SHAPE
from services.core.checkpoints.tensor_names import (
    expert_tensor_names,
    non_expert_tensor_names,
    tensor_sources,
)
from services.core.errors import CheckpointError, ConfigurationError
from services.core.model_config import ModelConfig
from services.core.quantization.formats import QuantizedFormat
from services.core.quantization.quantized_rows import QuantizedRows, num_groups, packed_row_bytes
from services.core.quantization.rounding import quantize
from services.core.tensor_codec import tensor_to_bytes

SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"
_PART_BYTES = 32 << 20
_NOT_COPIED = ("config.json", "params.json", "*.safetensors.index.json")
_DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationPlan:
    """What becomes of a model's weights; None leaves them as they are.

    `experts` is for w1, w2 and w3 of all experts; `shard` for the other matrices: attention, a
    dense model's FFN, and the head. Norms, embeddings and the gate are never quantised.
    """

    experts: QuantizedFormat | None
    shard: QuantizedFormat | None

    def format_of(self, name: str) -> QuantizedFormat | None:
        if ".experts." in name:
            return self.experts
        is_matrix = name == "lm_head.weight" or ".self_attn." in name or ".mlp." in name
        return self.shard if is_matrix else None


def quantize_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    plan: QuantizationPlan,
    *,
    search: bool = True,
    shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[int, int], None] | None = None,
) -> int:
    """Write the quantised copy; returns the bytes of its weights.

    `on_tensor(done, total)` is told of progress. Raises `ConfigurationError` when the plan has
    nothing to do or the folder exists, `CheckpointError` when the checkpoint is quantised already
    or cannot be read.
    """
    _check(checkpoint, folder, plan)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        num_bytes = _write(checkpoint, partial, plan, search, shard_bytes, on_tensor)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A tensor of the copy."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        item_bytes = {"I8": 1, "F16": 2, "BF16": 2, "I64": 8}.get(self.dtype, 4)
        return math.prod(self.shape) * item_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weight:
    """A tensor of the model and what it becomes."""

    name: str
    shape: tuple[int, ...]
    weight_format: QuantizedFormat | None
    entries: tuple[_Entry, ...]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)


def _check(checkpoint: Checkpoint, folder: Path, plan: QuantizationPlan) -> None:
    names = _tensor_names(checkpoint.config)
    for name in names:
        if stored := checkpoint.quantized_format(name):
            raise CheckpointError(
                f"{checkpoint.folder} is quantised already ({stored}); give the original",
                file=str(checkpoint.folder),
                tensor=name,
            )
    if not any(plan.format_of(name) for name in names):
        raise ConfigurationError("nothing to quantise; give a format for experts or shard")
    if folder.exists():
        raise ConfigurationError(f"{folder} exists already; give another folder, or remove it")


def _tensor_names(config: ModelConfig) -> list[str]:
    """In the order of the forward pass, the experts of a layer after the rest of it."""
    names: list[str] = []
    for name in non_expert_tensor_names(config):
        names.append(name)
        if name.endswith(".block_sparse_moe.gate.weight"):
            layer = int(name.split(".")[2])
            for expert in range(config.num_local_experts):
                names += expert_tensor_names(layer, expert)
    return names


def _write(
    checkpoint: Checkpoint,
    folder: Path,
    plan: QuantizationPlan,
    search: bool,
    shard_bytes: int,
    on_tensor: Callable[[int, int], None] | None,
) -> int:
    weights = [_weight(checkpoint, name, plan) for name in _tensor_names(checkpoint.config)]
    shards = list(_split(weights, shard_bytes))
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file).open("wb") as stream:
            _write_header(stream, shard)
            for weight in shard:
                _write_weight(stream, checkpoint, weight, search)
                weight_map |= {entry.name: file for entry in weight.entries}
                done += 1
                if on_tensor is not None:
                    on_tensor(done, len(weights))
            stream.flush()
            os.fsync(stream.fileno())
    num_bytes = sum(weight.num_bytes for weight in weights)
    _copy_metadata(checkpoint.folder, folder)
    _write_json(folder / "config.json", _config(checkpoint, plan))
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    _write_json(folder / INDEX, index)
    return num_bytes


def _weight(checkpoint: Checkpoint, name: str, plan: QuantizationPlan) -> _Weight:
    shape = tensor_sources(name, checkpoint.config)[0].shape
    weight_format = plan.format_of(name)
    if weight_format is None:
        dtype = _DTYPE_NAMES[checkpoint.stored_dtype(name)]
        entries: tuple[_Entry, ...] = (_Entry(name=name, dtype=dtype, shape=shape),)
    elif weight_format == "int8":
        entries = (
            _Entry(name=name, dtype="I8", shape=shape),
            _Entry(name=name + SCALE, dtype="F32", shape=(shape[0], 1)),
        )
    else:
        words = packed_row_bytes(shape[1]) // 4
        entries = (
            _Entry(name=name + PACKED, dtype="I32", shape=(shape[0], words)),
            _Entry(name=name + SCALE, dtype="BF16", shape=(shape[0], num_groups(shape[1]))),
            _Entry(name=name + SHAPE, dtype="I64", shape=(2,)),
        )
    return _Weight(name=name, shape=shape, weight_format=weight_format, entries=entries)


def _split(weights: Sequence[_Weight], shard_bytes: int) -> Iterator[list[_Weight]]:
    shard: list[_Weight] = []
    for weight in weights:
        if shard and sum(w.num_bytes for w in shard) + weight.num_bytes > shard_bytes:
            yield shard
            shard = []
        shard.append(weight)
    yield shard


def _write_header(stream: BinaryIO, shard: Sequence[_Weight]) -> None:
    """Of a safetensors file: length, then JSON with the offsets of the data that follows."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in (entry for weight in shard for entry in weight.entries):
        begin, end = end, end + entry.num_bytes
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    stream.write(len(encoded).to_bytes(8, "little"))
    stream.write(encoded)


def _write_weight(stream: BinaryIO, checkpoint: Checkpoint, weight: _Weight, search: bool) -> None:
    if weight.weight_format is None:
        stream.write(tensor_to_bytes(checkpoint.tensor(weight.name, weight.shape)))
        return
    scales: list[Tensor] = []
    for rows in _quantized_parts(checkpoint, weight, weight.weight_format, search):
        stream.write(tensor_to_bytes(rows.values))
        scales.append(rows.scales)
    for part in scales:
        stream.write(tensor_to_bytes(part))
    if weight.weight_format == "int4":
        stream.write(tensor_to_bytes(torch.tensor(weight.shape, dtype=torch.int64)))


def _quantized_parts(
    checkpoint: Checkpoint, weight: _Weight, weight_format: QuantizedFormat, search: bool
) -> Iterator[QuantizedRows]:
    num_outputs, num_inputs = weight.shape
    rows = checkpoint.rows_of(weight.name, (num_outputs, num_inputs))
    step = max(1, _PART_BYTES // (4 * num_inputs))
    for first in range(0, num_outputs, step):
        yield quantize(rows[first : first + step], weight_format, search=search)


def _config(checkpoint: Checkpoint, plan: QuantizationPlan) -> dict[str, Any]:
    path = checkpoint.folder / "config.json"
    fields = read_json_object(path) if path.is_file() else _hugging_face_fields(checkpoint.config)
    fields.setdefault("torch_dtype", checkpoint.config.dtype)
    formats: list[tuple[QuantizedFormat, Sequence[str]]] = []
    ignored = [r"re:.*\.gate$"]
    if plan.experts is not None:
        formats.append((plan.experts, [r"re:.*\.experts\..*"]))
    shard_modules = [r"re:.*\.self_attn\..*", r"re:.*\.mlp\.[a-z]+_proj$", "lm_head"]
    if plan.shard is not None:
        formats.append((plan.shard, shard_modules))
    else:
        ignored += shard_modules
    return fields | {"quantization_config": quantization_config(formats, ignored)}


def _hugging_face_fields(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of a model that came with Mistral's `params.json`."""
    taken = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
        *("rms_norm_eps", "rope_theta", "sliding_window", "tie_word_embeddings", "hidden_act"),
        "bos_token_id",
    )
    fields: dict[str, Any] = {name: getattr(config, name) for name in taken}
    if config.is_moe:
        fields["num_local_experts"] = config.num_local_experts
        fields["num_experts_per_tok"] = config.num_experts_per_tok
    return fields | {
        "architectures": [config.architecture],
        "model_type": "mixtral" if config.is_moe else "mistral",
        "eos_token_id": list(config.eos_token_ids),
    }


def _copy_metadata(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        is_wanted = any(fnmatchcase(path.name, pattern) for pattern in METADATA_PATTERNS)
        if is_wanted and not any(fnmatchcase(path.name, pattern) for pattern in _NOT_COPIED):
            shutil.copyfile(path, target / path.name)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
