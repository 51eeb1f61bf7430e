"""Rounding of weights to int8 and int4: symmetric, to the nearest, ties to even.

Shapes: N outputs, K inputs, G groups of `GROUP_SIZE` inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from services.core.kernels.library import native_library
from services.core.kernels.quantized import quantize_natively
from services.core.quantization.formats import GROUP_SIZE, QuantizedFormat
from services.core.quantization.quantized_rows import (
    QuantizedRows,
    QuantizedSource,
    joined,
    num_groups,
    pack_int4,
    stored_format,
)
from services.core.row_source import RowSource

INT4_RANGES = (7.0, 7.25, 7.5, 7.75, 8.0, 8.5, 9.0, 9.5)
"""Where the search puts a group's largest magnitude, in steps of its scale: at 7 nothing is cut,
above 8 the largest values are cut so that the others are finer. The least squared error wins."""

_LEAST_MAGNITUDE = 1e-30
_PART_ELEMENTS = 8 << 20
_CHUNK_ELEMENTS = 1 << 18
"""Values worked on at a time, so that the passes over them find them in the cache."""


def quantize(
    weight: Tensor, weight_format: QuantizedFormat, *, search: bool = True, native: bool = True
) -> QuantizedRows:
    """Quantise rows [N, K] of finite floats on the CPU, each by itself.

    int4 without `search` cuts nothing. The native kernels do it where they were built (unless
    `native` is false), torch does elsewhere, with the same result.
    """
    ranges = INT4_RANGES if search else INT4_RANGES[:1]
    weight = weight.contiguous()
    library = native_library() if native else None
    if library is not None:
        return quantize_natively(library, weight, weight_format, ranges)
    step = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    chunks = [weight[first : first + step] for first in range(0, len(weight), step)]
    parts = [_int8(part) if weight_format == "int8" else _int4(part, ranges) for part in chunks]
    return QuantizedRows(
        weight_format=weight_format,
        num_inputs=int(weight.shape[1]),
        values=torch.cat([values for values, _ in parts]),
        scales=torch.cat([scales for _, scales in parts]),
    )


class QuantizingSource:
    """A `QuantizedSource` that quantises rows as they are taken."""

    def __init__(self, weight: RowSource, weight_format: QuantizedFormat) -> None:
        self.shape = tuple(weight.shape)
        self.weight_format: QuantizedFormat = weight_format
        self._weight = weight

    def quantized(self, rows: slice, /) -> QuantizedRows:
        return quantize(self._weight[rows], self.weight_format)


def quantized_source(
    weight: RowSource | QuantizedSource, weight_format: QuantizedFormat
) -> QuantizedSource:
    """`weight` in that format: as it is stored, or quantised as it is taken."""
    if stored_format(weight) == weight_format:
        return weight  # type: ignore[return-value]
    return QuantizingSource(weight, weight_format)  # type: ignore[arg-type]


def all_rows(source: QuantizedSource) -> QuantizedRows:
    """The whole matrix, taken in parts."""
    num_outputs, num_inputs = source.shape
    step = max(1, _PART_ELEMENTS // num_inputs)
    parts = [source.quantized(slice(first, first + step)) for first in range(0, num_outputs, step)]
    return joined(parts)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values [N, K] of -127 to 127, and scales [N]."""
    weight = weight.to(torch.float32)
    scales = weight.abs().amax(dim=1).clamp_min_(_LEAST_MAGNITUDE).div_(127.0)
    values = weight.div(scales[:, None]).round_().clamp_(-127, 127)
    return values.to(torch.int8), scales


def _int4(weight: Tensor, ranges: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Packed values and scales [N, G] of -8 to 7."""
    num_rows, num_inputs = weight.shape
    padding = num_groups(num_inputs) * GROUP_SIZE - num_inputs
    padded = functional.pad(weight.to(torch.float32), (0, padding))
    groups = padded.view(-1, GROUP_SIZE)
    most = groups.abs().amax(dim=1, keepdim=True).clamp_min_(_LEAST_MAGNITUDE)
    scales = _stored(most / ranges[0])
    if len(ranges) > 1:
        least_error = _squared_error(groups, scales)
        for reach in ranges[1:]:
            candidates = _stored(most / reach)
            errors = _squared_error(groups, candidates)
            is_better = errors < least_error
            scales = torch.where(is_better, candidates, scales)
            least_error = torch.minimum(errors, least_error)
    values = _rounded(groups, scales).to(torch.int8).view(num_rows, -1)
    return pack_int4(values[:, :num_inputs]), scales.view(num_rows, -1).to(torch.bfloat16)


def _stored(scales: Tensor) -> Tensor:
    """As they are after storing, so that rounding makes up for it."""
    return scales.to(torch.bfloat16).to(torch.float32)


def _rounded(groups: Tensor, scales: Tensor) -> Tensor:
    return groups.div(scales).round_().clamp_(-8, 7)


def _squared_error(groups: Tensor, scales: Tensor) -> Tensor:
    """Of each group, [.., 1]; in float64, so that the order of the sum decides nothing."""
    difference = _rounded(groups, scales).mul_(scales).sub_(groups)
    return difference.square_().sum(dim=1, keepdim=True, dtype=torch.float64)
