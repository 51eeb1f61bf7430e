"""Write a large random Mixtral in the hub's sharded layout, one tensor in memory at a time.

    python -m benchmarks.random_checkpoint wide-22b OUT --layers 1

Weights are normal with a variance of 1 / fan-in and norms are one, so that activations neither
vanish nor explode; embeddings have variance one. Every tensor has its own generator, so a tensor
depends on the seed and its name alone. There is no tokenizer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from services.core.checkpoints.json_fields import read_json_object
from services.core.checkpoints.safetensors_files import READ_BYTES
from services.core.errors import CheckpointError
from services.core.tensor_codec import tensor_to_bytes

SHARD_BYTES = 1 << 30
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomShape:
    """Fields of the `config.json` that is written."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 32000
    num_local_experts: int = 8
    num_experts_per_tok: int = 2


SHAPES = {
    "bench-s": RandomShape(
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
    ),
    "bench-xs": RandomShape(
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=8000,
    ),
    "wide-7b": RandomShape(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "wide-22b": RandomShape(
        hidden_size=6144,
        intermediate_size=16384,
        num_hidden_layers=1,
        num_attention_heads=48,
        num_key_value_heads=8,
    ),
}
"""Widths of the targets: wide-7b and wide-22b are Mixtral 8x7B and 8x22B, one layer unless told."""


def write_named_checkpoint(
    name: str, folder: Path, *, num_layers: int | None = None, seed: int = 0
) -> Path:
    """Write one of `SHAPES`, unless the folder holds it already; returns the folder."""
    shape = SHAPES[name]
    if num_layers is not None:
        shape = replace(shape, num_hidden_layers=num_layers)
    if not (folder / INDEX).is_file() or _config_of(folder) != _config(shape, seed):
        write_random_checkpoint(folder, shape, seed=seed)
    return folder


def write_random_checkpoint(
    folder: Path, shape: RandomShape, *, seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write `config.json`, bfloat16 shards and, last, the index; returns the bytes of weights.

    Replaces a random checkpoint; raises `CheckpointError` when the folder holds anything else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and "random_seed" not in _config_of(folder):
        raise CheckpointError(f"{folder} holds something else; give another folder")
    for stale in (*folder.glob(INDEX), *folder.glob("*.safetensors")):
        stale.unlink()
    (folder / "config.json").write_text(json.dumps(_config(shape, seed), indent=2))
    shards = list(_split(list(_tensors(shape)), shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, shard, seed)
        weight_map |= dict.fromkeys((name for name, _ in shard), file)
    total_bytes = sum(2 * math.prod(size) for shard in shards for _, size in shard)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
    return total_bytes


Shape = tuple[int, ...]


def _tensors(shape: RandomShape) -> Iterator[tuple[str, Shape]]:
    """Names and shapes in the classic layout, in the order of the forward pass."""
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    kv_size = hidden // shape.num_attention_heads * shape.num_key_value_heads
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (kv_size, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (kv_size, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.block_sparse_moe.gate.weight", (shape.num_local_experts, hidden)
        for expert in range(shape.num_local_experts):
            expert_prefix = f"{prefix}.block_sparse_moe.experts.{expert}"
            yield f"{expert_prefix}.w1.weight", (intermediate, hidden)
            yield f"{expert_prefix}.w2.weight", (hidden, intermediate)
            yield f"{expert_prefix}.w3.weight", (intermediate, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocab_size, hidden)


def _split(
    tensors: Sequence[tuple[str, Shape]], shard_bytes: int
) -> Iterator[list[tuple[str, Shape]]]:
    shard: list[tuple[str, Shape]] = []
    room = shard_bytes
    for name, size in tensors:
        num_bytes = 2 * math.prod(size)
        if shard and num_bytes > room:
            yield shard
            shard, room = [], shard_bytes
        shard.append((name, size))
        room -= num_bytes
    yield shard


def _write_shard(file: Path, tensors: Sequence[tuple[str, Shape]], seed: int) -> None:
    """The safetensors format: header length, header, data in the header's order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in tensors:
        begin, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for name, size in tensors:
            for part in _random_parts(name, size, seed):
                stream.write(tensor_to_bytes(part))


def _random_parts(name: str, size: Shape, seed: int) -> Iterator[torch.Tensor]:
    """The tensor's values in bfloat16, in flat parts."""
    count = math.prod(size)
    if len(size) == 1:
        yield torch.ones(count, dtype=torch.bfloat16)
        return
    std = 1.0 if name == "model.embed_tokens.weight" else size[1] ** -0.5
    key = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    part_size = READ_BYTES // 4
    values = torch.empty(min(part_size, count))
    for begin in range(0, count, part_size):
        part = values[: min(part_size, count - begin)]
        yield part.normal_(0.0, std, generator=generator).to(torch.bfloat16)


def _config(shape: RandomShape, seed: int) -> dict[str, Any]:
    fields = {field: getattr(shape, field) for field in shape.__dataclass_fields__}
    return fields | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "random_seed": seed,
    }


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json_object(path) if path.is_file() else {}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a large random Mixtral checkpoint.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--layers", type=int, help="number of layers, if not the shape's own")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.layers is not None and options.layers < 1:
        parser.error("--layers must be at least 1")
    folder = write_named_checkpoint(
        options.shape, options.out, num_layers=options.layers, seed=options.seed
    )
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{folder}: {options.shape}, {num_bytes / 1e9:.2f} GB of bfloat16 weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
