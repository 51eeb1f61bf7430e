"""The product of activations and quantised weights as the native kernels define it, in torch.

`native/quantized.h` states the arithmetic. Here it serves where the kernels were not built, and as
their oracle: the integers are the same, and sums differ by a rounding at most (a fused multiply-add
is emulated in float64, which rounds twice).

Shapes: R rows, N outputs, K inputs, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from services.core.quantization.formats import GROUP_SIZE
from services.core.quantization.quantized_rows import QuantizedRows, num_groups

_LEAST_MAGNITUDE = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedActivations:
    """`values` float32 [R, G, 64], integers of -127 to 127; `scales` float32 [R, G].

    The scale of a group that holds a NaN or an infinity is NaN, and its values are 0.
    """

    values: Tensor
    scales: Tensor


def quantize_activations(rows: Tensor) -> QuantizedActivations:
    """Rows [R, K] of floats, each group by itself: its largest magnitude becomes 127."""
    padding = num_groups(rows.shape[1]) * GROUP_SIZE - rows.shape[1]
    padded = functional.pad(rows.to(torch.float32), (0, padding))
    groups = padded.view(rows.shape[0], -1, GROUP_SIZE)
    most = groups.abs().amax(dim=2)
    is_finite = torch.isfinite(most)
    has_values = is_finite & (most >= _LEAST_MAGNITUDE)
    scales = torch.where(has_values, most / 127.0, 0.0)
    scales = torch.where(is_finite, scales, float("nan"))
    # A scalar divided by a tensor would be a multiplied reciprocal, which rounds twice.
    factors = torch.where(has_values, torch.full_like(most, 127.0) / most, 0.0)
    values = torch.where(has_values[:, :, None], (groups * factors[:, :, None]).round_(), 0.0)
    return QuantizedActivations(values=values, scales=scales)


def multiply_quantized(rows: Tensor, weight: QuantizedRows) -> Tensor:
    """rows [R, K] W^T in float32, [R, N]; a row's bits do not depend on those beside it.

    A group's integers are exact in float32: 64 products of at most 127 x 128 are below 2^24.
    """
    activations = quantize_activations(rows)
    integers = weight.integers()
    totals = torch.zeros(rows.shape[0], integers.shape[0], device=rows.device)
    for group in range(activations.scales.shape[1]):
        inputs = integers[:, group * GROUP_SIZE : (group + 1) * GROUP_SIZE].to(torch.float32)
        products = functional.linear(activations.values[:, group, : inputs.shape[1]], inputs)
        factors = activations.scales[:, group, None]
        if weight.weight_format == "int4":
            factors = factors * weight.scales[None, :, group].to(torch.float32)
        totals = _fused_multiply_add(products, factors, totals)
    return totals * weight.scales if weight.weight_format == "int8" else totals


def _fused_multiply_add(product: Tensor, factor: Tensor, total: Tensor) -> Tensor:
    exact = product.to(torch.float64) * factor.to(torch.float64)
    return exact.add_(total).to(torch.float32)
