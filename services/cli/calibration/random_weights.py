"""Random models to measure with: weights in memory, or a small checkpoint on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from services.core.checkpoints.tensor_names import expert_tensor_names
from services.core.model_config import ModelConfig

NUM_EXPERTS = 8
TOP_K = 2


def random_config(
    hidden_size: int, intermediate_size: int, *, num_layers: int, vocab_size: int = 256
) -> ModelConfig:
    """Sixteen heads, four of keys and values."""
    return ModelConfig(
        architecture="MixtralForCausalLM",
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=hidden_size // 16,
        vocab_size=vocab_size,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        tie_word_embeddings=False,
        hidden_act="silu",
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def random_matrix(*shape: int) -> Tensor:
    """bfloat16 with a variance of 1 / fan-in; a vector is ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, shape[-1] ** -0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomFfn:
    """`FfnWeights` in memory."""

    w1: Tensor
    w2: Tensor
    w3: Tensor

    @staticmethod
    def of(hidden_size: int, intermediate_size: int) -> RandomFfn:
        return RandomFfn(
            w1=random_matrix(intermediate_size, hidden_size),
            w2=random_matrix(hidden_size, intermediate_size),
            w3=random_matrix(intermediate_size, hidden_size),
        )


class RandomDecoderWeights:
    """`DecoderWeights` that are made when they are asked for."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return random_matrix(*shape)

    def rows_of(self, name: str, shape: tuple[int, int]) -> Tensor:
        return random_matrix(*shape)

    def dense_mlp(self, layer: int) -> RandomFfn:
        return RandomFfn.of(self.config.hidden_size, self.config.intermediate_size)


def write_checkpoint(folder: Path, config: ModelConfig) -> None:
    """`config.json` and one safetensors file."""
    folder.mkdir(parents=True)
    fields = {
        name: getattr(config, name)
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
            "num_local_experts",
            "num_experts_per_tok",
            "max_position_embeddings",
        )
    }
    fields |= {"architectures": [config.architecture], "torch_dtype": config.dtype}
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(_tensors(config), folder / "model.safetensors", metadata={"format": "pt"})


def _tensors(config: ModelConfig) -> dict[str, Tensor]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    tensors = {
        "model.embed_tokens.weight": random_matrix(config.vocab_size, hidden),
        "model.norm.weight": random_matrix(hidden),
        "lm_head.weight": random_matrix(config.vocab_size, hidden),
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": random_matrix(hidden),
            f"{prefix}.post_attention_layernorm.weight": random_matrix(hidden),
            f"{prefix}.self_attn.q_proj.weight": random_matrix(q_size, hidden),
            f"{prefix}.self_attn.k_proj.weight": random_matrix(kv_size, hidden),
            f"{prefix}.self_attn.v_proj.weight": random_matrix(kv_size, hidden),
            f"{prefix}.self_attn.o_proj.weight": random_matrix(hidden, q_size),
            f"{prefix}.block_sparse_moe.gate.weight": random_matrix(NUM_EXPERTS, hidden),
        }
        for expert in range(NUM_EXPERTS):
            w1, w2, w3 = expert_tensor_names(layer, expert)
            tensors[w1] = random_matrix(intermediate, hidden)
            tensors[w2] = random_matrix(hidden, intermediate)
            tensors[w3] = random_matrix(intermediate, hidden)
    return tensors
