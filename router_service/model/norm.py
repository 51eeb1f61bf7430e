"""The decoder's normalisation, with the addition to the residual that comes before it."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from services.core.kernels.choice import native_kernels_for
from services.core.kernels.row_ops import add_rms_norm


class RMSNorm:
    """x / rms(x) * weight (Zhang and Sennrich 2019); float32 inside, rounded before the weight.

    Both ways of computing it round alike; the sums of squares are added in another order.
    """

    def __init__(self, weight: Tensor, eps: float, *, native: bool = True) -> None:
        self.weight = weight
        self.eps = eps
        self._library = native_kernels_for(weight.dtype, weight.device) if native else None

    def __call__(self, x: Tensor, update: Tensor | None = None) -> Tensor:
        """Add `update` to `x` in place, and return the norm of the sum; all are [T, H]."""
        if self._library is not None:
            update = None if update is None else update.contiguous()
            return add_rms_norm(self._library, x, update, self.weight, self.eps)
        if update is not None:
            x.add_(update)
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return normed.to(x.dtype) * self.weight
