"""Rotary position embeddings (Su et al. 2021), in the half-rotation form of Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.core.model_config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """cos and sin [positions, head_dim] of positions from 0 on; sin's first half is negated."""

    cos: Tensor
    sin: Tensor

    def apply(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Rotate [T, heads, head_dim] at int64 [T]: pairs are (x[i], x[i + head_dim / 2])."""
        cos = self.cos.index_select(0, positions)[:, None]
        sin = self.sin.index_select(0, positions)[:, None]
        return heads * cos + heads.roll(heads.shape[-1] // 2, -1) * sin


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

    def rotation(self, longest: int) -> Rotation:
        """The rotation of positions below `longest`, at least."""
        if longest > len(self._cos):
            self._cos, self._sin = self._compute(max(longest, 2 * len(self._cos)))
        return Rotation(cos=self._cos, sin=self._sin)

    def _compute(self, num_positions: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(num_positions, dtype=torch.float32)
        angles = positions[:, None] * self._inverse_frequencies
        cos, sin = angles.cos(), angles.sin()
        return (
            torch.cat((cos, cos), -1).to(self._device, self._dtype),
            torch.cat((-sin, sin), -1).to(self._device, self._dtype),
        )
