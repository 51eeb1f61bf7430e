"""Names and sizes of the quantised formats, for those who do without torch."""

from __future__ import annotations

from typing import Literal

QuantizedFormat = Literal["int8", "int4"]
QUANTIZED_FORMATS: tuple[QuantizedFormat, ...] = ("int8", "int4")

GROUP_SIZE = 64
"""Inputs that share a scale: of int4 weights, and of the activations they are multiplied by."""

WeightsSetting = Literal["auto", "int8", "int4"]
"""What a user asks weights to be held as; auto: as they are stored."""


def chosen_format(
    setting: WeightsSetting, stored: QuantizedFormat | None
) -> QuantizedFormat | None:
    """What weights are held as; None: as floats."""
    return stored if setting == "auto" else setting


def quantized_bytes(weight_format: QuantizedFormat, num_outputs: int, num_inputs: int) -> int:
    """Bytes of a weight and its scales, without padding."""
    if weight_format == "int8":
        return num_outputs * (num_inputs + 4)
    return num_outputs * (-(-num_inputs // 2) + 2 * -(-num_inputs // GROUP_SIZE))
