"""torch's arithmetic against plain float64, and the native kernels against torch's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from services.core.kernels.library import Isa, NativeLibrary, native_library
from services.core.kernels.matrix import NativeMatrix
from services.core.packed_linear import PackedLinear
from services.core.quantization.arithmetic import multiply_quantized, quantize_activations
from services.core.quantization.formats import QUANTIZED_FORMATS, QuantizedFormat
from services.core.quantization.quantized_rows import QuantizedRows
from services.core.quantization.rounding import quantize
from tests.support.checkpoints import fresh_seed

CPU = torch.device("cpu")
ISAS = [Isa.PORTABLE, Isa.AVX2, Isa.AVX512_VNNI]
ROW_COUNTS = (1, 2, 7, 8, 9, 17, 33)


@pytest.fixture
def library() -> Iterator[NativeLibrary]:
    found = native_library()
    if found is None:
        pytest.skip("kernels were not built")
    yield found
    found.limit_isa(Isa.AMX)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(fresh_seed()))


class Taken:
    """A `QuantizedSource` of rows that are there already."""

    def __init__(self, rows: QuantizedRows) -> None:
        self.shape: tuple[int, ...] = rows.shape
        self.weight_format = rows.weight_format
        self._rows = rows

    def __getitem__(self, rows: slice, /) -> Tensor:
        raise AssertionError("the integers are to be taken as they are")

    def quantized(self, rows: slice, /) -> QuantizedRows:
        return QuantizedRows(
            weight_format=self.weight_format,
            num_inputs=self.shape[1],
            values=self._rows.values[rows],
            scales=self._rows.scales[rows],
        )


def native_products(
    library: NativeLibrary, isa: Isa, rows: Tensor, weight: QuantizedRows
) -> Tensor:
    library.limit_isa(isa)
    matrix = NativeMatrix.pack(library, Taken(weight), weight_format=weight.weight_format)
    return matrix.multiply(rows, out_dtype=torch.float32)


@pytest.mark.parametrize("weight_format", QUANTIZED_FORMATS)
def test_products_are_those_of_the_dequantized_factors(weight_format: QuantizedFormat) -> None:
    rows, weight = random(5, 200), quantize(random(40, 200), weight_format)
    activations = quantize_activations(rows)
    values = activations.values * activations.scales[:, :, None]
    exact = values.flatten(1)[:, :200].double() @ weight.dequantized(torch.float64).T
    torch.testing.assert_close(
        multiply_quantized(rows, weight).double(), exact, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("weight_format", QUANTIZED_FORMATS)
def test_products_are_near_those_of_floats(weight_format: QuantizedFormat) -> None:
    rows, weight = random(16, 512), random(64, 512)
    exact = rows @ weight.T
    error = (multiply_quantized(rows, quantize(weight, weight_format)) - exact).norm()
    assert error < (0.012 if weight_format == "int8" else 0.12) * exact.norm()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 256), (70, 200), (33, 64), (5, 8)])
@pytest.mark.parametrize("weight_format", QUANTIZED_FORMATS)
def test_the_kernels_compute_what_torch_does(
    library: NativeLibrary,
    weight_format: QuantizedFormat,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    isa: Isa,
) -> None:
    weight = quantize(random(outputs, inputs), weight_format)
    rows = random(max(ROW_COUNTS), inputs).to(dtype)
    found = native_products(library, isa, rows, weight)
    expected = multiply_quantized(rows, weight)
    # The same save where float64 rounds twice, which is next to never.
    assert (found != expected).sum() <= 2
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_format", QUANTIZED_FORMATS)
def test_a_row_has_the_same_bits_alone_and_among_others(
    library: NativeLibrary, weight_format: QuantizedFormat, isa: Isa
) -> None:
    weight = quantize(random(80, 1100), weight_format)
    rows = random(max(ROW_COUNTS), 1100).to(torch.bfloat16)
    together = native_products(library, isa, rows, weight)
    for count in ROW_COUNTS:
        some = native_products(library, isa, rows[-count:], weight)
        assert torch.equal(some, together[-count:])
    by_torch = multiply_quantized(rows, weight)
    assert torch.equal(multiply_quantized(rows[3:4], weight), by_torch[3:4])


def test_all_instruction_sets_give_the_same_bits(library: NativeLibrary) -> None:
    for weight_format in QUANTIZED_FORMATS:
        weight = quantize(random(96, 700), weight_format)
        rows = random(19, 700)
        first, *others = [native_products(library, isa, rows, weight) for isa in ISAS]
        assert all(torch.equal(first, other) for other in others)


def test_the_least_int8_is_multiplied_exactly(library: NativeLibrary) -> None:
    """Another program's checkpoint may have -128."""
    rows = torch.full((1, 64), 127.0)
    weight = QuantizedRows(
        weight_format="int8",
        num_inputs=64,
        values=torch.full((2, 64), -128, dtype=torch.int8),
        scales=torch.ones(2),
    )
    for isa in ISAS:
        products = native_products(library, isa, rows, weight)
        assert products.tolist() == [[-128.0 * 127 * 64] * 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("weight_format", QUANTIZED_FORMATS)
def test_what_is_not_finite_shows_in_its_row_and_in_no_other(
    library: NativeLibrary, weight_format: QuantizedFormat, bad: float
) -> None:
    weight, rows = quantize(random(40, 200), weight_format), random(4, 200)
    rows[2, 137] = bad
    results = [native_products(library, isa, rows, weight) for isa in ISAS]
    for result in [*results, multiply_quantized(rows, weight)]:
        assert result[2].isnan().all()
        assert result[[0, 1, 3]].isfinite().all()


def test_zeros_and_the_tiniest_values_give_zero(library: NativeLibrary) -> None:
    rows = torch.stack([torch.zeros(64), torch.full((64,), 1e-38)])
    weight = quantize(random(32, 64), "int8")
    for isa in ISAS:
        assert native_products(library, isa, rows, weight).count_nonzero() == 0
    assert multiply_quantized(rows, weight).count_nonzero() == 0


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("weight_format", QUANTIZED_FORMATS)
def test_a_linear_layer_holds_its_weight_quantized(
    weight_format: QuantizedFormat, native: bool
) -> None:
    weight, rows = random(70, 192), random(6, 192).to(torch.bfloat16)
    linear = PackedLinear(
        weight,
        dtype=torch.bfloat16,
        device=CPU,
        silu=True,
        native=native,
        weight_format=weight_format,
    )
    expected = torch.nn.functional.silu(multiply_quantized(rows, quantize(weight, weight_format)))
    torch.testing.assert_close(linear(rows).float(), expected, rtol=0.01, atol=1e-3)
    assert linear(rows[:0]).shape == (0, 70)
    assert linear.weight_bytes < 70 * 192 * (1.1 if weight_format == "int8" else 0.6)
