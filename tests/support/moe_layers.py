"""Random experts and gates for tests of what lies between gate and experts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from services.core.expert_ffn import PackedExpert


def random_expert(
    generator: torch.Generator, *, hidden_size: int, intermediate_size: int, dtype: torch.dtype
) -> PackedExpert:
    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).div_(shape[-1] ** 0.5)

    weights = SimpleNamespace(
        w1=weight(intermediate_size, hidden_size),
        w2=weight(hidden_size, intermediate_size),
        w3=weight(intermediate_size, hidden_size),
    )
    return PackedExpert(weights, dtype=dtype, device=torch.device("cpu"))


def random_gate(
    generator: torch.Generator, *, num_tokens: int, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """topk_ids int64 [T, K], distinct within a row, and topk_weights float32 [T, K]."""
    weights, ids = torch.randn(num_tokens, num_experts, generator=generator).topk(top_k)
    return ids, weights.softmax(-1)


def random_workers_of_experts(
    generator: torch.Generator, *, num_experts: int, num_workers: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """int64 [E]: any worker for each expert; some workers may get none."""
    drawn = torch.randint(num_workers, (num_experts,), generator=generator)
    workers: np.ndarray[tuple[int], np.dtype[np.int64]] = drawn.numpy()
    return workers
