"""The sides of the GPU comparison: one decoder over several expert backends, and transformers.

Every side decodes the same tokens over the same keys and values: `context` random ones for each
sequence, as if so many tokens had been prefilled.

Shapes: B sequences, T tokens, V vocab_size, K key-value heads, D head_dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.gpu_weights import HeldWeights
from router_service.dispatch.dispatch_plan import all_assignments, group_by_expert
from router_service.experts import ExpertBackend, StepContext
from router_service.model.batch import ForwardBatch
from router_service.model.decoder import MixtralDecoder
from router_service.model.kv_cache import KVCache
from services.core.cuda.layer import CudaLayer
from services.core.cuda.staging import StagingBuffers
from services.core.expert_ffn import Assignments, MoeInput
from services.core.model_config import ModelConfig
from services.core.registry import Slot

BLOCK_SIZE = 16


class Side(Protocol):
    """`decode` runs steps of B sequences and gives seconds of each; the tokens of the first step
    are the given ones, of later ones the most likely. `prefill` gives the seconds of one prompt.
    Both return the logits float32 [B or 1, V] of their first step too, on the CPU."""

    name: str

    async def decode(self, tokens: Tensor, num_steps: int) -> tuple[list[float], Tensor]: ...
    async def prefill(self, tokens: Tensor) -> tuple[float, Tensor]: ...


class PastKeys:
    """The paged KV cache of all our sides, filled with `context` random positions a sequence."""

    def __init__(
        self, config: ModelConfig, device: torch.device, *, context: int, max_tokens: int
    ) -> None:
        """`max_tokens` bounds B x (context + steps) and a prompt's length."""
        self.context = context
        self.cache = KVCache(
            config,
            num_blocks=-(-max_tokens // BLOCK_SIZE) + 1,
            block_size=BLOCK_SIZE,
            dtype=torch.bfloat16,
            device=device,
        )
        generator = torch.Generator(device).manual_seed(1)
        self.cache.tensor.normal_(0.0, 1.0, generator=generator)

    def block_tables(self, num_seqs: int, length: int) -> Tensor:
        """int64 [B, blocks], each sequence with blocks of its own."""
        blocks = -(-length // BLOCK_SIZE)
        tables = torch.arange(num_seqs * blocks, device=self.cache.tensor.device)
        return tables.view(num_seqs, blocks)

    def of_layer(self, layer: int, num_seqs: int, length: int) -> tuple[Tensor, Tensor]:
        """Copies of keys and values [B, K, context, D], as transformers keeps them."""
        slots = self._slots(self.block_tables(num_seqs, length))[:, : self.context]
        shape = (num_seqs, self.context, self.cache.num_kv_heads, self.cache.head_dim)
        keys, values = (
            part.flatten(0, 1).index_select(0, slots.flatten()).view(shape).transpose(1, 2)
            for part in self.cache.tensor[layer]
        )
        return keys.contiguous(), values.contiguous()

    @staticmethod
    def _slots(tables: Tensor) -> Tensor:
        offsets = torch.arange(BLOCK_SIZE, device=tables.device)
        return (tables[:, :, None] * BLOCK_SIZE + offsets).flatten(1)


class DecoderSide:
    """Our decoder over an expert backend."""

    def __init__(
        self, name: str, decoder: MixtralDecoder, experts: ExpertBackend, past: PastKeys
    ) -> None:
        self.name = name
        self.experts = experts
        self._decoder = decoder
        self._past = past

    async def decode(self, tokens: Tensor, num_steps: int) -> tuple[list[float], Tensor]:
        num_seqs, context = len(tokens), self._past.context
        tables = self._past.block_tables(num_seqs, context + num_steps)
        rows = torch.arange(num_seqs, device=self._decoder.device)
        seconds, first_logits = [], torch.empty(0)
        for step in range(num_steps):
            started = time.perf_counter()
            position = context + step
            batch = ForwardBatch(
                token_ids=tokens,
                positions=torch.full_like(tokens, position),
                slot_mapping=tables[:, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE,
                query_start=tuple(range(num_seqs + 1)),
                context_lens=(position + 1,) * num_seqs,
                block_tables=tables,
                sample_rows=rows,
            )
            logits = await self._forward(batch)
            tokens = logits.argmax(-1)
            tokens.tolist()  # what an engine does with them needs them on the host
            seconds.append(time.perf_counter() - started)
            if step == 0:
                first_logits = logits.cpu()
        return seconds, first_logits

    async def prefill(self, tokens: Tensor) -> tuple[float, Tensor]:
        count = len(tokens)
        positions = torch.arange(count, device=self._decoder.device)
        tables = self._past.block_tables(1, count)
        started = time.perf_counter()
        logits = await self._forward(
            ForwardBatch(
                token_ids=tokens,
                positions=positions,
                slot_mapping=tables[0, positions // BLOCK_SIZE] * BLOCK_SIZE
                + positions % BLOCK_SIZE,
                query_start=(0, count),
                context_lens=(count,),
                block_tables=tables,
                sample_rows=positions[-1:],
            )
        )
        logits.argmax(-1).tolist()
        return time.perf_counter() - started, logits.cpu()

    async def _forward(self, batch: ForwardBatch) -> Tensor:
        with torch.inference_mode():
            return await self._decoder.forward(batch, self._past.cache, self.experts, StepContext())


class StagedExperts:
    """An `ExpertBackend` over `CudaLayer`s: whole frames, staged copies of the routing."""

    def __init__(self, layers: Sequence[CudaLayer], device: torch.device, num_experts: int) -> None:
        self._layers = layers
        self._staging = StagingBuffers(device)
        self._num_experts = num_experts

    async def forward(
        self,
        layer: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        context: StepContext,
    ) -> Tensor:
        ids, weights = self._staging.to_host([topk_ids, topk_weights]).wait()
        assigned = all_assignments(group_by_expert(ids, weights, self._num_experts))
        rows, weights = self._staging.to_device([assigned.token_rows, assigned.topk_weights])
        frame = MoeInput(
            hidden_states=hidden_states,
            assignments=Assignments(
                expert_ids=assigned.expert_ids,
                rows_per_expert=assigned.rows_per_expert,
                token_rows=rows,
                topk_weights=weights,
            ),
            combine=True,
        )
        return self._layers[layer].forward_frames([frame])[0]

    async def wait_ready(self) -> None:
        return

    def check_ready(self) -> None:
        return

    def slot_digests(self) -> dict[Slot, bytes]:
        return {}

    async def close(self) -> None:
        return


class TransformersSide:
    """`MixtralForCausalLM` over the same weights, none copied, with its own choice of kernels."""

    def __init__(self, weights: HeldWeights, past: PastKeys, device: torch.device) -> None:
        """Raises `ImportError` where transformers is not installed."""
        import transformers
        from transformers.models.mixtral import modeling_mixtral

        self._past = past
        self._device = device
        self._new_cache: Callable[[], Any] = transformers.DynamicCache
        config = transformers.MixtralConfig(
            **_transformers_fields(weights.config), attn_implementation="sdpa"
        )
        with torch.device("meta"):
            model = modeling_mixtral.MixtralForCausalLM(config)
        model.load_state_dict(_transformers_tensors(weights), strict=True, assign=True)
        # What is no weight (the rotary frequencies) has no values on the meta device.
        model.model.rotary_emb = modeling_mixtral.MixtralRotaryEmbedding(config).to(device)
        self._model = model.eval()
        kernels = getattr(model.config, "_experts_implementation", None) or "its own"
        self.name = f"transformers {transformers.__version__} ({kernels} experts)"

    async def decode(self, tokens: Tensor, num_steps: int) -> tuple[list[float], Tensor]:
        cache = self._new_cache()
        for layer in range(self._model.config.num_hidden_layers):
            length = self._past.context + num_steps
            cache.update(*self._past.of_layer(layer, len(tokens), length), layer)
        seconds, first_logits = [], torch.empty(0)
        for step in range(num_steps):
            started = time.perf_counter()
            logits = self._forward(tokens[:, None], cache, self._past.context + step)
            tokens = logits.argmax(-1)
            tokens.tolist()
            seconds.append(time.perf_counter() - started)
            if step == 0:
                first_logits = logits.float().cpu()
        return seconds, first_logits

    async def prefill(self, tokens: Tensor) -> tuple[float, Tensor]:
        started = time.perf_counter()
        logits = self._forward(tokens[None], self._new_cache(), 0)
        logits.argmax(-1).tolist()
        return time.perf_counter() - started, logits.float().cpu()

    def _forward(self, input_ids: Tensor, cache: Any, start: int) -> Tensor:
        """Logits [B, V] of the last position."""
        positions = torch.arange(start, start + input_ids.shape[1], device=self._device)
        with torch.inference_mode():
            output = self._model(
                input_ids=input_ids,
                position_ids=positions[None].expand(len(input_ids), -1),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = output.logits[:, -1]
        return logits


def _transformers_fields(config: ModelConfig) -> dict[str, Any]:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "num_local_experts",
        "num_experts_per_tok",
        "max_position_embeddings",
        "rms_norm_eps",
        "sliding_window",
        "tie_word_embeddings",
    )
    fields = {name: getattr(config, name) for name in names}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return fields | {"rope_theta": config.rope_theta, "rope_parameters": rope}


def _transformers_tensors(weights: HeldWeights) -> dict[str, Tensor]:
    """The state dict of transformers 5: experts of a layer in one piece, as they are held."""
    config = weights.config
    hidden = config.hidden_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    vocab = (config.vocab_size, hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": vocab,
        "model.norm.weight": (hidden,),
        "lm_head.weight": vocab,
    }
    tensors: dict[str, Tensor] = {}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (q_size, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv_size, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv_size, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, q_size),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
        tensors |= {
            f"{prefix}.mlp.gate.weight": weights.tensor(
                f"{prefix}.block_sparse_moe.gate.weight", (config.num_local_experts, hidden)
            ),
            f"{prefix}.mlp.experts.gate_up_proj": weights.w13[layer],
            f"{prefix}.mlp.experts.down_proj": weights.w2[layer],
        }
    return tensors | {name: weights.tensor(name, shape) for name, shape in shapes.items()}
