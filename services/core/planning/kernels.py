"""How long a device takes to multiply rows by weights: from data sheet figures, or as measured.

Shapes: any; times are elementwise over an array of row counts. No rows take no time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

COMPUTE_BOUND_FROM = 2.0
"""A measured kernel counts as bound by arithmetic where a row count costs so many times what
reading the weights costs."""


class Kernel(Protocol):
    """The matrix products of one expert, or of one layer's attention."""

    def time_s(self, weight_bytes: float, num_weights: float, rows: ArrayLike) -> Floats:
        """Seconds for each entry of `rows`; never falls with rows or bytes."""
        ...

    def is_compute_bound(self, weight_bytes: float, num_weights: float, rows: float) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """launch_s + max(weight_bytes / bandwidth, 2 x weights x rows / flops) (Williams et al. 2009).

    `bandwidth` and `flops` are what kernels reach, not peaks; `launch_s` is per call.
    """

    bandwidth: float
    flops: float
    launch_s: float

    def time_s(self, weight_bytes: float, num_weights: float, rows: ArrayLike) -> Floats:
        count = np.asarray(rows, dtype=np.float64)
        busy = np.maximum(weight_bytes / self.bandwidth, 2 * num_weights * count / self.flops)
        return np.where(count > 0, self.launch_s + busy, 0.0)

    def is_compute_bound(self, weight_bytes: float, num_weights: float, rows: float) -> bool:
        return 2 * num_weights * rows / self.flops > weight_bytes / self.bandwidth


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredKernel:
    """fixed(r) + bytes x s(1) + bf16 bytes x (s(r) - s(1)), linear between measured row counts.

    `rows` ascend from 1; `fixed_s` is per call, `s_per_byte` per byte of bfloat16 weights. Beyond
    the last row count both go on as they grew before it. The first term in s is reading, which
    fewer bits make cheaper; the second is arithmetic, which they do not.
    """

    rows: tuple[float, ...]
    fixed_s: tuple[float, ...]
    s_per_byte: tuple[float, ...]

    def time_s(self, weight_bytes: float, num_weights: float, rows: ArrayLike) -> Floats:
        count = np.asarray(rows, dtype=np.float64)
        reading = self.s_per_byte[0]
        arithmetic = np.maximum(self._at(self.s_per_byte, count) - reading, 0.0)
        busy = weight_bytes * reading + 2 * num_weights * arithmetic
        return np.where(count > 0, self._at(self.fixed_s, count) + busy, 0.0)

    def is_compute_bound(self, weight_bytes: float, num_weights: float, rows: float) -> bool:
        at_rows = self._at(self.s_per_byte, np.asarray(float(rows)))
        arithmetic = 2 * num_weights * (float(at_rows) - self.s_per_byte[0])
        return arithmetic > (COMPUTE_BOUND_FROM - 1) * weight_bytes * self.s_per_byte[0]

    def _at(self, values: tuple[float, ...], count: Floats) -> Floats:
        inside = np.interp(count, self.rows, values)
        if len(self.rows) < 2:
            return inside
        slope = (values[-1] - values[-2]) / (self.rows[-1] - self.rows[-2])
        beyond = np.maximum(count - self.rows[-1], 0.0) * max(slope, 0.0)
        result: Floats = inside + beyond
        return result
