"""Random experts and what they should give, computed plainly in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from services.core.checkpoints.checkpoint import ExpertWeights
from services.core.expert_ffn import Assignments, MoeInput

CPU = torch.device("cpu")


def random_weights(hidden: int, intermediate: int) -> ExpertWeights:
    def matrix(out_features: int, in_features: int) -> Tensor:
        matrix: Tensor = torch.randn(out_features, in_features) * in_features**-0.5
        return matrix.bfloat16()

    return ExpertWeights(
        w1=matrix(intermediate, hidden),
        w2=matrix(hidden, intermediate),
        w3=matrix(intermediate, hidden),
    )


def ffn(w1: Tensor, w2: Tensor, w3: Tensor, rows: Tensor) -> Tensor:
    """SwiGLU of every row in float32."""
    x = rows.float()
    hidden = F.silu(x @ w1.float().t()) * (x @ w3.float().t())
    result: Tensor = hidden @ w2.float().t()
    return result


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def random_frame(
    num_tokens: int, hidden: int, expert_ids: list[int], *, top_k: int = 2, combine: bool = True
) -> MoeInput:
    """Each token goes to `top_k` of the experts, or to fewer where there are fewer."""
    chosen = [torch.randperm(len(expert_ids))[:top_k].tolist() for _ in range(num_tokens)]
    rows_of: dict[int, list[int]] = {}
    for token, places in enumerate(chosen):
        for place in places:
            rows_of.setdefault(expert_ids[place], []).append(token)
    used = sorted(rows_of)
    return MoeInput(
        hidden_states=torch.randn(num_tokens, hidden).bfloat16(),
        assignments=Assignments(
            expert_ids=tuple(used),
            rows_per_expert=tuple(len(rows_of[expert]) for expert in used),
            token_rows=torch.tensor([row for expert in used for row in rows_of[expert]]),
            topk_weights=torch.rand(sum(map(len, rows_of.values()))) + 0.1,
        ),
        combine=combine,
    )
