"""How many bytes a weight matrix takes, at each precision that experts can be held in."""

from __future__ import annotations

from dataclasses import dataclass

from services.core.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """`group_size` weights of a row share a scale of `scale_bytes`; 0: the whole row does."""

    name: str
    bits: int
    scale_bytes: int = 0
    group_size: int = 0

    def matrix_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a weight [out_features, in_features] with its scales; no padding."""
        groups_per_row = -(-in_features // self.group_size) if self.group_size else 1
        values = out_features * in_features * self.bits // 8
        return values + out_features * groups_per_row * self.scale_bytes


BF16 = WeightFormat(name="bf16", bits=16)
INT8 = WeightFormat(name="int8", bits=8, scale_bytes=4)
"""One float32 scale per output channel."""
INT4 = WeightFormat(name="int4", bits=4, scale_bytes=2, group_size=64)
"""One bfloat16 scale for 64 weights of a row."""

WEIGHT_FORMATS = {weights.name: weights for weights in (BF16, INT8, INT4)}


def weight_format(name: str) -> WeightFormat:
    """Raises `ConfigurationError` with the choices."""
    try:
        return WEIGHT_FORMATS[name.strip().lower()]
    except KeyError:
        raise ConfigurationError(
            f"unknown precision {name!r}; choose from {', '.join(WEIGHT_FORMATS)}",
            setting="precision",
        ) from None
