"""The Mixtral decoder (Jiang et al. 2024): attention and gating here, experts behind a seam.

    x = embed(token_ids)
    for each layer:  x = x + attention(norm(x))
                     h = norm(x)
                     x = x + sum over e in top-k of gate(h)[e] * expert_e(h)
    logits = lm_head(norm(x))

With `num_local_experts` 0 it is a dense Mistral, whose FFN is computed here.
Shapes: T tokens, H hidden_size, R sampled rows, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from router_service.experts import ExpertBackend, StepContext
from router_service.model.attention import AttentionPlan
from router_service.model.batch import ForwardBatch
from router_service.model.gate import TopKGate
from router_service.model.kv_cache import KVCache
from router_service.model.rotary import RotaryTable, Rotation
from services.core.expert_ffn import FfnWeights, PackedExpert
from services.core.model_config import ModelConfig
from services.core.packed_linear import PackedLinear


class DecoderWeights(Protocol):
    """Where the decoder's tensors come from, under the names of Hugging Face's checkpoints."""

    @property
    def config(self) -> ModelConfig: ...
    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor: ...
    def dense_mlp(self, layer: int) -> FfnWeights: ...


class MixtralDecoder:
    """Weights live on one device in one dtype: bfloat16, float16 or float32."""

    def __init__(
        self,
        *,
        config: ModelConfig,
        embedding: Tensor,
        layers: list[DecoderLayer],
        norm: RMSNorm,
        lm_head: PackedLinear,
    ) -> None:
        self.config = config
        self.dtype = embedding.dtype
        self.device = embedding.device
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._lm_head = lm_head
        self._rotary = RotaryTable(config, dtype=self.dtype, device=self.device)

    @classmethod
    def load(
        cls, checkpoint: DecoderWeights, *, dtype: torch.dtype, device: torch.device
    ) -> MixtralDecoder:
        """Read all tensors but the experts' (of a dense model also its FFNs)."""
        loader = _Loader(checkpoint, dtype, device)
        config = checkpoint.config
        vocab_shape = (config.vocab_size, config.hidden_size)
        embedding = loader.tensor("model.embed_tokens.weight", *vocab_shape)
        tied = config.tie_word_embeddings
        head = embedding if tied else loader.tensor("lm_head.weight", *vocab_shape)
        return cls(
            config=config,
            embedding=embedding,
            layers=[loader.layer(index) for index in range(config.num_hidden_layers)],
            norm=loader.norm("model.norm.weight"),
            lm_head=PackedLinear(head, dtype=dtype, device=device),
        )

    async def forward(
        self, batch: ForwardBatch, kv_cache: KVCache, experts: ExpertBackend, context: StepContext
    ) -> Tensor:
        """Logits float32 [R, V] of `batch.sample_rows`; fills the batch's slots of `kv_cache`.

        Awaits nothing but `experts`. Raises what `experts` raises. Non-finite values pass through.
        """
        window = self.config.sliding_window
        plan = AttentionPlan.build(batch, kv_cache, sliding_window=window, dtype=self.dtype)
        rotation = self._rotary.rotation(batch.positions, longest=max(batch.context_lens))

        x = F.embedding(batch.token_ids, self._embedding)
        for index, layer in enumerate(self._layers):
            x = x + layer.attention(index, layer.input_norm(x), rotation, plan, kv_cache)
            h = layer.post_attention_norm(x)
            if isinstance(layer.feed_forward, TopKGate):
                topk_ids, topk_weights = layer.feed_forward(h)
                x = x + await experts.forward(index, h, topk_ids, topk_weights, context)
            else:
                x = x + layer.feed_forward.forward(h)
        return self._lm_head(self._norm(x.index_select(0, batch.sample_rows))).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    input_norm: RMSNorm
    attention: SelfAttention
    post_attention_norm: RMSNorm
    feed_forward: TopKGate | PackedExpert


class SelfAttention:
    """Grouped-query attention (Ainslie et al. 2023): qkv_proj is q, k and v stacked by rows."""

    def __init__(self, qkv_proj: PackedLinear, o_proj: PackedLinear, config: ModelConfig) -> None:
        self._qkv_proj = qkv_proj
        self._o_proj = o_proj
        self._num_heads = config.num_attention_heads
        self._num_kv_heads = config.num_key_value_heads
        self._head_dim = config.head_dim

    def __call__(
        self, layer: int, x: Tensor, rotation: Rotation, plan: AttentionPlan, kv_cache: KVCache
    ) -> Tensor:
        """[T, H] -> [T, H]."""
        qkv = self._qkv_proj(x).view(len(x), -1, self._head_dim)
        qk, values = qkv.tensor_split([self._num_heads + self._num_kv_heads], dim=1)
        queries, keys = rotation.apply(qk).tensor_split([self._num_heads], dim=1)
        output = plan.attend(layer, queries, keys, values, kv_cache)
        return self._o_proj(output.view(len(x), -1))


class RMSNorm:
    """x / rms(x) * weight (Zhang and Sennrich 2019); float32 inside, rounded before the weight."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self._eps)
        return normed.to(x.dtype) * self._weight


class _Loader:
    def __init__(
        self, checkpoint: DecoderWeights, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._dtype = dtype
        self._device = device

    def layer(self, index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}"
        return DecoderLayer(
            input_norm=self.norm(f"{prefix}.input_layernorm.weight"),
            attention=self._attention(f"{prefix}.self_attn"),
            post_attention_norm=self.norm(f"{prefix}.post_attention_layernorm.weight"),
            feed_forward=self._gate(prefix) if self._config.is_moe else self._dense_mlp(index),
        )

    def tensor(self, name: str, *shape: int) -> Tensor:
        return self._checkpoint.tensor(name, shape).to(self._device, self._dtype)

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.tensor(name, self._config.hidden_size), self._config.rms_norm_eps)

    def _attention(self, prefix: str) -> SelfAttention:
        config = self._config
        hidden_size = config.hidden_size
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        qkv = torch.cat(
            [
                self.tensor(f"{prefix}.q_proj.weight", q_size, hidden_size),
                self.tensor(f"{prefix}.k_proj.weight", kv_size, hidden_size),
                self.tensor(f"{prefix}.v_proj.weight", kv_size, hidden_size),
            ]
        )
        output = self.tensor(f"{prefix}.o_proj.weight", hidden_size, q_size)
        return SelfAttention(self._linear(qkv), self._linear(output), config)

    def _linear(self, weight: Tensor) -> PackedLinear:
        return PackedLinear(weight, dtype=self._dtype, device=self._device)

    def _gate(self, prefix: str) -> TopKGate:
        name = f"{prefix}.block_sparse_moe.gate.weight"
        weight = self.tensor(name, self._config.num_local_experts, self._config.hidden_size)
        return TopKGate(weight, num_experts_per_tok=self._config.num_experts_per_tok)

    def _dense_mlp(self, index: int) -> PackedExpert:
        return PackedExpert(
            self._checkpoint.dense_mlp(index),
            dtype=self._dtype,
            device=self._device,
            hidden_act=self._config.hidden_act,
        )
