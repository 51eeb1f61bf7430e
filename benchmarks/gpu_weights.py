"""Random Mixtral weights that every process makes for itself, on the device, from a seed.

A tensor depends on the seed, its name and the device's kind alone, so an attention shard and its
expert workers agree without a file. Weights are normal with a variance of 1 / fan-in.

Shapes: E experts, H hidden_size, F intermediate_size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.random_checkpoint import SHAPES, RandomShape
from services.core.checkpoints.checkpoint import ExpertWeights
from services.core.checkpoints.tensor_names import expert_tensor_names
from services.core.model_config import ModelConfig
from services.core.registry import Slot

TOY = RandomShape(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
)


def random_config(name: str, num_layers: int) -> ModelConfig:
    """The config of "toy" or one of `random_checkpoint.SHAPES`, with so many layers."""
    shape = replace(TOY if name == "toy" else SHAPES[name], num_hidden_layers=num_layers)
    return ModelConfig(
        architecture="MixtralForCausalLM",
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.hidden_size // shape.num_attention_heads,
        vocab_size=shape.vocab_size,
        num_local_experts=shape.num_local_experts,
        num_experts_per_tok=shape.num_experts_per_tok,
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


class SeededWeights:
    """In the place of a `Checkpoint`: bfloat16 tensors by name, made on `device` when asked for."""

    def __init__(self, config: ModelConfig, device: torch.device, *, seed: int = 0) -> None:
        self.config = config
        self.name = "random"
        self.bytes_read = 0
        self._device = device
        self._seed = seed

    def require(self, *, slots: Iterable[Slot] = (), non_expert: bool = False) -> None:
        """All tensors can be had."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        if len(shape) == 1:
            return tensor.fill_(1.0)
        std = 1.0 if name == "model.embed_tokens.weight" else shape[1] ** -0.5
        key = hashlib.blake2b(f"{self._seed} {name}".encode(), digest_size=7).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(key, "little"))
        return tensor.normal_(0.0, std, generator=generator)

    def rows_of(self, name: str, shape: tuple[int, int]) -> Tensor:
        return self.tensor(name, shape)

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        w1, w2, w3 = expert_tensor_names(layer, expert)
        hidden, intermediate = self.config.hidden_size, self.config.intermediate_size
        return ExpertWeights(
            w1=self.tensor(w1, (intermediate, hidden)),
            w2=self.tensor(w2, (hidden, intermediate)),
            w3=self.tensor(w3, (intermediate, hidden)),
        )

    def expert_rows(self, layer: int, expert: int) -> ExpertWeights:
        return self.expert(layer, expert)

    def dense_mlp(self, layer: int) -> ExpertWeights:
        raise NotImplementedError(f"layer {layer} of a Mixtral has experts")

    def slot_digest(self, layer: int, expert: int) -> bytes:
        text = f"{self._seed} {layer} {expert} {self.config}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


class HeldWeights(SeededWeights):
    """The same weights, made once and kept, experts in the layout that grouped products read, so
    that several sides of a comparison can use one copy."""

    def __init__(self, config: ModelConfig, device: torch.device, *, seed: int = 0) -> None:
        super().__init__(config, device, seed=seed)
        self._held: dict[str, Tensor] = {}
        hidden, intermediate = config.hidden_size, config.intermediate_size
        num_experts = config.num_local_experts

        def stacks(*shape: int) -> list[Tensor]:
            return [
                torch.empty((num_experts, *shape), dtype=torch.bfloat16, device=device)
                for _ in range(config.num_hidden_layers)
            ]

        self.w13 = stacks(2 * intermediate, hidden)
        """Of each layer [E, 2F, H]: w1 above w3."""
        self.w2 = stacks(hidden, intermediate)
        """Of each layer [E, H, F]."""
        for layer in range(config.num_hidden_layers):
            for expert in range(num_experts):
                made = super().expert(layer, expert)
                held = self.expert(layer, expert)
                held.w1.copy_(made.w1)
                held.w3.copy_(made.w3)
                held.w2.copy_(made.w2)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if ".experts." in name:
            return super().tensor(name, shape)
        if name not in self._held:
            self._held[name] = super().tensor(name, shape)
        return self._held[name]

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """Views of `w13` and `w2`."""
        w1, w3 = self.w13[layer][expert].chunk(2)
        return ExpertWeights(w1=w1, w2=self.w2[layer][expert], w3=w3)


def attention_params(config: ModelConfig) -> int:
    """Of one layer: q, k, v and o projections and the gate."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.hidden_size * (heads * config.head_dim + config.num_local_experts)
