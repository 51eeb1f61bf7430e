"""Weights in the layout that the native kernels read."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from services.core.kernels.library import NativeLibrary
from services.core.kernels.quantized import pack_quantized_rows, packed_scales_bytes
from services.core.quantization.quantized_rows import QuantizedSource
from services.core.quantization.rounding import quantized_source
from services.core.row_source import RowSource

WeightFormat = Literal["float32", "bf16", "int8", "int4"]
"""Formats of packed weights, by the names that the wire has for them."""

PANEL = 32
"""Outputs of a panel (native/matrix.h); parts of a weight are packed at multiples of it."""

_FORMATS: dict[WeightFormat, int] = {"float32": 0, "bf16": 1, "int8": 2, "int4": 3}
FORMATS_OF_DTYPES: dict[torch.dtype, WeightFormat] = {
    torch.float32: "float32",
    torch.bfloat16: "bf16",
}
"""Those that hold weights as they are."""
_FLOAT_DTYPES = {weight_format: dtype for dtype, weight_format in FORMATS_OF_DTYPES.items()}
ACTIVATIONS = {torch.float32: 0, torch.bfloat16: 1}
"""`Activation` of native/matrix.h."""
_PART_BYTES = 16 << 20
_HUGE_PAGE_BYTES = 2 << 20
_ALIGNMENT = 64


class MatrixStruct(ctypes.Structure):
    """`Matrix` of native/matrix.h."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    )


class NativeMatrix:
    """A weight [O, I], packed. `multiply` gives rows W^T."""

    def __init__(
        self,
        library: NativeLibrary,
        *,
        weight_format: WeightFormat,
        shape: tuple[int, int],
        data: Tensor,
        scales: Tensor | None = None,
    ) -> None:
        """`data` and `scales` are as the format's kernels want them, `packed_memory` say."""
        self.library = library
        self.weight_format: WeightFormat = weight_format
        self.out_features, self.in_features = shape
        self._data, self._scales = data, scales
        self.struct = MatrixStruct(
            format=_FORMATS[weight_format],
            outputs=shape[0],
            inputs=shape[1],
            data=data.data_ptr(),
            scales=None if scales is None else scales.data_ptr(),
        )
        self.address = ctypes.addressof(self.struct)
        self._linear = _declared(library).ef_linear

    @classmethod
    def pack(
        cls,
        library: NativeLibrary,
        weight: RowSource,
        *,
        weight_format: WeightFormat,
        part_bytes: int = _PART_BYTES,
    ) -> NativeMatrix:
        """Take the rows of `weight` in parts, so that little more than the result is held."""
        if weight_format == "int8" or weight_format == "int4":
            return cls._pack_quantized(library, quantized_source(weight, weight_format))
        outputs, inputs = int(weight.shape[0]), int(weight.shape[1])
        functions = _declared(library)
        num_bytes = functions.ef_packed_bytes(_FORMATS[weight_format], outputs, inputs)
        data = packed_memory(num_bytes)
        dtype = _FLOAT_DTYPES[weight_format]
        pack_rows = functions.ef_pack_float32 if dtype.itemsize == 4 else functions.ef_pack_bfloat16
        panel_bytes = num_bytes // max(1, -(-outputs // PANEL))
        for first, rows in _parts(weight, dtype, part_bytes):
            target = data.data_ptr() + first // PANEL * panel_bytes
            pack_rows(rows.data_ptr(), len(rows), inputs, target)
        return cls(library, weight_format=weight_format, shape=(outputs, inputs), data=data)

    @classmethod
    def _pack_quantized(cls, library: NativeLibrary, weight: QuantizedSource) -> NativeMatrix:
        outputs, inputs = int(weight.shape[0]), int(weight.shape[1])
        weight_format = weight.weight_format
        functions = _declared(library)
        data = packed_memory(functions.ef_packed_bytes(_FORMATS[weight_format], outputs, inputs))
        scales = packed_memory(packed_scales_bytes(weight_format, outputs, inputs))
        step = max(1, _PART_BYTES // (4 * inputs * PANEL)) * PANEL
        for first in range(0, outputs, step):
            rows = weight.quantized(slice(first, first + step))
            pack_quantized_rows(library, rows, first, data=data, scales=scales)
        return cls(
            library,
            weight_format=weight_format,
            shape=(outputs, inputs),
            data=data,
            scales=scales,
        )

    def multiply(
        self, rows: Tensor, *, silu: bool = False, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """rows [R, I], float32 or bfloat16 -> [R, O] in their dtype or in `out_dtype`.

        Products are float32 until they are rounded; with `silu`, silu of them is. A row has the
        same bits whatever is computed beside it. Raises `ValueError` for rows of another length.
        """
        if rows.shape[1] != self.in_features:
            raise ValueError(f"rows of {rows.shape[1]}, not of {self.in_features}")
        rows = rows.contiguous()
        dtype = out_dtype or rows.dtype
        out = rows.new_empty((len(rows), self.out_features), dtype=dtype)
        self._linear(
            self.address,
            rows.data_ptr(),
            len(rows),
            ACTIVATIONS[rows.dtype],
            out.data_ptr(),
            ACTIVATIONS[dtype],
            silu,
        )
        return out


def packed_memory(num_bytes: int) -> Tensor:
    """uint8 [num_bytes] of zeros, aligned to 64 bytes; in huge pages as far as it fills them.

    Reading weights from huge pages is up to 1.7 times as fast as from small ones.
    """
    if num_bytes < _HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        memory = torch.zeros(num_bytes + _ALIGNMENT, dtype=torch.uint8)
        return memory[-memory.data_ptr() % _ALIGNMENT :][:num_bytes]
    region = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    memory = torch.frombuffer(region, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE_BYTES
    region.madvise(mmap.MADV_HUGEPAGE, start, num_bytes // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES)
    return memory[start:][:num_bytes]


def _parts(weight: RowSource, dtype: torch.dtype, part_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """First row and rows, contiguous, in whole panels of up to `part_bytes`, or in single ones."""
    outputs, inputs = int(weight.shape[0]), int(weight.shape[1])
    step = max(1, part_bytes // (inputs * dtype.itemsize * PANEL)) * PANEL
    for first in range(0, outputs, step):
        yield first, weight[first : first + step].to("cpu", dtype).contiguous()


@functools.cache
def _declared(library: NativeLibrary) -> ctypes.CDLL:
    functions = library.functions
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    functions.ef_packed_bytes.argtypes = [int32, int64, int64]
    functions.ef_packed_bytes.restype = ctypes.c_size_t
    functions.ef_linear.argtypes = [pointer, pointer, int64, int32, pointer, int32, int32]
    functions.ef_linear.restype = None
    for pack in (functions.ef_pack_float32, functions.ef_pack_bfloat16):
        pack.argtypes = [pointer, int64, int64, pointer]
        pack.restype = None
    return functions
