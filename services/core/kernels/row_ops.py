"""What is done to activations between the large products, row by row.

A row's bits depend on that row and the weights alone; AVX2 and AVX-512 give the same.
"""

from __future__ import annotations

import ctypes
from array import array

import torch
from torch import Tensor

from services.core.kernels.library import NativeLibrary

_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1}


def add_rms_norm(
    library: NativeLibrary, x: Tensor, update: Tensor | None, weight: Tensor, eps: float
) -> Tensor:
    """x += update, rounded, in place; then x / rms(x), rounded, times weight, rounded: [R, H].

    `x` and `update` [R, H] and `weight` [H] are contiguous, of one dtype; inside it is float32.
    """
    normed = torch.empty_like(x)
    num_rows, size = x.shape
    rows = ctypes.c_void_p(x.data_ptr())
    library.functions.ef_add_rms_norm(
        rows,
        None if update is None else ctypes.c_void_p(update.data_ptr()),
        ctypes.c_void_p(weight.data_ptr()),
        rows,
        ctypes.c_void_p(normed.data_ptr()),
        ctypes.c_int64(num_rows),
        ctypes.c_int64(size),
        ctypes.c_float(eps),
        ctypes.c_int32(_ELEMENTS[x.dtype]),
    )
    return normed


def topk_gate(
    library: NativeLibrary, x: Tensor, weight: Tensor, num_experts_per_tok: int
) -> tuple[Tensor, Tensor]:
    """x [R, H], weight [E, H] -> topk_ids int64 [R, K], topk_weights float32 [R, K], best first.

    Logits are rounded to the dtype of `x`, the softmax is in float32. Of experts that are equally
    likely the one with the lower id comes first. With a NaN in a row its weights are NaN; its ids
    are distinct all the same.
    """
    num_rows, size = x.shape
    num_experts = weight.shape[0]
    logits = torch.empty((num_rows, num_experts), dtype=torch.float32)
    topk_ids = torch.empty((num_rows, num_experts_per_tok), dtype=torch.int64)
    topk_weights = torch.empty((num_rows, num_experts_per_tok), dtype=torch.float32)
    library.functions.ef_topk_gate(
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_void_p(topk_ids.data_ptr()),
        ctypes.c_void_p(topk_weights.data_ptr()),
        ctypes.c_int64(num_rows),
        ctypes.c_int64(size),
        ctypes.c_int64(num_experts),
        ctypes.c_int64(num_experts_per_tok),
        ctypes.c_int32(_ELEMENTS[x.dtype]),
    )
    return topk_ids, topk_weights


def greedy_tokens(library: NativeLibrary, logits: Tensor) -> tuple[list[int], list[bool]]:
    """Of each row of logits float32 [R, V] the likeliest token, of equals the one with the lowest
    id, and whether the row is finite; the token of one that is not is any."""
    logits = logits.contiguous()
    num_rows, size = logits.shape
    token_ids = array("q", bytes(8 * num_rows))
    is_finite = bytearray(num_rows)
    library.functions.ef_greedy_tokens(
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_int64(num_rows),
        ctypes.c_int64(size),
        ctypes.c_void_p(token_ids.buffer_info()[0]),
        (ctypes.c_uint8 * num_rows).from_buffer(is_finite),
    )
    return token_ids.tolist(), [bool(each) for each in is_finite]
