from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from router_service.model.norm import RMSNorm
from services.core.kernels.library import Isa, native_library
from services.core.kernels.row_ops import add_rms_norm

needs_native = pytest.mark.skipif(native_library() is None, reason="kernels are not built")


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_update", [True, False])
def test_norm_is_that_of_transformers_of_the_sum(
    dtype: torch.dtype, with_update: bool, native: bool
) -> None:
    """Up to one rounding, as the squares are added in another order."""
    x, update = torch.randn(2, 9, 100).to(dtype)
    weight = torch.rand(100).to(dtype)
    oracle = MixtralRMSNorm(100, eps=1e-5).to(dtype)
    oracle.weight.data = weight
    total = x + update if with_update else x.clone()
    expected = oracle(total).detach()
    normed = RMSNorm(weight, 1e-5, native=native)(x, update if with_update else None)
    assert torch.equal(x, total)
    assert normed.dtype == dtype
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(normed, expected, atol=0, rtol=4 * epsilon)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1024, 75, 16, 3])
def test_a_rows_bits_depend_neither_on_its_neighbours_nor_on_avx2_or_avx512(
    dtype: torch.dtype, size: int
) -> None:
    library = native_library()
    assert library is not None
    x, update = torch.randn(2, 200, size).to(dtype)
    weight = torch.rand(size).to(dtype)
    whole = add_rms_norm(library, x.clone(), update, weight, 1e-5)
    library.limit_isa(Isa.AVX2)
    try:
        for rows in (slice(3, 4), slice(10, 43), slice(100, 200)):
            part = add_rms_norm(library, x[rows].clone(), update[rows], weight, 1e-5)
            assert torch.equal(part, whole[rows])
    finally:
        library.limit_isa(Isa.AMX)


@needs_native
def test_without_rows_there_is_nothing_to_do() -> None:
    norm = RMSNorm(torch.ones(32), 1e-5)
    assert norm(torch.empty(0, 32), torch.empty(0, 32)).shape == (0, 32)
