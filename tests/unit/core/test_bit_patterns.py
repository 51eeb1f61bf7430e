from __future__ import annotations

import math

import pytest
import torch

from services.core.bit_patterns import bit_patterns, is_all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype, bad: float) -> None:
    values = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    values[0] = torch.finfo(dtype).min
    assert is_all_finite(bit_patterns(values), dtype)
    values[2, 4] = bad
    assert not is_all_finite(bit_patterns(values), dtype)


def test_contiguous_values_are_not_copied_and_others_come_in_order() -> None:
    values = torch.randn(4, 6)
    assert bit_patterns(values).ctypes.data == values.data_ptr()
    patterns = bit_patterns(values.t())
    assert patterns.flags.c_contiguous
    assert patterns.tobytes() == values.t().contiguous().numpy().tobytes()
