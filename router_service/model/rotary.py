"""Rotary position embeddings (Su et al. 2021), in the half-rotation form of Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.core.model_config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """The rotation of T tokens: cos and sin [T, 1, head_dim]; sin's first half is negated."""

    cos: Tensor
    sin: Tensor

    def apply(self, heads: Tensor) -> Tensor:
        """Rotate [T, heads, head_dim]: pairs are (x[i], x[i + head_dim / 2])."""
        return heads * self.cos + heads.roll(heads.shape[-1] // 2, -1) * self.sin


class RotaryTable:
    """cos and sin of all positions up to the longest asked for, grown by doubling.

    Angles are computed in float32, the table is kept in the activation dtype.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self._inverse_frequencies = 1.0 / (config.rope_theta**exponents)
        self._dtype = dtype
        self._device = device
        self._cos, self._sin = self._compute(256)

    def rotation(self, positions: Tensor, *, longest: int) -> Rotation:
        """The rotation at `positions` int64 [T], all below `longest`."""
        if longest > len(self._cos):
            self._cos, self._sin = self._compute(max(longest, 2 * len(self._cos)))
        return Rotation(
            cos=self._cos.index_select(0, positions), sin=self._sin.index_select(0, positions)
        )

    def _compute(self, num_positions: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(num_positions, dtype=torch.float32)
        angles = positions[:, None, None] * self._inverse_frequencies
        cos, sin = angles.cos(), angles.sin()
        return (
            torch.cat((cos, cos), -1).to(self._device, self._dtype),
            torch.cat((-sin, sin), -1).to(self._device, self._dtype),
        )
