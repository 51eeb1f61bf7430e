"""In which dtype rows travel between shard and worker, and what that rounds.

Every row is rounded by itself, so what reaches an expert does not depend on the rows beside it, on
the number of workers or on who holds what. Experts in process apply the same rounding
(`WireFormat.received`, `WireFormat.answered`) and have the same bits.

Shapes: R rows, H hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.core.errors import ConfigurationError
from services.core.settings import WireDTypeName

_LARGEST_INT8 = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class WireFormat:
    """`activation` is what is computed in, `request` what rows are sent in, `answer` what weighted
    rows come back in."""

    activation: torch.dtype
    request: torch.dtype
    answer: torch.dtype

    @staticmethod
    def of(name: WireDTypeName, activation: torch.dtype) -> WireFormat:
        """Raises `ConfigurationError` where `name` is no use to a model of that dtype."""
        if name == "int8":
            return WireFormat(activation=activation, request=torch.int8, answer=activation)
        if name == "auto" or activation == torch.bfloat16:
            return WireFormat(activation=activation, request=activation, answer=activation)
        if activation == torch.float32:
            return WireFormat(activation=activation, request=torch.bfloat16, answer=torch.bfloat16)
        raise ConfigurationError(
            f"EXPERTFLEET_WIRE_DTYPE=bfloat16 does not go with activations in {activation}: their "
            "range is another and nothing is saved; use auto or int8",
            setting="wire_dtype",
        )

    @property
    def is_plain(self) -> bool:
        """Whether rows travel as they are, both ways."""
        return self.request == self.answer == self.activation

    @property
    def narrows_answers(self) -> bool:
        """Whether answers are rounded on the wire. Sums are then made by who asked, of rounded
        rows, so that they do not depend on which experts share a worker."""
        return self.answer != self.activation

    def received(self, rows: Tensor) -> Tensor:
        """[R, H] in the activation dtype as an expert sees it on the other side of the wire."""
        if self.request == torch.int8:
            return dequantize_rows(*quantize_rows(rows), self.activation)
        return rows.to(self.request).to(self.activation)

    def answered(self, rows: Tensor) -> Tensor:
        """Weighted rows [R, H] in the activation dtype as they are when they have come back."""
        return rows.to(self.answer).to(self.activation)


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Finite [R, H] -> int8 [R, H] and float32 [R]: symmetric, a row's scale is absmax / 127."""
    values = rows.to(torch.float32)
    scales = values.abs().amax(dim=1) / _LARGEST_INT8
    # A row of zeros, or of values so small that their scale is zero, comes out as zeros.
    divisors = scales.masked_fill(scales == 0, 1.0)
    quantized = (values / divisors[:, None]).round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8)
    return quantized.to(torch.int8), scales


def dequantize_rows(quantized: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize_rows`, but for its rounding, in `dtype`."""
    return (quantized.to(torch.float32) * scales[:, None]).to(dtype)
