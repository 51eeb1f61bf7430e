"""How many parameters and bytes a Mixtral has, and the published models by name."""

from __future__ import annotations

from dataclasses import dataclass

from services.core.model_config import ModelConfig
from services.core.planning.weight_formats import BF16, WeightFormat

NORM_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Experts are held in `weights`, everything else in bfloat16. Counts are of parameters."""

    config: ModelConfig
    weights: WeightFormat = BF16

    @property
    def expert_params(self) -> int:
        """Of one (layer, expert) slot: w1, w3 [F, H] and w2 [H, F]."""
        return 3 * self.config.hidden_size * self.config.intermediate_size

    @property
    def attention_params(self) -> int:
        """Of one layer: q, k, v and o."""
        config = self.config
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        return config.hidden_size * (2 * q_size + 2 * kv_size)

    @property
    def head_params(self) -> int:
        """Of the output projection, which is read once a step."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def shared_params(self) -> int:
        """Everything but the experts: attention, gates, norms, embedding and head."""
        config = self.config
        per_layer = (
            self.attention_params
            + config.num_local_experts * config.hidden_size
            + 2 * config.hidden_size
        )
        embeddings = self.head_params * (1 if config.tie_word_embeddings else 2)
        return config.num_hidden_layers * per_layer + embeddings + config.hidden_size

    @property
    def total_params(self) -> int:
        return self.shared_params + self._num_slots * self.expert_params

    @property
    def active_params(self) -> int:
        """What one token passes through: all but the experts it is not routed to."""
        used = self.config.num_hidden_layers * self.config.num_experts_per_tok
        return self.shared_params + used * self.expert_params

    @property
    def slot_bytes(self) -> int:
        """Bytes of one (layer, expert) slot."""
        hidden, intermediate = self.config.hidden_size, self.config.intermediate_size
        up = self.weights.matrix_bytes(intermediate, hidden)
        return 2 * up + self.weights.matrix_bytes(hidden, intermediate)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert index over all layers."""
        return self.config.num_hidden_layers * self.slot_bytes

    @property
    def shared_bytes(self) -> int:
        """Bytes of an attention shard's weights."""
        return BF16.bits // 8 * self.shared_params

    @property
    def total_bytes(self) -> int:
        return self.shared_bytes + self._num_slots * self.slot_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return self.config.kv_bytes_per_token(BF16.bits // 8)

    @property
    def _num_slots(self) -> int:
        return self.config.num_hidden_layers * self.config.num_local_experts


def _mixtral(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    vocab_size: int,
    max_position_embeddings: int,
) -> ModelConfig:
    return ModelConfig(
        architecture="MixtralForCausalLM",
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=8,
        head_dim=hidden_size // num_attention_heads,
        vocab_size=vocab_size,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        tie_word_embeddings=False,
        hidden_act="silu",
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_ids=(2,),
    )


PUBLISHED_MODELS = {
    "mixtral-8x7b": _mixtral(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=32768,
    ),
    "mixtral-8x22b": _mixtral(
        hidden_size=6144,
        intermediate_size=16384,
        num_hidden_layers=56,
        num_attention_heads=48,
        vocab_size=32768,
        max_position_embeddings=65536,
    ),
}
"""Shapes as the models' published `config.json` state them (8x22B: the instruct model's)."""
