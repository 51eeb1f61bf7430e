"""One expert against the plain SwiGLU in float32."""

from __future__ import annotations

import pytest
import torch

from services.core.cuda.expert import CudaExpert
from services.core.cuda.linears import WEIGHT_FORMATS, WeightFormat
from services.core.errors import UnsupportedModelError
from tests.unit.core.cuda.oracle import CPU, ffn, random_weights, relative_error

# Two products deep: what each format loses in rounding rows, on top of bfloat16 in between.
TOLERANCE = {"bf16": 0.01, "fp8": 0.08, "int8": 0.03, "int4": 0.01}


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_an_expert_is_the_swiglu_of_its_dequantised_weights(weight_format: WeightFormat) -> None:
    expert = CudaExpert(
        random_weights(128, 256), dtype=torch.bfloat16, device=CPU, weight_format=weight_format
    )
    rows = torch.randn(9, 128).bfloat16()
    wanted = ffn(*expert.dequantised(), rows)
    assert relative_error(expert.forward(rows), wanted) <= TOLERANCE[weight_format]


def test_in_float32_an_expert_is_exact() -> None:
    weights = random_weights(64, 96)
    expert = CudaExpert(weights, dtype=torch.float32, device=CPU)
    rows = torch.randn(5, 64)
    torch.testing.assert_close(
        expert.forward(rows), ffn(weights.w1, weights.w2, weights.w3, rows), rtol=1e-5, atol=1e-5
    )


def test_batches_get_their_own_rows_back() -> None:
    expert = CudaExpert(random_weights(64, 96), dtype=torch.float32, device=CPU)
    batches = [torch.randn(count, 64) for count in (3, 0, 1, 8)]
    for rows, result in zip(batches, expert.forward_each(batches), strict=True):
        torch.testing.assert_close(result, expert.forward(rows))


def test_stacked_weights_are_used_where_they_lie() -> None:
    weights = random_weights(64, 96)
    w13 = torch.cat((weights.w1, weights.w3))
    rows = torch.randn(4, 64).bfloat16()
    packed = CudaExpert(weights, dtype=torch.bfloat16, device=CPU)
    stacked = CudaExpert.of_stacked(w13, weights.w2)
    assert torch.equal(stacked.forward(rows), packed.forward(rows))
    assert stacked.weight_bytes == packed.weight_bytes == 3 * 64 * 96 * 2


def test_another_activation_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="gelu"):
        CudaExpert(random_weights(16, 16), dtype=torch.bfloat16, device=CPU, hidden_act="gelu")
