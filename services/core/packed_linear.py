"""A linear layer whose weight lies in the layout of the fastest kernel at hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from services.core.kernels.choice import native_kernels_for
from services.core.kernels.matrix import FORMATS_OF_DTYPES, NativeMatrix
from services.core.quantization.arithmetic import multiply_quantized
from services.core.quantization.formats import QuantizedFormat, quantized_bytes
from services.core.quantization.quantized_rows import QuantizedRows
from services.core.quantization.rounding import all_rows, quantized_source
from services.core.row_source import RowSource

_PACKING_ROWS = 16
_PART_ROWS = 64
"""Parts begin at multiples of this, which oneDNN's layouts pad rows to."""


class PackedLinear:
    """rows [R, I] -> rows W^T [R, O], in `dtype`; R may be 0. With `silu`, silu of that.

    `dtype` is that of the weight and of the rows; results are in `out_dtype` where it is given.

    On a CPU the native kernels compute it where they were built (unless `native` is false), and
    a row's bits depend on that row alone; else, with a weight packed by oneDNN for few rows, torch
    does (in bfloat16 1.2 to 1.8 times as fast as `F.linear` at 1 to 32 rows, and no slower at
    512). Both apply silu before the rounding. `F.linear` on CUDA, and on a CPU for a dtype that
    oneDNN lacks there.

    With a `weight_format` the weight is held so: taken as it is from a `QuantizedSource` of that
    format, else quantised. Rows are then quantised too, and torch computes what the kernels
    compute (`services/core/quantization/arithmetic.py`), slowly.

    The unpacked weight is not kept. Native packing takes the weight in parts of a few megabytes.
    oneDNN's needs its memory once more for a moment, or with `part_bytes` about so much: the weight
    is then taken, packed and held in parts of that size.
    """

    def __init__(
        self,
        weight: RowSource,
        *,
        dtype: torch.dtype,
        device: torch.device,
        silu: bool = False,
        part_bytes: int | None = None,
        out_dtype: torch.dtype | None = None,
        native: bool = True,
        weight_format: QuantizedFormat | None = None,
    ) -> None:
        self.out_features, self.in_features = int(weight.shape[0]), int(weight.shape[1])
        self.weight_bytes = self.out_features * self.in_features * dtype.itemsize
        if weight_format is not None:
            self.weight_bytes = quantized_bytes(weight_format, self.out_features, self.in_features)
        self._dtype, self._device = dtype, device
        self._out_dtype = out_dtype or dtype
        self._silu = silu
        self._parts: list[Tensor] = []
        self.native: NativeMatrix | None = None
        library = native_kernels_for(dtype, device) if native else None
        self._quantized: QuantizedRows | None = None
        if library is not None:
            held_as = weight_format or FORMATS_OF_DTYPES[dtype]
            self.native = NativeMatrix.pack(library, weight, weight_format=held_as)
        elif weight_format is not None:
            source = quantized_source(weight, weight_format)
            self._quantized = all_rows(source).to(device)
        else:
            self._is_packed = _has_onednn(dtype, device)
            step = self._rows_of_a_part(part_bytes)
            firsts = range(0, self.out_features, step)
            self._parts = [self._pack(weight[first : first + step]) for first in firsts]

    def __call__(self, rows: Tensor) -> Tensor:
        if self.native is not None:
            return self.native.multiply(rows, silu=self._silu, out_dtype=self._out_dtype)
        if not len(rows):
            return rows.new_empty((0, self.out_features), dtype=self._out_dtype)
        if self._quantized is not None:
            product = multiply_quantized(rows, self._quantized)
            return (F.silu(product) if self._silu else product).to(self._out_dtype)
        products = [self._product(rows, part) for part in self._parts]
        product = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        return product.to(self._out_dtype)

    def _rows_of_a_part(self, part_bytes: int | None) -> int:
        """All parts but the last have as many."""
        num_parts = 1
        if self._is_packed and part_bytes:
            num_parts = -(-self.weight_bytes // part_bytes)
        return -(-self.out_features // (num_parts * _PART_ROWS)) * _PART_ROWS

    def _pack(self, part: Tensor) -> Tensor:
        part = part.to(self._device, self._dtype).contiguous()
        if self._is_packed:
            part = torch.ops.mkldnn._reorder_linear_weight(part, _PACKING_ROWS)
        return part

    def _product(self, rows: Tensor, part: Tensor) -> Tensor:
        if not self._is_packed:
            product = F.linear(rows, part)
            return F.silu(product, inplace=True) if self._silu else product
        result: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            rows, part, None, "swish" if self._silu else "none", [], ""
        )
        return result


def _has_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    has_mkldnn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if device.type != "cpu" or not has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32
