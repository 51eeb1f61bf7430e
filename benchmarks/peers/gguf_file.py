"""Write a Mixtral checkpoint as one GGUF file for llama.cpp, one tensor in memory at a time.

    python -m benchmarks.peers.gguf_file CHECKPOINT OUT.gguf --weights bf16|q8_0|q4_0

Needs numpy and the `gguf` package. Reads bfloat16 safetensors in the hub's layout. Norms and gates
stay float32, as llama.cpp wants them; a matrix whose rows the format cannot hold stays bfloat16.
There is no vocabulary in the file: prompts and answers are token ids.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.bf16_tensors import Bf16Tensors

WEIGHTS = ("bf16", "q8_0", "q4_0")
Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of the file: its name, shape and type there, and how to read it in float32."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    read: Callable[[], Array]


def write_gguf(checkpoint: Path, out: Path, weights: str) -> None:
    """Replaces `out` when the new file is complete."""
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = Bf16Tensors(checkpoint)
    entries = list(_entries(config, tensors, weights))
    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    _add_shape(writer, config)
    for entry in entries:
        stored = gguf.quant_shape_to_byte_shape(entry.shape, entry.kind)
        is_float = entry.kind == gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(
            entry.name,
            entry.shape if is_float else stored,
            np.dtype(np.float32 if is_float else np.uint8),
            math.prod(stored),
            raw_dtype=None if is_float else entry.kind,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(gguf.quantize(entry.read(), entry.kind))
    writer.close()
    partial.replace(out)


def permute_heads(weight: Array, num_heads: int) -> Array:
    """Rows [heads x head_dim, I] from the hub's rotary order, halves, to llama.cpp's, pairs."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def _add_shape(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_tokenizer_model("no_vocab")


def _entries(config: dict[str, Any], tensors: Bf16Tensors, weights: str) -> Iterator[Entry]:
    kind = gguf.GGMLQuantizationType[weights.upper()]
    # As llama.cpp's own converter: what every token reads is not stored in 4 bits.
    edge = gguf.GGMLQuantizationType.Q8_0 if weights == "q4_0" else kind

    def plain(name: str, source: str, wanted: gguf.GGMLQuantizationType) -> Entry:
        shape = tensors.shape(source)
        return Entry(
            name=name,
            shape=shape,
            kind=wanted if len(shape) == 1 else _that_fits(shape, wanted),
            read=lambda: tensors.read(source),
        )

    def heads(name: str, source: str, num_heads: int) -> Entry:
        entry = plain(name, source, kind)
        return Entry(
            name=name,
            shape=entry.shape,
            kind=entry.kind,
            read=lambda: permute_heads(tensors.read(source), num_heads),
        )

    float32 = gguf.GGMLQuantizationType.F32
    yield plain("token_embd.weight", "model.embed_tokens.weight", edge)
    yield plain("output_norm.weight", "model.norm.weight", float32)
    if not config.get("tie_word_embeddings", False):
        yield plain("output.weight", "lm_head.weight", edge)
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"blk.{layer}", f"model.layers.{layer}"
        attention, moe = f"{theirs}.self_attn", f"{theirs}.block_sparse_moe"
        yield plain(f"{ours}.attn_norm.weight", f"{theirs}.input_layernorm.weight", float32)
        yield plain(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight", float32)
        yield heads(
            f"{ours}.attn_q.weight", f"{attention}.q_proj.weight", config["num_attention_heads"]
        )
        yield heads(
            f"{ours}.attn_k.weight", f"{attention}.k_proj.weight", config["num_key_value_heads"]
        )
        yield plain(f"{ours}.attn_v.weight", f"{attention}.v_proj.weight", kind)
        yield plain(f"{ours}.attn_output.weight", f"{attention}.o_proj.weight", kind)
        yield plain(f"{ours}.ffn_gate_inp.weight", f"{moe}.gate.weight", float32)
        for name, matrix in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            sources = [
                f"{moe}.experts.{expert}.{matrix}.weight"
                for expert in range(config["num_local_experts"])
            ]
            yield _stacked(f"{ours}.ffn_{name}_exps.weight", sources, tensors, kind)


def _stacked(
    name: str, sources: Sequence[str], tensors: Bf16Tensors, kind: gguf.GGMLQuantizationType
) -> Entry:
    """The matrices of a layer's experts as one tensor [E, O, I]."""
    shape = (len(sources), *tensors.shape(sources[0]))
    return Entry(
        name=name,
        shape=shape,
        kind=_that_fits(shape, kind),
        read=lambda: np.stack([tensors.read(source) for source in sources]),
    )


def _that_fits(
    shape: tuple[int, ...], kind: gguf.GGMLQuantizationType
) -> gguf.GGMLQuantizationType:
    block_size: int = gguf.GGML_QUANT_SIZES[kind][0]
    return kind if shape[-1] % block_size == 0 else gguf.GGMLQuantizationType.BF16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", choices=WEIGHTS, default="bf16")
    arguments = parser.parse_args()
    write_gguf(arguments.checkpoint, arguments.out, arguments.weights)


if __name__ == "__main__":
    main()
