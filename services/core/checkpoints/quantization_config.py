"""What `config.json` says about quantised weights, in the words of compressed-tensors.

Of its formats two are read and written: "int-quantized" with a scale per output, and
"pack-quantized" with 4 bits and groups of inputs; docs/quantization.md has the details. How a
tensor is stored is seen from the tensors themselves, so this block is checked, and no more.

Format: https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.core.quantization.formats import GROUP_SIZE, QuantizedFormat

METHOD = "compressed-tensors"
STORED_GROUP_SIZES = (GROUP_SIZE, 2 * GROUP_SIZE)
"""Of int4 weights, in a checkpoint that another program wrote."""

_FORMATS: dict[QuantizedFormat, str] = {"int8": "int-quantized", "int4": "pack-quantized"}


def quantization_config(
    formats: Sequence[tuple[QuantizedFormat, Sequence[str]]], unquantized: Sequence[str]
) -> dict[str, Any]:
    """The block for `config.json`: formats, each with patterns of the modules that have it."""
    names = {_FORMATS[weight_format] for weight_format, _ in formats}
    return {
        "quant_method": METHOD,
        "format": names.pop() if len(names) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": list(patterns),
                "weights": _weights(weight_format),
                "input_activations": _activations() if weight_format == "int8" else None,
                "output_activations": None,
                "format": _FORMATS[weight_format],
            }
            for index, (weight_format, patterns) in enumerate(formats)
        },
        "ignore": list(unquantized),
    }


def why_not_read(block: Any) -> str | None:
    """What of a `quantization_config` is not read, for an error; None when all is."""
    method = block.get("quant_method", block) if isinstance(block, dict) else block
    if method != METHOD:
        return f"weights quantised by {method!r}"
    groups = block.get("config_groups")
    if block.get("quantization_status", "compressed") != "compressed" or not groups:
        return f"{METHOD} weights that are not stored compressed"
    for group in groups.values():
        weights = group.get("weights") or {}
        if not _is_read(weights):
            said = {key: weights.get(key) for key in ("num_bits", "type", "strategy", "group_size")}
            return f"{METHOD} weights with {said}"
    return None


def _weights(weight_format: QuantizedFormat) -> dict[str, Any]:
    is_int8 = weight_format == "int8"
    return {
        "num_bits": 8 if is_int8 else 4,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if is_int8 else "group",
        "group_size": None if is_int8 else GROUP_SIZE,
        "dynamic": False,
    }


def _activations() -> dict[str, Any]:
    """What other engines are to do with activations; here they have a scale per group of inputs."""
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def _is_read(weights: dict[str, Any]) -> bool:
    if weights.get("type", "int") != "int" or not weights.get("symmetric", True):
        return False
    if weights.get("actorder") or weights.get("dynamic"):
        return False
    if weights.get("num_bits") == 8:
        return weights.get("strategy") == "channel"
    return (
        weights.get("num_bits") == 4
        and weights.get("strategy") == "group"
        and weights.get("group_size") in STORED_GROUP_SIZES
    )
