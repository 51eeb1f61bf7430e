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

from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from router_service.experts import ExpertBackend, RunsLayers, StepContext, StepLayers
from router_service.model.attention import AttentionPlan, NativeAttentionPlan, plan_attention
from router_service.model.batch import ForwardBatch
from router_service.model.decoder_layer import DecoderLayer, SelfAttention
from router_service.model.gate import TopKGate
from router_service.model.kv_cache import KVCache
from router_service.model.norm import RMSNorm
from router_service.model.rotary import RotaryTable
from services.core.expert_ffn import FfnWeights, PackedExpert
from services.core.kernels.attention_part import LayerAttention
from services.core.model_config import ModelConfig
from services.core.packed_linear import PackedLinear
from services.core.quantization.formats import WeightsSetting, chosen_format
from services.core.quantization.quantized_rows import JoinedRows, stored_format
from services.core.row_source import RowSource


class DecoderWeights(Protocol):
    """Where the decoder's tensors come from, under the names of Hugging Face's checkpoints."""

    @property
    def config(self) -> ModelConfig: ...
    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor: ...
    def rows_of(self, name: str, shape: tuple[int, int]) -> RowSource: ...
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
        self._layer_attention: tuple[KVCache, list[LayerAttention] | None] | None = None
        self._rotary = RotaryTable(config, dtype=self.dtype, device=self.device)

    @classmethod
    def load(
        cls,
        checkpoint: DecoderWeights,
        *,
        dtype: torch.dtype,
        device: torch.device,
        shard_weights: WeightsSetting = "auto",
    ) -> MixtralDecoder:
        """Read all tensors but the experts' (of a dense model also its FFNs).

        `shard_weights` says what all matrices but embedding and gate are held as; auto: as they
        are stored.
        """
        loader = _Loader(checkpoint, dtype, device, shard_weights)
        config = checkpoint.config
        vocab_shape = (config.vocab_size, config.hidden_size)
        embedding = loader.tensor("model.embed_tokens.weight", *vocab_shape)
        tied = config.tie_word_embeddings
        head = embedding if tied else checkpoint.rows_of("lm_head.weight", vocab_shape)
        return cls(
            config=config,
            embedding=embedding,
            layers=[loader.layer(index) for index in range(config.num_hidden_layers)],
            norm=loader.norm("model.norm.weight"),
            lm_head=loader.linear(head, out_dtype=torch.float32),
        )

    async def forward(
        self, batch: ForwardBatch, kv_cache: KVCache, experts: ExpertBackend, context: StepContext
    ) -> Tensor:
        """Logits float32 [R, V] of `batch.sample_rows`; fills the batch's slots of `kv_cache`.

        Awaits nothing but `experts`. Raises what `experts` raises. Non-finite values pass through.
        """
        plan = plan_attention(
            batch,
            kv_cache,
            num_heads=self.config.num_attention_heads,
            sliding_window=self.config.sliding_window,
            rotation=self._rotary.rotation(max(batch.context_lens)),
        )
        x = F.embedding(batch.token_ids, self._embedding)
        update: Tensor | None = None  # is added to x by the layer that comes next
        native_layers = self._native_layers(plan, kv_cache)
        index = 0
        while index < len(self._layers):
            if native_layers is not None and update is not None and isinstance(experts, RunsLayers):
                done = await experts.forward_layers(index, native_layers, x, update, context)
                if done is not None:
                    index, update = done.next_layer, done.update
                    continue
                native_layers = None
            layer = self._layers[index]
            h, gated = layer.attend(index, x, update, plan, kv_cache)
            if gated is None:
                update = layer.dense_ffn(h)
            else:
                update = await experts.forward(index, h, *gated, context)
            index += 1
        assert update is not None
        rows = batch.sample_rows
        h = self._norm(x.index_select(0, rows), update.index_select(0, rows))
        return self._lm_head(h)

    def _native_layers(self, plan: AttentionPlan, kv_cache: KVCache) -> StepLayers | None:
        """None where not all layers are native."""
        if not isinstance(plan, NativeAttentionPlan):
            return None
        if self._layer_attention is None or self._layer_attention[0] is not kv_cache:
            parts = [layer.native_part for layer in self._layers]
            attention = [
                LayerAttention(part, *kv_cache.by_slot(index))
                for index, part in enumerate(parts)
                if part is not None
            ]
            self._layer_attention = kv_cache, attention if len(attention) == len(parts) else None
        layers = self._layer_attention[1]
        return None if layers is None else StepLayers(layers, plan.attention)


class _Loader:
    def __init__(
        self,
        checkpoint: DecoderWeights,
        dtype: torch.dtype,
        device: torch.device,
        shard_weights: WeightsSetting,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._dtype = dtype
        self._device = device
        self._shard_weights: WeightsSetting = shard_weights

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
        rows_of = self._checkpoint.rows_of
        qkv = JoinedRows(
            [
                rows_of(f"{prefix}.q_proj.weight", (q_size, hidden_size)),
                rows_of(f"{prefix}.k_proj.weight", (kv_size, hidden_size)),
                rows_of(f"{prefix}.v_proj.weight", (kv_size, hidden_size)),
            ]
        )
        output = rows_of(f"{prefix}.o_proj.weight", (hidden_size, q_size))
        return SelfAttention(self.linear(qkv), self.linear(output))

    def linear(self, weight: RowSource, out_dtype: torch.dtype | None = None) -> PackedLinear:
        return PackedLinear(
            weight,
            dtype=self._dtype,
            device=self._device,
            out_dtype=out_dtype,
            weight_format=chosen_format(self._shard_weights, stored_format(weight)),
        )

    def _gate(self, prefix: str) -> TopKGate:
        name = f"{prefix}.block_sparse_moe.gate.weight"
        weight = self.tensor(name, self._config.num_local_experts, self._config.hidden_size)
        return TopKGate(weight, num_experts_per_tok=self._config.num_experts_per_tok)

    def _dense_mlp(self, index: int) -> PackedExpert:
        weights = self._checkpoint.dense_mlp(index)
        return PackedExpert(
            weights,
            dtype=self._dtype,
            device=self._device,
            hidden_act=self._config.hidden_act,
            quantized=chosen_format(self._shard_weights, stored_format(weights.w1)),
        )
