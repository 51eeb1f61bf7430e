"""A layer call's rows in the form in which they are sent: arrays of plain integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router_service.dispatch.dispatch_plan import DispatchPlan
from services.core.bit_patterns import bit_patterns
from services.core.wire_dtype import WireFormat, quantize_rows


class WireRows:
    """Rows of T tokens, and with int8 their scales.

    Rows that are sent as they are come as `patterns`, their `bit_patterns`.
    """

    __slots__ = ("_scales", "_values", "wire_format")

    def __init__(self, rows: Tensor, patterns: NDArray[Any], wire_format: WireFormat) -> None:
        self.wire_format = wire_format
        self._scales: NDArray[np.float32] | None = None
        self._values = patterns
        if wire_format.request == torch.int8:
            quantized, scales = quantize_rows(rows)
            self._values, self._scales = quantized.numpy(), scales.numpy()
        elif wire_format.request != rows.dtype:
            self._values = bit_patterns(rows.to(wire_format.request))

    @property
    def hidden_size(self) -> int:
        size: int = self._values.shape[1]
        return size

    def select(self, plan: DispatchPlan) -> Sequence[NDArray[Any]]:
        """The rows [t, H] of each frame of the plan."""
        return plan.select(self._values)

    def take(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        """The rows [t, H] of some tokens."""
        return self._values.take(token_ids, axis=0)

    def scales(self, token_ids: NDArray[np.int64]) -> bytes:
        """float32 [t]; empty where rows have none."""
        return b"" if self._scales is None else self._scales[token_ids].tobytes()
