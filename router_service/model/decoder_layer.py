"""One decoder layer up to its experts: norm, attention, norm, gate.

Shapes: T tokens, H hidden_size.
"""

from __future__ import annotations

from torch import Tensor

from router_service.model.attention import AttentionPlan, NativeAttentionPlan
from router_service.model.gate import TopKGate
from router_service.model.kv_cache import KVCache
from router_service.model.norm import RMSNorm
from services.core.expert_ffn import PackedExpert
from services.core.kernels.attention_part import Gated, NativeAttentionPart
from services.core.packed_linear import PackedLinear


class DecoderLayer:
    """A dense layer has its FFN, `dense_ffn`, in place of the gate.

    Where all parts are native they are computed in one call, with the same bits.
    """

    def __init__(
        self,
        *,
        input_norm: RMSNorm,
        attention: SelfAttention,
        post_attention_norm: RMSNorm,
        feed_forward: TopKGate | PackedExpert,
        native: bool = True,
    ) -> None:
        self._input_norm = input_norm
        self._attention = attention
        self._post_attention_norm = post_attention_norm
        self._gate = feed_forward if isinstance(feed_forward, TopKGate) else None
        self._dense_ffn = feed_forward if isinstance(feed_forward, PackedExpert) else None
        self._native = self._native_part() if native else None

    def attend(
        self, index: int, x: Tensor, update: Tensor | None, plan: AttentionPlan, kv_cache: KVCache
    ) -> tuple[Tensor, Gated | None]:
        """Add `update` and the attention's output to x [T, H] in place; the rows [T, H] that the
        feed-forward part gets, and of a MoE layer what the gate says."""
        if self._native is not None and isinstance(plan, NativeAttentionPlan):
            return plan.attend_and_gate(self._native, index, x, update, kv_cache)
        h = self._input_norm(x, update)
        h = self._post_attention_norm(x, self._attention(index, h, plan, kv_cache))
        return h, None if self._gate is None else self._gate(h)

    @property
    def native_part(self) -> NativeAttentionPart | None:
        """What comes before the experts as one native call, of a MoE layer that has it."""
        return None if self._gate is None else self._native

    def dense_ffn(self, h: Tensor) -> Tensor:
        """[T, H] -> [T, H], of a layer without experts."""
        assert self._dense_ffn is not None
        return self._dense_ffn.forward(h)

    def _native_part(self) -> NativeAttentionPart | None:
        qkv_proj, o_proj = self._attention.qkv_proj.native, self._attention.o_proj.native
        gate = None if self._gate is None else self._gate.weight
        if qkv_proj is None or o_proj is None:
            return None
        return NativeAttentionPart(
            qkv_proj.library,
            input_norm=self._input_norm.weight,
            qkv_proj=qkv_proj,
            o_proj=o_proj,
            post_attention_norm=self._post_attention_norm.weight,
            eps=self._input_norm.eps,
            gate=gate,
            num_experts_per_tok=0 if self._gate is None else self._gate.num_experts_per_tok,
        )


class SelfAttention:
    """Grouped-query attention (Ainslie et al. 2023): qkv_proj is q, k and v stacked by rows."""

    def __init__(self, qkv_proj: PackedLinear, o_proj: PackedLinear) -> None:
        self.qkv_proj = qkv_proj
        self.o_proj = o_proj

    def __call__(self, layer: int, x: Tensor, plan: AttentionPlan, kv_cache: KVCache) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.o_proj(plan.attend(layer, self.qkv_proj(x), kv_cache))
