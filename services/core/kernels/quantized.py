"""Quantising weights and packing them, natively."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from services.core.kernels.library import NativeLibrary
from services.core.quantization.formats import QuantizedFormat
from services.core.quantization.quantized_rows import (
    QuantizedRows,
    num_groups,
    packed_row_bytes,
)

_FORMATS: dict[QuantizedFormat, int] = {"int8": 2, "int4": 3}
_ACTIVATIONS = {torch.float32: 0, torch.bfloat16: 1}
_PANEL = 32


def quantize_natively(
    library: NativeLibrary,
    weight: Tensor,
    weight_format: QuantizedFormat,
    ranges: tuple[float, ...],
) -> QuantizedRows:
    """`rounding.quantize` of contiguous rows on the CPU."""
    if weight.dtype not in _ACTIVATIONS:
        weight = weight.to(torch.float32)
    num_rows, num_inputs = weight.shape
    if weight_format == "int8":
        values = torch.empty((num_rows, num_inputs), dtype=torch.int8)
        scales = torch.empty(num_rows, dtype=torch.float32)
    else:
        values = torch.empty((num_rows, packed_row_bytes(num_inputs)), dtype=torch.uint8)
        scales = torch.empty((num_rows, num_groups(num_inputs)), dtype=torch.bfloat16)
    _declared(library).ef_quantize(
        _FORMATS[weight_format],
        weight.data_ptr(),
        _ACTIVATIONS[weight.dtype],
        num_rows,
        num_inputs,
        values.data_ptr(),
        values.stride(0),
        scales.data_ptr(),
        (ctypes.c_float * len(ranges))(*ranges),
        len(ranges),
    )
    return QuantizedRows(
        weight_format=weight_format, num_inputs=num_inputs, values=values, scales=scales
    )


def packed_scales_bytes(weight_format: QuantizedFormat, num_outputs: int, num_inputs: int) -> int:
    """Bytes of the scales of a packed weight: of whole panels."""
    outputs = -(-num_outputs // _PANEL) * _PANEL
    return outputs * 4 if weight_format == "int8" else outputs * 2 * num_groups(num_inputs)


def pack_quantized_rows(
    library: NativeLibrary, rows: QuantizedRows, first: int, *, data: Tensor, scales: Tensor
) -> None:
    """Bring outputs `first` and those after it to their places in the packed weight.

    `first` is a multiple of the panel's 32 outputs. `data` and `scales` are uint8, the whole
    packed weight of `ef_packed_bytes` and `packed_scales_bytes`, zero where nothing was packed.
    """
    functions = _declared(library)
    num_rows, num_inputs = rows.shape
    values, row_scales = rows.values.contiguous(), rows.scales.contiguous()
    if rows.weight_format == "int8":
        functions.ef_pack_int8(values.data_ptr(), first, num_rows, num_inputs, data.data_ptr())
        packed = scales.view(torch.float32)
        packed[first : first + num_rows] = row_scales
        return
    functions.ef_pack_int4(
        values.data_ptr(),
        values.stride(0),
        row_scales.data_ptr(),
        first,
        num_rows,
        num_inputs,
        data.data_ptr(),
        scales.data_ptr(),
    )


@functools.cache
def _declared(library: NativeLibrary) -> ctypes.CDLL:
    functions = library.functions
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    functions.ef_quantize.argtypes = [
        *(int32, pointer, int32, int64, int64),
        *(pointer, int64, pointer, pointer, int64),
    ]
    functions.ef_pack_int8.argtypes = [pointer, int64, int64, int64, pointer]
    functions.ef_pack_int4.argtypes = [
        *(pointer, int64, pointer, int64, int64, int64, pointer, pointer),
    ]
    for function in (functions.ef_quantize, functions.ef_pack_int8, functions.ef_pack_int4):
        function.restype = None
    return functions
