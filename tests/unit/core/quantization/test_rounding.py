from __future__ import annotations

from typing import Any

import pytest
import torch

from services.core.kernels.library import Isa, native_library
from services.core.quantization.formats import QUANTIZED_FORMATS, QuantizedFormat, quantized_bytes
from services.core.quantization.quantized_rows import JoinedRows, pack_int4
from services.core.quantization.rounding import (
    QuantizingSource,
    all_rows,
    quantize,
    quantized_source,
)
from tests.support.checkpoints import fresh_seed

needs_native = pytest.mark.skipif(native_library() is None, reason="kernels were not built")


def random_weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(fresh_seed())).to(dtype)


def test_int8_is_within_half_a_step_and_reaches_both_ends() -> None:
    weight = random_weight(40, 200)
    rows = quantize(weight, "int8")
    steps = weight.abs().amax(dim=1, keepdim=True) / 127
    assert torch.all((rows.dequantized(torch.float32) - weight).abs() <= steps * 0.5001)
    assert rows.integers().abs().amax(dim=1).eq(127).all()


def test_int4_without_search_is_within_half_a_step_of_its_group() -> None:
    weight = random_weight(40, 200)
    rows = quantize(weight, "int4", search=False)
    error = torch.nn.functional.pad((rows.dequantized(torch.float32) - weight).abs(), (0, 56))
    most = torch.nn.functional.pad(weight.abs(), (0, 56)).view(40, 4, 64).amax(dim=2)
    # Half a step, and the rounding of the scale to bfloat16 at seven steps.
    assert torch.all(error.view(40, 4, 64).amax(dim=2) <= most / 7 * (0.5 + 7 / 256))


def test_the_search_for_int4_scales_never_adds_error_and_saves_some() -> None:
    weight = random_weight(64, 256)

    def errors(search: bool) -> torch.Tensor:
        difference = quantize(weight, "int4", search=search).dequantized(torch.float32) - weight
        return difference.square().view(64, 4, 64).sum(dim=2)

    assert torch.all(errors(True) <= errors(False) * 1.00001)
    assert errors(True).sum() < 0.9 * errors(False).sum()


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_native)])
@pytest.mark.parametrize("weight_format", QUANTIZED_FORMATS)
def test_zeros_stay_zeros_and_ties_go_to_even(weight_format: QuantizedFormat, native: bool) -> None:
    weight = torch.zeros(3, 64)
    limit = 127.0 if weight_format == "int8" else 7.0
    weight[1] = torch.tensor([limit, -limit, 0.5, 1.5, -0.5, -1.5, 2.5, 3.0]).repeat(8)
    rows = quantize(weight, weight_format, search=False, native=native)
    assert rows.dequantized(torch.float32)[[0, 2]].count_nonzero() == 0
    assert rows.integers()[1, :8].tolist() == [limit, -limit, 0, 2, 0, -2, 2, 3]


@needs_native
@pytest.mark.parametrize("isa", [Isa.PORTABLE, Isa.AVX2, Isa.AMX])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_format", QUANTIZED_FORMATS)
def test_the_kernels_round_as_torch_does(
    weight_format: QuantizedFormat, dtype: torch.dtype, isa: Isa
) -> None:
    library = native_library()
    assert library is not None
    weight = random_weight(37, 203, dtype=dtype)
    library.limit_isa(isa)
    try:
        native = quantize(weight, weight_format)
    finally:
        library.limit_isa(Isa.AMX)
    by_torch = quantize(weight, weight_format, native=False)
    assert torch.equal(native.values, by_torch.values)
    assert torch.equal(native.scales, by_torch.scales)


def test_packed_int4_has_the_first_weight_in_the_low_half() -> None:
    packed = pack_int4(torch.tensor([[-8, 7, 0, 1]], dtype=torch.int8))
    assert packed.tolist() == [[0 | 15 << 4, 8 | 9 << 4, 0, 0]]


@pytest.mark.parametrize("weight_format", QUANTIZED_FORMATS)
def test_rows_taken_in_parts_or_joined_are_those_of_the_whole(
    weight_format: QuantizedFormat,
) -> None:
    weight = random_weight(50, 130)
    whole = quantize(weight, weight_format)
    parts = [
        QuantizingSource(part, weight_format) for part in (weight[:7], weight[7:37], weight[37:])
    ]
    source: Any = JoinedRows(parts)  # type: ignore[arg-type]
    assert source.weight_format == weight_format and source.shape == (50, 130)
    assert quantized_source(source, weight_format) is source
    for rows in (slice(0, 50), slice(5, 9), slice(36, 100)):
        assert torch.equal(source.quantized(rows).values, whole.values[rows])
        assert torch.equal(source.quantized(rows).scales, whole.scales[rows])
    assert torch.equal(all_rows(source).values, whole.values)


def test_joined_floats_are_floats() -> None:
    first, second = random_weight(3, 8), random_weight(5, 8)
    source = JoinedRows([first, second])
    assert source.weight_format is None
    assert torch.equal(source[2:6], torch.cat([first, second])[2:6])


def test_sizes_are_about_one_byte_and_a_bit_over_half_a_byte_a_weight() -> None:
    assert quantized_bytes("int8", 100, 1024) == 100 * 1028
    assert quantized_bytes("int4", 100, 1024) == 100 * (512 + 32)
