from __future__ import annotations

import pytest

from services.core.errors import ConfigurationError
from services.core.planning.model_sizes import PUBLISHED_MODELS, ModelSizes
from services.core.planning.weight_formats import BF16, INT4, INT8, weight_format


@pytest.mark.parametrize(
    ("model", "total", "active"), [("mixtral-8x7b", 46.7, 12.9), ("mixtral-8x22b", 140.6, 39.1)]
)
def test_parameter_counts_are_the_published_ones(model: str, total: float, active: float) -> None:
    sizes = ModelSizes(config=PUBLISHED_MODELS[model])
    assert sizes.total_params / 1e9 == pytest.approx(total, abs=0.07)
    assert sizes.active_params / 1e9 == pytest.approx(active, abs=0.07)


def test_parameter_counts_of_8x7b_are_exact() -> None:
    # The checkpoint's safetensors index states twice as many bytes.
    assert ModelSizes(config=PUBLISHED_MODELS["mixtral-8x7b"]).total_params == 46_702_792_704


@pytest.mark.parametrize(
    ("precision", "gigabytes"), [("bf16", 280.0), ("int8", 140.0), ("int4", 80.0)]
)
def test_8x22b_takes_about_the_published_bytes(precision: str, gigabytes: float) -> None:
    config = PUBLISHED_MODELS["mixtral-8x22b"]
    sizes = ModelSizes(config=config, weights=weight_format(precision))
    assert sizes.total_bytes / 1e9 == pytest.approx(gigabytes, rel=0.05)


@pytest.mark.parametrize(
    ("precision", "gigabytes"), [("bf16", 33.8), ("int8", 16.9), ("int4", 9.0)]
)
def test_one_expert_of_8x22b_takes_what_the_design_counts_on(
    precision: str, gigabytes: float
) -> None:
    config = PUBLISHED_MODELS["mixtral-8x22b"]
    sizes = ModelSizes(config=config, weights=weight_format(precision))
    assert sizes.expert_bytes / 1e9 == pytest.approx(gigabytes, abs=0.05)
    assert sizes.shared_bytes / 1e9 == pytest.approx(10.7, abs=0.05)


def test_scales_are_counted_by_group_and_by_row() -> None:
    assert BF16.matrix_bytes(10, 128) == 2560
    assert INT8.matrix_bytes(10, 128) == 1280 + 10 * 4
    assert INT4.matrix_bytes(10, 128) == 640 + 10 * 2 * 2
    assert INT4.matrix_bytes(10, 130) == 650 + 10 * 3 * 2  # a begun group has a scale


def test_an_unknown_precision_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigurationError, match="bf16, int8, int4"):
        weight_format("int3")
