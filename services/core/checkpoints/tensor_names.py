"""Where each tensor of a model lies in the layouts that checkpoints come in.

A tensor is always asked for by its classic Hugging Face name, the canonical one. It may be stored

- so ("classic"), as transformers writes it: `...block_sparse_moe.experts.3.w1.weight` [F, H];
- as transformers 5 keeps it in memory ("fused"): `...mlp.experts.gate_up_proj` [E, 2F, H], gate
  rows first, and `...mlp.experts.down_proj` [E, H, F];
- under the names of Mistral's reference code: `layers.0.feed_forward.experts.3.w1.weight`, or, in
  the first Mixtral release, `layers.0.block_sparse_moe.w1` [E * F, H] with w2 transposed.

Mistral's files hold q and k for rotary embeddings over neighbouring pairs of a head's dimensions
(a complex product); the canonical form rotates the first half of a head against the second, so
the rows of q and k change places.

Shapes: H hidden, F intermediate, E experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from services.core.errors import CheckpointError
from services.core.model_config import ModelConfig
from services.core.registry import Slot

Order = Literal["as_is", "transposed", "rotary_pairs"]
"""How the stored run differs from the canonical tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSource:
    """One way a canonical tensor may be stored: a contiguous run of a stored tensor.

    `stored_shape` is that of the whole stored tensor, `shape` that of the run, which begins
    `start` elements in.
    """

    name: str
    stored_shape: tuple[int, ...]
    shape: tuple[int, ...]
    start: int = 0
    order: Order = "as_is"


def expert_tensor_names(layer: int, expert: int) -> tuple[str, str, str]:
    """Names of w1, w2 and w3 of one expert."""
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    return f"{prefix}.w1.weight", f"{prefix}.w2.weight", f"{prefix}.w3.weight"


def dense_tensor_names(layer: int) -> tuple[str, str, str]:
    """Names of w1, w2 and w3 of a dense layer's FFN: gate, down and up projection."""
    prefix = f"model.layers.{layer}.mlp"
    return f"{prefix}.gate_proj.weight", f"{prefix}.down_proj.weight", f"{prefix}.up_proj.weight"


def non_expert_tensor_names(config: ModelConfig) -> tuple[str, ...]:
    """All that an attention shard reads, in the order of the forward pass."""
    names = ["model.embed_tokens.weight"]
    for layer in range(config.num_hidden_layers):
        names += [f"model.layers.{layer}.{suffix}" for suffix in _LAYER_SUFFIXES]
        if config.is_moe:
            names.append(f"model.layers.{layer}.{_GATE}")
        else:
            names += dense_tensor_names(layer)
    names.append("model.norm.weight")
    if not config.tie_word_embeddings:
        names.append("lm_head.weight")
    return tuple(names)


def slot_tensor_names(slots: frozenset[Slot]) -> tuple[str, ...]:
    return tuple(name for slot in sorted(slots) for name in expert_tensor_names(*slot))


def tensor_sources(name: str, config: ModelConfig) -> tuple[TensorSource, ...]:
    """Every way the tensor may be stored, the likeliest first.

    Raises `CheckpointError` when the model has no tensor of that name.
    """
    if match := _LAYER_NAME.fullmatch(name):
        layer, suffix = int(match[1]), match[2]
        if layer < config.num_hidden_layers:
            if config.is_moe and suffix == _GATE:
                return _gate_sources(layer, config)
            if config.is_moe and (expert := _EXPERT_SUFFIX.fullmatch(suffix)):
                if int(expert[1]) < config.num_local_experts:
                    return _expert_sources(layer, int(expert[1]), expert[2], config)
            elif suffix in _LAYER_SUFFIXES or (not config.is_moe and suffix in _DENSE_SUFFIXES):
                return _layer_sources(layer, suffix, config)
    elif name in _TOP_NAMES:
        return _top_sources(name, config)
    raise CheckpointError(f"a model of this shape has no tensor {name}", tensor=name)


_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT_SUFFIX = re.compile(r"block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
_GATE = "block_sparse_moe.gate.weight"

_TOP_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_SUFFIXES = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
_DENSE_SUFFIXES = {
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
}


def _whole(name: str, shape: tuple[int, ...], order: Order = "as_is") -> TensorSource:
    return TensorSource(name=name, stored_shape=shape, shape=shape, order=order)


def _top_sources(name: str, config: ModelConfig) -> tuple[TensorSource, ...]:
    is_norm = name == "model.norm.weight"
    shape = (config.hidden_size,) if is_norm else (config.vocab_size, config.hidden_size)
    if name == "lm_head.weight" and config.tie_word_embeddings:
        name = "model.embed_tokens.weight"
    return _whole(name, shape), _whole(_TOP_NAMES[name], shape)


def _layer_sources(layer: int, suffix: str, config: ModelConfig) -> tuple[TensorSource, ...]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    shape = {
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, q_size),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
    }.get(suffix, (hidden,))
    rotates = suffix in ("self_attn.q_proj.weight", "self_attn.k_proj.weight")
    mistral_suffix = (_LAYER_SUFFIXES | _DENSE_SUFFIXES)[suffix]
    return (
        _whole(f"model.layers.{layer}.{suffix}", shape),
        _whole(f"layers.{layer}.{mistral_suffix}", shape, "rotary_pairs" if rotates else "as_is"),
    )


def _gate_sources(layer: int, config: ModelConfig) -> tuple[TensorSource, ...]:
    shape = (config.num_local_experts, config.hidden_size)
    return (
        _whole(f"model.layers.{layer}.{_GATE}", shape),
        _whole(f"model.layers.{layer}.mlp.gate.weight", shape),
        _whole(f"layers.{layer}.feed_forward.gate.weight", shape),
        _whole(f"layers.{layer}.{_GATE}", shape),
    )


def _expert_sources(
    layer: int, expert: int, weight: str, config: ModelConfig
) -> tuple[TensorSource, ...]:
    num_experts, hidden = config.num_local_experts, config.hidden_size
    intermediate = config.intermediate_size
    size = hidden * intermediate
    shape = (hidden, intermediate) if weight == "w2" else (intermediate, hidden)
    if weight == "w2":
        fused = TensorSource(
            name=f"model.layers.{layer}.mlp.experts.down_proj",
            stored_shape=(num_experts, hidden, intermediate),
            shape=shape,
            start=expert * size,
        )
    else:
        fused = TensorSource(
            name=f"model.layers.{layer}.mlp.experts.gate_up_proj",
            stored_shape=(num_experts, 2 * intermediate, hidden),
            shape=shape,
            start=(2 * expert + (weight == "w3")) * size,
        )
    first_release = TensorSource(
        name=f"layers.{layer}.block_sparse_moe.{weight}",
        stored_shape=(num_experts * intermediate, hidden),
        shape=(intermediate, hidden),
        start=expert * size,
        order="transposed" if weight == "w2" else "as_is",
    )
    classic = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{weight}.weight"
    mistral = f"layers.{layer}.feed_forward.experts.{expert}.{weight}.weight"
    return _whole(classic, shape), fused, _whole(mistral, shape), first_release
