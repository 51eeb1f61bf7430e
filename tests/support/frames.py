"""Random frames and experts for tests of the dispatch wire and of what computes frames."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from services.core.checkpoints.checkpoint import ExpertWeights
from services.core.expert_ffn import Assignments


def random_weights(
    generator: torch.Generator, *, hidden: int, intermediate: int, dtype: torch.dtype
) -> ExpertWeights:
    """Weights that keep a row's scale about as it is."""

    def matrix(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
        return values.to(dtype)

    return ExpertWeights(
        w1=matrix(intermediate, hidden),
        w2=matrix(hidden, intermediate),
        w3=matrix(intermediate, hidden),
    )


def random_assignments(
    generator: torch.Generator, *, num_tokens: int, expert_ids: Sequence[int]
) -> Assignments:
    """Each expert gets a random, non-empty choice of the tokens."""
    rows: list[Tensor] = []
    for _ in expert_ids:
        count = int(torch.randint(1, num_tokens + 1, (1,), generator=generator))
        rows.append(torch.randperm(num_tokens, generator=generator)[:count].sort().values)
    token_rows = torch.cat(rows)
    return Assignments(
        expert_ids=tuple(expert_ids),
        rows_per_expert=tuple(len(part) for part in rows),
        token_rows=token_rows,
        topk_weights=torch.rand(len(token_rows), generator=generator),
    )
