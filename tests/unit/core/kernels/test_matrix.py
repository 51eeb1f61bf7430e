from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from services.core.kernels.library import Isa, NativeLibrary
from services.core.kernels.matrix import FORMATS_OF_DTYPES, NativeMatrix, packed_memory
from services.core.row_source import LazyRows
from tests.support.checkpoints import fresh_seed
from tests.support.kernels import built_library, limited_to

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1, 1), (31, 33), (33, 700), (96, 64), (130, 257))
"""Outputs and inputs: whole panels and steps, and not."""


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(fresh_seed())


@pytest.fixture
def library() -> Iterator[NativeLibrary]:
    library = built_library()
    num_threads = library.num_threads()
    yield library
    library.set_num_threads(num_threads)


@pytest.fixture(params=list(Isa), ids=lambda isa: isa.name.lower())
def isa(library: NativeLibrary, request: pytest.FixtureRequest) -> Iterator[Isa]:
    with limited_to(library, request.param):
        yield request.param


def random_weight(generator: torch.Generator, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator).div_(shape[1] ** 0.5).to(dtype)


def random_rows(
    generator: torch.Generator, num_rows: int, inputs: int, dtype: torch.dtype
) -> Tensor:
    return torch.randn(num_rows, inputs, generator=generator).to(dtype)


def packed(library: NativeLibrary, weight: Tensor) -> NativeMatrix:
    return NativeMatrix.pack(library, weight, weight_format=FORMATS_OF_DTYPES[weight.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_gives_the_float64_product_within_float32s_rounding(
    library: NativeLibrary,
    isa: Isa,
    generator: torch.Generator,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    weight = random_weight(generator, shape, dtype)
    matrix = packed(library, weight)
    for num_rows in (0, 1, 3, 13, 100):
        rows = random_rows(generator, num_rows, shape[1], dtype)
        expected = rows.double() @ weight.double().T
        result = matrix.multiply(rows, out_dtype=torch.float32)
        torch.testing.assert_close(result.double(), expected, rtol=2e-6, atol=5e-6)
        activated = matrix.multiply(rows, silu=True, out_dtype=torch.float32)
        torch.testing.assert_close(activated.double(), F.silu(expected), rtol=4e-6, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_are_the_same_alone_and_in_any_batch_on_any_number_of_threads(
    library: NativeLibrary, isa: Isa, generator: torch.Generator, dtype: torch.dtype
) -> None:
    matrix = packed(library, random_weight(generator, (70, 300), dtype))
    rows = random_rows(generator, 67, 300, dtype)
    library.set_num_threads(1)
    alone = torch.cat([matrix.multiply(row[None], out_dtype=torch.float32) for row in rows])
    for num_rows in range(1, 68):
        library.set_num_threads(1 + num_rows % 3)
        first = int(torch.randint(68 - num_rows, (), generator=generator))
        batch = slice(first, first + num_rows)
        assert torch.equal(matrix.multiply(rows[batch], out_dtype=torch.float32), alone[batch])


def test_more_rows_than_are_prepared_at_once_have_the_bits_of_fewer(
    library: NativeLibrary, generator: torch.Generator
) -> None:
    matrix = packed(library, random_weight(generator, (40, 64), torch.bfloat16))
    rows = random_rows(generator, 2500, 64, torch.bfloat16)
    parts = [matrix.multiply(part) for part in torch.split(rows, 300)]
    assert torch.equal(matrix.multiply(rows), torch.cat(parts))


@pytest.mark.parametrize("dtype", DTYPES)
def test_avx2_and_avx512_agree_bit_for_bit(
    library: NativeLibrary, generator: torch.Generator, dtype: torch.dtype
) -> None:
    matrix = packed(library, random_weight(generator, (64, 200), dtype))
    rows = random_rows(generator, 29, 200, dtype)
    results = []
    for isa in (Isa.AVX2, Isa.AVX512):
        with limited_to(library, isa):
            results.append(matrix.multiply(rows, silu=True))
    assert torch.equal(results[0], results[1])


def test_results_are_rounded_to_the_nearest_bfloat16(
    library: NativeLibrary, generator: torch.Generator
) -> None:
    matrix = packed(library, random_weight(generator, (48, 96), torch.bfloat16))
    rows = random_rows(generator, 20, 96, torch.bfloat16)
    exact = matrix.multiply(rows, out_dtype=torch.float32)
    assert torch.equal(matrix.multiply(rows), exact.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_is_torchs_over_its_whole_range(
    library: NativeLibrary, isa: Isa, dtype: torch.dtype
) -> None:
    values = torch.linspace(-200, 200, 100_001).to(dtype)[:, None]
    result = packed(library, torch.ones(1, 1, dtype=dtype)).multiply(
        values, silu=True, out_dtype=torch.float32
    )
    expected = F.silu(values.double())
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(
    library: NativeLibrary, isa: Isa, generator: torch.Generator, dtype: torch.dtype
) -> None:
    matrix = packed(library, random_weight(generator, (40, 50), dtype))
    rows = random_rows(generator, 14, 50, dtype)
    expected = matrix.multiply(rows, silu=True)
    rows[3, 7], rows[12, 49] = float("nan"), float("inf")
    result = matrix.multiply(rows, silu=True)
    whole = [row for row in range(14) if row not in (3, 12)]
    assert torch.equal(result[whole], expected[whole])
    assert result[3].isnan().all()
    assert not result[12].isfinite().any() or dtype == torch.float32


def test_a_weight_is_taken_in_parts_that_begin_at_panels(
    library: NativeLibrary, generator: torch.Generator
) -> None:
    weight = random_weight(generator, (150, 40), torch.float32)
    taken = []

    def read(first: int, count: int) -> Tensor:
        taken.append((first, count))
        return weight[first : first + count].clone()

    source = LazyRows((150, 40), read)
    matrix = NativeMatrix.pack(library, source, weight_format="float32", part_bytes=70 * 40 * 4)
    assert taken == [(0, 64), (64, 64), (128, 22)]
    rows = random_rows(generator, 5, 40, torch.float32)
    assert torch.equal(matrix.multiply(rows), packed(library, weight).multiply(rows))


def test_rows_of_another_length_are_refused(library: NativeLibrary) -> None:
    matrix = packed(library, torch.ones(4, 6))
    with pytest.raises(ValueError, match="rows of 5, not of 6"):
        matrix.multiply(torch.ones(1, 5))


@pytest.mark.parametrize("num_bytes", [0, 100, (5 << 20) + 192])
def test_packed_memory_is_aligned_zero_and_writable(num_bytes: int) -> None:
    memory = packed_memory(num_bytes)
    assert len(memory) == num_bytes
    assert memory.data_ptr() % 64 == 0
    assert not memory.any()
    assert int(memory.fill_(3).sum()) == 3 * num_bytes
