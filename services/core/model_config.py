"""The shape of a model, as `config.json` (Hugging Face) or `params.json` (Mistral) states it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Field names are those of Hugging Face's `MixtralConfig`.

    `num_local_experts` is 0 for a dense Mistral; its FFN then runs in the attention shard.
    `dtype` is the checkpoint's own: "bfloat16", "float16" or "float32".
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    tie_word_embeddings: bool
    hidden_act: str
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def is_moe(self) -> bool:
        return self.num_local_experts > 0

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of KV cache one token takes over all layers: 2 x layers x KV heads x head_dim."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * dtype_bytes

    def expert_bytes(self, dtype_bytes: int) -> int:
        """Bytes of one (layer, expert) slot: w1, w3 [F, H] and w2 [H, F]."""
        return 3 * self.hidden_size * self.intermediate_size * dtype_bytes
