"""What of a decoder layer comes before its experts, in one native call.

The bits are those of the kernels one by one. Each call from Python starts cold, as the experts'
weights have passed through every cache since the layer before; with one row seven of them took
longer than reading the weights.

Shapes: T tokens, H hidden_size, E experts, K experts per token.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from services.core.kernels.attention import NativeAttention
from services.core.kernels.library import NativeLibrary
from services.core.kernels.matrix import NativeMatrix

Gated = tuple[Tensor, Tensor]
"""topk_ids int64 [T, K], topk_weights float32 [T, K]."""

_LOGIT_BYTES = 4


class AttentionPartStruct(ctypes.Structure):
    """`ef_attention_part` of native/attention_part.h."""

    _fields_ = (
        ("input_norm", ctypes.c_void_p),
        ("post_attention_norm", ctypes.c_void_p),
        ("qkv_proj", ctypes.c_void_p),
        ("o_proj", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("num_experts", ctypes.c_int64),
        ("num_experts_per_tok", ctypes.c_int64),
        ("eps", ctypes.c_float),
    )


class NativeAttentionPart:
    """Attention between its two norms, and the gate; without a `gate` that of a dense layer.

    `address` is that of native/attention_part.h's struct, `scratch_bytes` what a call needs by
    token.
    """

    def __init__(
        self,
        library: NativeLibrary,
        *,
        input_norm: Tensor,
        qkv_proj: NativeMatrix,
        o_proj: NativeMatrix,
        post_attention_norm: Tensor,
        eps: float,
        gate: Tensor | None,
        num_experts_per_tok: int,
    ) -> None:
        """Norms [H] and `gate` [E, H] are contiguous, in the dtype of the activations. Without a
        gate `num_experts_per_tok` is 0."""
        self._held = (input_norm, qkv_proj, o_proj, post_attention_norm, gate)
        self._num_experts = 0 if gate is None else len(gate)
        self.num_experts_per_tok = num_experts_per_tok
        width = qkv_proj.out_features + o_proj.in_features + qkv_proj.in_features
        self.scratch_bytes = width * input_norm.itemsize + _LOGIT_BYTES * self._num_experts
        self._struct = AttentionPartStruct(
            input_norm=input_norm.data_ptr(),
            post_attention_norm=post_attention_norm.data_ptr(),
            qkv_proj=qkv_proj.address,
            o_proj=o_proj.address,
            gate=None if gate is None else gate.data_ptr(),
            num_experts=self._num_experts,
            num_experts_per_tok=self.num_experts_per_tok,
            eps=eps,
        )
        self.address = ctypes.addressof(self._struct)
        self._forward = _declared(library).ef_attention_part_forward

    def __call__(
        self,
        x: Tensor,
        update: Tensor | None,
        attention: NativeAttention,
        keys: Tensor,
        values: Tensor,
    ) -> tuple[Tensor, Gated | None]:
        """Add `update` and the attention's output to x [T, H] in place; the norm of that [T, H],
        and what the gate says.

        `keys` and `values` [slots, heads, head_dim] are the layer's cache, written to first.
        """
        num_rows = len(x)
        normed = torch.empty_like(x)
        topk_ids = torch.empty((num_rows, self.num_experts_per_tok), dtype=torch.int64)
        topk_weights = torch.empty((num_rows, self.num_experts_per_tok), dtype=torch.float32)
        if update is not None:
            update = update.contiguous()
        self._forward(
            self.address,
            attention.address,
            x.data_ptr(),
            None if update is None else update.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            normed.data_ptr(),
            attention.scratch(self.scratch_bytes).data_ptr(),
            topk_ids.data_ptr(),
            topk_weights.data_ptr(),
        )
        return normed, (topk_ids, topk_weights) if self._num_experts else None


class LayerAttention(NamedTuple):
    """What a MoE layer's attention works with: keys and values are its cache, [slots, heads,
    head_dim]."""

    part: NativeAttentionPart
    keys: Tensor
    values: Tensor


@functools.cache
def _declared(library: NativeLibrary) -> ctypes.CDLL:
    functions = library.functions
    functions.ef_attention_part_forward.argtypes = [ctypes.c_void_p] * 10
    functions.ef_attention_part_forward.restype = None
    return functions
