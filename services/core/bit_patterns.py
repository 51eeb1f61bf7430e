"""Tensors as arrays of plain integers: numpy costs a fraction of torch on a few rows."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_EXPONENT_BITS = {torch.float32: 0x7F80_0000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


def bit_patterns(values: Tensor) -> NDArray[Any]:
    """A tensor on the CPU as C-contiguous integers of the same size, without a copy if it is
    contiguous."""
    return values.contiguous().view(_INTEGER_OF_SIZE[values.itemsize]).numpy()


def is_all_finite(patterns: NDArray[Any], dtype: torch.dtype) -> bool:
    """Of the bit patterns of values, not none, in a floating dtype: an exponent of ones is NaN or
    infinity."""
    exponent = _EXPONENT_BITS[dtype]
    return bool((patterns & exponent).max() != exponent)
