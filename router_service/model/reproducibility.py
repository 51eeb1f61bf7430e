"""Whether a token's logits can be the same bits whatever else is computed beside it.

They are where every operation between embedding and logits is a native kernel, since a row's bits
then depend on that row and its own keys alone. torch's attention and matrix products round a row
differently at other batch sizes and lengths.
"""

from __future__ import annotations

import torch

from services.core.errors import ConfigurationError
from services.core.kernels.attention import supports_attention
from services.core.kernels.choice import native_kernels_for
from services.core.model_config import ModelConfig


def resolve_reproducible(
    requested: bool | None, config: ModelConfig, *, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether this shard's part of an answer is reproducible; with None it is where it can be.

    Raises `ConfigurationError` when it is asked for and cannot be had. (False promises nothing; it
    does not switch the native kernels off.)
    """
    obstacle = obstacle_to_reproducibility(config, dtype=dtype, device=device)
    if requested and obstacle is not None:
        raise ConfigurationError(
            f"answers cannot be reproducible: {obstacle}; or start without --reproducible",
            setting="reproducible",
        )
    return obstacle is None and requested is not False


def obstacle_to_reproducibility(
    config: ModelConfig, *, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why not, and what to do about it; None where they are reproducible."""
    if device.type != "cpu":
        return f"device {device} has no kernels whose rounding ignores the batch; use device=cpu"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"there are no native kernels for {dtype}; use dtype=bfloat16 or float32"
    if not supports_attention(dtype, device, config.head_dim):
        return (
            f"the native attention takes a head_dim that is a multiple of 8 up to 256, "
            f"this model's is {config.head_dim}"
        )
    if native_kernels_for(dtype, device) is None:
        return (
            "the native kernels are not built or the processor has no AVX2; "
            "build them with `python -m services.core.kernels.build`"
        )
    return None
