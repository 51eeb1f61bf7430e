from __future__ import annotations

import pytest
import torch

from services.core.errors import ConfigurationError
from services.core.wire_dtype import WireFormat, dequantize_rows, quantize_rows
from tests.support.checkpoints import fresh_seed


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(fresh_seed())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_comes_back_within_half_a_step_of_its_rows_scale(
    generator: torch.Generator, dtype: torch.dtype
) -> None:
    rows = (torch.randn(9, 64, generator=generator) * torch.logspace(-3, 3, 9)[:, None]).to(dtype)
    quantized, scales = quantize_rows(rows)
    assert (quantized.dtype, scales.dtype, scales.shape) == (torch.int8, torch.float32, (9,))
    assert quantized.abs().amax(dim=1).tolist() == [127] * 9
    errors = (dequantize_rows(quantized, scales, torch.float32) - rows.float()).abs().amax(dim=1)
    assert (errors <= scales * 0.5001).all()


def test_a_row_is_rounded_the_same_whatever_is_beside_it(generator: torch.Generator) -> None:
    rows = torch.randn(33, 48, generator=generator).bfloat16()
    quantized, scales = quantize_rows(rows)
    for row in range(33):
        alone = quantize_rows(rows[row : row + 1])
        assert torch.equal(alone[0][0], quantized[row])
        assert torch.equal(alone[1][0], scales[row])


def test_rows_without_a_scale_come_back_as_zeros() -> None:
    rows = torch.zeros(2, 8)
    rows[1] = 1e-45  # its scale is smaller than any float
    assert dequantize_rows(*quantize_rows(rows), torch.float32).count_nonzero() == 0


@pytest.mark.parametrize(
    ("name", "activation", "request_dtype", "answer"),
    [
        ("auto", torch.float16, torch.float16, torch.float16),
        ("bfloat16", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.float32, torch.bfloat16, torch.bfloat16),
        ("int8", torch.bfloat16, torch.int8, torch.bfloat16),
        ("int8", torch.float32, torch.int8, torch.float32),
    ],
)
def test_answers_are_narrowed_only_by_bfloat16_in_float32_models(
    name: str, activation: torch.dtype, request_dtype: torch.dtype, answer: torch.dtype
) -> None:
    wire_format = WireFormat.of(name, activation)  # type: ignore[arg-type]
    assert (wire_format.request, wire_format.answer) == (request_dtype, answer)
    assert wire_format.narrows_answers == (answer != activation)


def test_a_wire_dtype_that_saves_nothing_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="EXPERTFLEET_WIRE_DTYPE=bfloat16"):
        WireFormat.of("bfloat16", torch.float16)
