"""Weights as small integers with scales, and where they come from.

Shapes: N outputs, K inputs, G = ceil(K / 64) groups of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from services.core.quantization.formats import GROUP_SIZE, QuantizedFormat
from services.core.row_source import RowSource

INT4_OFFSET = 8
"""Added to an int4 weight, so that it is stored as 0 to 15."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedRows:
    """Outputs of a weight matrix: weight = integer x scale.

    int8: `values` int8 [N, K], `scales` float32 [N].
    int4: `values` uint8 [N, 4 ceil(K / 8)], two weights in a byte, the first in its low half, each
    with 8 added; `scales` bfloat16 [N, G].
    """

    weight_format: QuantizedFormat
    num_inputs: int
    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.values.shape[0]), self.num_inputs

    def to(self, device: torch.device) -> QuantizedRows:
        return replace(self, values=self.values.to(device), scales=self.scales.to(device))

    def integers(self) -> Tensor:
        """The weights without their scales, int8 [N, K]."""
        if self.weight_format == "int8":
            return self.values
        halves = torch.stack((self.values & 15, self.values >> 4), dim=-1)
        return halves.flatten(1)[:, : self.num_inputs].to(torch.int8) - INT4_OFFSET

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weights [N, K]; products are in float32."""
        integers = self.integers().to(torch.float32)
        if self.weight_format == "int8":
            return (integers * self.scales[:, None]).to(dtype)
        scales = self.scales.to(torch.float32).repeat_interleave(GROUP_SIZE, dim=1)
        return integers.mul_(scales[:, : self.num_inputs]).to(dtype)


def joined(parts: Sequence[QuantizedRows]) -> QuantizedRows:
    """All outputs of parts of one format and number of inputs, in their order."""
    if len(parts) == 1:
        return parts[0]
    return QuantizedRows(
        weight_format=parts[0].weight_format,
        num_inputs=parts[0].num_inputs,
        values=torch.cat([part.values for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
    )


class QuantizedSource(Protocol):
    """A quantised matrix [N, K] that is taken run by run, so it need not be in memory whole."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def weight_format(self) -> QuantizedFormat: ...
    def quantized(self, rows: slice, /) -> QuantizedRows: ...


def num_groups(num_inputs: int) -> int:
    return -(-num_inputs // GROUP_SIZE)


def packed_row_bytes(num_inputs: int) -> int:
    """Bytes of a row of int4 weights: whole words of eight."""
    return -(-num_inputs // 8) * 4


def pack_int4(integers: Tensor) -> Tensor:
    """int8 [N, K] of -8 to 7 -> uint8 [N, 4 ceil(K / 8)] as in `QuantizedRows`.

    Padding is stored as zero bits.
    """
    stored = (integers + INT4_OFFSET).to(torch.uint8)
    padding = 2 * packed_row_bytes(integers.shape[1]) - integers.shape[1]
    stored = functional.pad(stored, (0, padding))
    return stored[:, ::2] | stored[:, 1::2] << 4


def stored_format(weight: RowSource | QuantizedSource) -> QuantizedFormat | None:
    """The format of a `QuantizedSource`; None for floats."""
    return getattr(weight, "weight_format", None)


class JoinedRows:
    """Matrices of as many inputs, one below the other: a `RowSource`, and a `QuantizedSource` of
    `weight_format` where all are."""

    def __init__(self, parts: Sequence[RowSource]) -> None:
        self.shape = (sum(int(part.shape[0]) for part in parts), int(parts[0].shape[1]))
        formats = {stored_format(part) for part in parts}
        self.weight_format: QuantizedFormat | None = formats.pop() if len(formats) == 1 else None
        self._parts = parts

    def __getitem__(self, rows: slice, /) -> Tensor:
        return torch.cat([part[wanted] for part, wanted in self._wanted(rows)])

    def quantized(self, rows: slice, /) -> QuantizedRows:
        assert self.weight_format is not None
        return joined(
            [part.quantized(wanted) for part, wanted in self._wanted(rows)]  # type: ignore[attr-defined]
        )

    def _wanted(self, rows: slice) -> Iterator[tuple[RowSource, slice]]:
        """The parts that have some of the rows, with those rows."""
        first, stop, _ = rows.indices(self.shape[0])
        for part in self._parts:
            num_rows = int(part.shape[0])
            if first < num_rows and stop > 0:
                yield part, slice(max(first, 0), min(stop, num_rows))
            first, stop = first - num_rows, stop - num_rows
