"""Attention straight from a paged KV cache, with rotary embedding and the cache's writes before it.

The bits of a query's result depend on that query, its own keys and values, and the instruction set
alone (AVX2 and AVX-512 agree in float32; bf16 is multiplied by the processor where it has bf16
products): not on what else is in the step, on how a prompt is cut into chunks, or on threads.

Shapes: T tokens, B sequences, H query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from services.core.kernels.library import NativeLibrary

MAX_HEAD_DIM = 256
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1}


def supports_attention(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Whether `NativeAttention` computes this; head_dim must be a multiple of 8 up to 256."""
    has_shape = head_dim % 8 == 0 and 0 < head_dim <= MAX_HEAD_DIM
    return device.type == "cpu" and dtype in _ELEMENTS and has_shape


class StepArguments(ctypes.Structure):
    """`ef_attention_step` of native/attention_step.h."""

    _fields_ = (
        ("num_tokens", ctypes.c_int64),
        ("num_seqs", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("table_width", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("positions", ctypes.c_void_p),
        ("slot_mapping", ctypes.c_void_p),
        ("query_start", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("element", ctypes.c_int32),
    )


class NativeAttention:
    """The attention of one step, for all of its layers; keeps the tensors that it points to."""

    def __init__(
        self,
        library: NativeLibrary,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        sliding_window: int | None,
        positions: Tensor,
        slot_mapping: Tensor,
        query_start: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        """`positions`, `slot_mapping` int64 [T]; `query_start` [B + 1]; `context_lens` [B];
        `block_tables` int64 [B, blocks]; all contiguous on the CPU. `cos`, `sin` [positions, D] in
        the activation dtype, the first half of a sine's row negated.
        """
        self._rotate_and_store = library.functions.ef_rotate_and_store
        self._attend = library.functions.ef_attend
        self._output_width = num_heads * head_dim
        self._scratch = torch.empty(0, dtype=torch.uint8)
        num_seqs = len(context_lens)
        starts = (ctypes.c_int64 * (num_seqs + 1))(*query_start)
        lengths = (ctypes.c_int64 * num_seqs)(*context_lens)
        self._kept = (positions, slot_mapping, starts, lengths, block_tables, cos, sin)
        self._step = StepArguments(
            num_tokens=query_start[-1],
            num_seqs=num_seqs,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            table_width=block_tables.shape[1],
            window=sliding_window or 0,
            positions=positions.data_ptr(),
            slot_mapping=slot_mapping.data_ptr(),
            query_start=ctypes.addressof(starts),
            context_lens=ctypes.addressof(lengths),
            block_tables=block_tables.data_ptr(),
            cosines=cos.data_ptr(),
            sines=sin.data_ptr(),
            scale=head_dim**-0.5,
            element=_ELEMENTS[cos.dtype],
        )
        self.address = ctypes.addressof(self._step)
        self._step_pointer = ctypes.c_void_p(self.address)

    def scratch(self, bytes_per_token: int) -> Tensor:
        """Memory for one layer at a time, uint8, at least T * bytes_per_token."""
        num_bytes = self._step.num_tokens * bytes_per_token
        if len(self._scratch) < num_bytes:
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8)
        return self._scratch

    def rotate_and_store(self, qkv: Tensor, keys: Tensor, values: Tensor) -> None:
        """Rotate queries and keys of `qkv` [T, (H + 2K) * D] in place, with the roundings of
        `Rotation.apply`, and write keys and values to their slots of the layer's cache.

        `keys` and `values` are [slots, K, D], contiguous.
        """
        self._rotate_and_store(self._step_pointer, _pointer(qkv), _pointer(keys), _pointer(values))

    def attend(self, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The attention of the rotated queries over their sequences' keys: [T, H * D]."""
        output = qkv.new_empty((qkv.shape[0], self._output_width))
        self._attend(
            self._step_pointer,
            _pointer(qkv),
            _pointer(keys),
            _pointer(values),
            _pointer(output),
        )
        return output


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
