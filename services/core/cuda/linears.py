"""Linear layers whose weights stay in 16, 8 or 4 bit on the device.

Each is called with rows [R, I] in the activation dtype and gives rows W^T [R, O] in it; R may be 0.
`dequantised` is the weight [O, I] in float32 that the product stands for: the oracle of tests.
Where the device has no product in the format (`DeviceSupport`), or the widths do not suit it, the
weight is dequantised to the activation dtype for each product: as small, but slower.

Shapes: R rows, I in_features, O out_features, G columns of a group.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from services.core.cuda.device_support import DeviceSupport
from services.core.errors import ConfigurationError

WeightFormat = Literal["bf16", "fp8", "int8", "int4"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("bf16", "fp8", "int8", "int4")

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_FP8_ROWS = 16
_INT8_MAX = 127.0
_INT8_ROWS = 32
"""cuBLASLt's int8 product takes more than 16 rows, a multiple of 8 of them."""
_INT4_INNER_TILES = 8
_INT4_COLUMNS = 16 * _INT4_INNER_TILES
INT4_GROUP = 128
_TINY = 1e-12


class CudaLinear(Protocol):
    weight_bytes: int

    def __call__(self, rows: Tensor) -> Tensor: ...
    def dequantised(self) -> Tensor: ...


def make_linear(weight: Tensor, weight_format: WeightFormat, support: DeviceSupport) -> CudaLinear:
    """`weight` [O, I] in the activation dtype, on the device that computes.

    A bf16 linear keeps `weight` itself. Raises `ConfigurationError` for an unknown format, or int4
    of a width that its groups do not divide.
    """
    if weight_format == "bf16":
        return PlainLinear(weight)
    if weight_format == "fp8":
        return Fp8Linear(weight, support)
    if weight_format == "int8":
        return Int8Linear(weight, support)
    if weight_format == "int4":
        return Int4Linear(weight, support)
    raise ConfigurationError(
        f"weight format {weight_format!r} is not served; {', '.join(WEIGHT_FORMATS)} are",
        setting="weight_format",
    )


class PlainLinear:
    """The activation dtype itself, whichever it is."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.weight_bytes = weight.nbytes

    def __call__(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight)

    def dequantised(self) -> Tensor:
        return self.weight.float()


class Fp8Linear:
    """e4m3 with a float32 scale per output channel; rows are scaled and rounded one by one.

    So no calibration is needed and a row's values do not depend on the rows beside it.
    """

    def __init__(self, weight: Tensor, support: DeviceSupport) -> None:
        self._dtype = weight.dtype
        self._quantised, self._scales = _to_fp8(weight)
        self._channel_scales = self._scales.view(1, -1)
        self._is_native = (
            support.fp8
            and weight.dtype == torch.bfloat16
            and all(size % 16 == 0 for size in weight.shape)
        )
        self.weight_bytes = self._quantised.nbytes + self._scales.nbytes

    def __call__(self, rows: Tensor) -> Tensor:
        if not self._is_native or not len(rows):
            return F.linear(rows, self.dequantised().to(self._dtype))
        quantised, scales = _to_fp8(_padded(rows, _FP8_ROWS))
        product: Tensor = torch._scaled_mm(
            quantised,
            self._quantised.t(),
            scale_a=scales,
            scale_b=self._channel_scales,
            out_dtype=self._dtype,
        )
        return product[: len(rows)]

    def dequantised(self) -> Tensor:
        return self._quantised.float() * self._scales


class Int8Linear:
    """Symmetric int8 with a float32 scale per output channel, rows likewise one by one.

    torch's weight-only int8 product on CUDA works an element a thread without tensor cores, so
    rows are rounded to 8 bit too, and the sums are exact in int32.
    """

    def __init__(self, weight: Tensor, support: DeviceSupport) -> None:
        self._dtype = weight.dtype
        self._quantised, self._scales = _to_int8(weight)
        self._channel_scales = self._scales.view(1, -1)
        self._is_native = support.int8 and all(size % 16 == 0 for size in weight.shape)
        self.weight_bytes = self._quantised.nbytes + self._scales.nbytes

    def __call__(self, rows: Tensor) -> Tensor:
        if not self._is_native or not len(rows):
            return F.linear(rows, self.dequantised().to(self._dtype))
        quantised, scales = _to_int8(_padded(rows, _INT8_ROWS))
        sums = torch._int_mm(quantised, self._quantised.t())
        product = (sums * scales).mul_(self._channel_scales).to(self._dtype)
        return product[: len(rows)]

    def dequantised(self) -> Tensor:
        return self._quantised.float() * self._scales


class Int4Linear:
    """Weight-only int4 in groups of 128 columns, each with a scale and a least value in bf16."""

    def __init__(self, weight: Tensor, support: DeviceSupport) -> None:
        out_features, in_features = weight.shape
        if in_features % INT4_GROUP:
            raise ConfigurationError(
                f"int4 weights have groups of {INT4_GROUP} columns, which do not divide "
                f"{in_features}; choose another weight format",
                setting="weight_format",
            )
        self._dtype = weight.dtype
        self._is_native = (
            support.int4
            and weight.dtype == torch.bfloat16
            and out_features % 8 == 0
            and in_features % _INT4_COLUMNS == 0
        )
        values, self._scales, self._middles = _to_int4(weight)
        pairs = values.view(out_features, -1, 2)
        # The first of two neighbours lies in the upper half of their byte.
        self._packed = pairs[..., 0] << 4 | pairs[..., 1]
        self._scales_and_middles = None
        if self._is_native:
            self._packed = torch.ops.aten._convert_weight_to_int4pack(
                self._packed.contiguous(), _INT4_INNER_TILES
            )
            both = torch.stack((self._scales, self._middles), dim=-1)
            self._scales_and_middles = both.transpose(0, 1).contiguous()
        self.weight_bytes = self._packed.nbytes + 2 * self._scales.nbytes

    def __call__(self, rows: Tensor) -> Tensor:
        if self._scales_and_middles is None or not len(rows):
            return F.linear(rows, self.dequantised().to(self._dtype))
        product: Tensor = torch.ops.aten._weight_int4pack_mm(
            rows, self._packed, INT4_GROUP, self._scales_and_middles
        )
        return product

    def dequantised(self) -> Tensor:
        if self._scales_and_middles is not None:
            # The kernel's own layout is not undone; the product with the identity is the weight.
            identity = torch.eye(
                self._scales.shape[1] * INT4_GROUP, dtype=self._dtype, device=self._packed.device
            )
            return self(identity).t().float()
        values = torch.stack((self._packed >> 4, self._packed & 15), dim=-1)
        grouped = values.view(*self._scales.shape, INT4_GROUP).float()
        weight = (grouped - 8) * self._scales[..., None].float() + self._middles[..., None].float()
        return weight.flatten(1)


def _to_fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and float32 scales [rows, 1] whose product is about `matrix`."""
    scales = matrix.abs().amax(dim=1, keepdim=True).float().clamp_(min=_TINY).div_(_FP8_MAX)
    return (matrix / scales).clamp_(-_FP8_MAX, _FP8_MAX).to(_FP8), scales


def _to_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and float32 scales [rows, 1] whose product is about `matrix`."""
    scales = matrix.abs().amax(dim=1, keepdim=True).float().clamp_(min=_TINY).div_(_INT8_MAX)
    return (matrix / scales).round_().to(torch.int8), scales


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 values 0 to 15 [O, I], bf16 scales and middles [O, I / G]: what value 8 stands for.

    Rounded against the scale and middle as they are kept, so that their own rounding costs less.
    """
    groups = weight.float().view(len(weight), -1, INT4_GROUP)
    least, most = groups.aminmax(dim=-1)
    scales = ((most - least) / 15).clamp_(min=_TINY).to(torch.bfloat16)
    middles = (least + 8 * scales.float()).to(torch.bfloat16)
    values = (groups - middles.float()[..., None]) / scales.float()[..., None]
    return (
        values.round_().add_(8).clamp_(0, 15).to(torch.uint8).view(weight.shape),
        scales,
        middles,
    )


def _padded(rows: Tensor, multiple: int) -> Tensor:
    """Rows of zeros added up to the next multiple: kernels ask for it, and weights are read once
    however few rows there are."""
    missing = -len(rows) % multiple
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows
