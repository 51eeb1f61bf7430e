"""Products on fp8, int8 and int4 weights against the same weights dequantised, in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from services.core.cuda.device_support import DeviceSupport
from services.core.cuda.linears import WEIGHT_FORMATS, WeightFormat, make_linear
from services.core.errors import ConfigurationError
from tests.unit.core.cuda.oracle import relative_error

NATIVE = replace(
    DeviceSupport.for_capability(None),
    fp8=torch.torch_version.TorchVersion(torch.__version__) >= "2.13",
)
"""All that torch computes on a CPU; int4 is dequantised there."""
WITHOUT = DeviceSupport.for_capability((7, 5))
# Rows are rounded to e4m3 (3 bits of mantissa) or to int8 too, else only the result to bf16.
PRODUCT_ERROR = {"bf16": 0.004, "fp8": 0.04, "int8": 0.012, "int4": 0.004}
WEIGHT_ERROR = {"bf16": 0.0, "fp8": 0.04, "int8": 0.012, "int4": 0.12}


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize("num_rows", [0, 1, 17, 40])
def test_a_product_is_that_of_the_dequantised_weight(
    weight_format: WeightFormat, num_rows: int
) -> None:
    weight = torch.randn(96, 256).bfloat16()
    rows = torch.randn(num_rows, 256).bfloat16()

    linear = make_linear(weight, weight_format, NATIVE)
    product = linear(rows)

    assert product.shape == (num_rows, 96)
    assert product.dtype == torch.bfloat16
    if num_rows:
        wanted = rows.float() @ linear.dequantised().t()
        assert relative_error(product, wanted) <= PRODUCT_ERROR[weight_format]


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_a_weight_is_kept_to_its_formats_precision(weight_format: WeightFormat) -> None:
    weight = torch.randn(64, 384).bfloat16()
    linear = make_linear(weight, weight_format, NATIVE)
    assert relative_error(linear.dequantised(), weight) <= WEIGHT_ERROR[weight_format]


@pytest.mark.parametrize("weight_format", ["fp8", "int8", "int4"])
def test_a_device_without_the_product_dequantises(weight_format: WeightFormat) -> None:
    rows = torch.randn(5, 128).bfloat16()
    linear = make_linear(torch.randn(32, 128).bfloat16(), weight_format, WITHOUT)
    wanted = rows.float() @ linear.dequantised().bfloat16().float().t()
    assert relative_error(linear(rows), wanted) <= 0.004


@pytest.mark.parametrize("weight_format", ["fp8", "int8"])
def test_a_row_does_not_depend_on_the_scale_of_its_neighbours(weight_format: WeightFormat) -> None:
    linear = make_linear(torch.randn(32, 64).bfloat16(), weight_format, NATIVE)
    row, large = torch.randn(1, 64).bfloat16(), 1000 * torch.randn(3, 64).bfloat16()
    assert torch.equal(linear(torch.cat((row, large)))[:1], linear(row))


@pytest.mark.parametrize("weight_format", ["fp8", "int8"])
def test_a_channel_of_zeros_and_a_row_of_zeros_stay_zero(weight_format: WeightFormat) -> None:
    weight = torch.randn(32, 64).bfloat16()
    weight[3] = 0
    rows = torch.randn(2, 64).bfloat16()
    rows[1] = 0
    product = make_linear(weight, weight_format, NATIVE)(rows)
    assert not product[:, 3].any()
    assert not product[1].any()
    assert torch.isfinite(product).all()


@pytest.mark.parametrize(
    ("weight_format", "share"), [("bf16", 1.0), ("fp8", 0.51), ("int8", 0.51), ("int4", 0.27)]
)
def test_weights_take_the_memory_of_their_format(weight_format: WeightFormat, share: float) -> None:
    weight = torch.randn(256, 1024).bfloat16()
    assert make_linear(weight, weight_format, NATIVE).weight_bytes <= share * weight.nbytes


def test_int4_names_a_width_its_groups_do_not_divide() -> None:
    with pytest.raises(ConfigurationError, match="128 columns, which do not divide 96"):
        make_linear(torch.randn(16, 96).bfloat16(), "int4", NATIVE)


def test_what_a_card_can_do_follows_its_capability() -> None:
    hopper, ada, turing = map(DeviceSupport.for_capability, ((9, 0), (8, 9), (7, 5)))
    assert hopper.fp8 and hopper.grouped and hopper.int4 and hopper.graphs
    assert ada.fp8 and not ada.grouped and ada.int8
    assert not (turing.fp8 or turing.int8 or turing.int4)
