from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from services.core.packed_linear import PackedLinear
from services.core.row_source import LazyRows

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("num_rows", [1, 2, 7, 33, 130])
def test_product_equals_the_float32_one_within_the_dtypes_rounding(
    dtype: torch.dtype, num_rows: int, native: bool
) -> None:
    weight = (torch.randn(48, 40) / 40**0.5).to(dtype)
    rows = torch.randn(num_rows, 40).to(dtype)
    result = PackedLinear(weight, dtype=dtype, device=CPU, native=native)(rows)
    assert result.dtype == dtype
    expected = F.linear(rows.float(), weight.float())
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(result.float(), expected, atol=tolerance, rtol=tolerance)


def test_weight_is_converted_to_the_dtype_asked_for() -> None:
    linear = PackedLinear(torch.randn(6, 4), dtype=torch.bfloat16, device=CPU)
    assert linear(torch.randn(3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert (linear.in_features, linear.out_features, linear.weight_bytes) == (4, 6, 48)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_no_rows_give_no_rows(dtype: torch.dtype, native: bool) -> None:
    linear = PackedLinear(torch.randn(6, 4), dtype=dtype, device=CPU, native=native)
    assert linear(torch.empty(0, 4, dtype=dtype)).shape == (0, 6)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("silu", [True, False])
def test_results_are_in_the_dtype_asked_for(native: bool, silu: bool) -> None:
    weight, rows = torch.randn(6, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    linear = PackedLinear(
        weight,
        dtype=torch.bfloat16,
        device=CPU,
        silu=silu,
        out_dtype=torch.float32,
        native=native,
    )
    result = linear(rows)
    assert result.dtype == linear(rows[:0]).dtype == torch.float32
    expected = F.linear(rows.float(), weight.float())
    expected = F.silu(expected) if silu else expected
    torch.testing.assert_close(result, expected, atol=2e-2, rtol=2e-2)


def test_the_kernels_are_torchs_where_the_native_ones_are_not_wanted_or_lack_the_dtype() -> None:
    weight = torch.randn(6, 4)
    assert PackedLinear(weight, dtype=torch.float32, device=CPU, native=False).native is None
    assert PackedLinear(weight, dtype=torch.float16, device=CPU).native is None


@pytest.mark.parametrize("num_rows", [1, 33])
def test_a_weight_in_parts_is_taken_part_by_part_and_gives_the_same_product(num_rows: int) -> None:
    weight, rows = torch.randn(300, 40), torch.randn(num_rows, 40)
    taken = []

    def read(first: int, count: int) -> torch.Tensor:
        taken.append((first, count))
        return weight[first : first + count].clone()

    source = LazyRows((300, 40), read)
    linear = PackedLinear(
        source, dtype=torch.float32, device=CPU, part_bytes=100 * 40 * 4, native=False
    )
    assert taken == [(0, 128), (128, 128), (256, 44)]
    assert (linear.in_features, linear.out_features) == (40, 300)
    assert linear.weight_bytes == weight.nbytes
    torch.testing.assert_close(linear(rows), rows @ weight.T)
    assert linear(rows[:0]).shape == (0, 300)


def test_rows_need_not_be_contiguous() -> None:
    weight = torch.randn(6, 4)
    rows = torch.randn(5, 8)[:, ::2]
    result = PackedLinear(weight, dtype=torch.float32, device=CPU)(rows)
    torch.testing.assert_close(result, rows @ weight.T)
