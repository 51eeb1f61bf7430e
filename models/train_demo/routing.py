"""Top-k routing and the loss that keeps the experts evenly used."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """One layer's decision for N tokens: K of E experts each; [N, E], [N, K] and [N, K]."""

    probabilities: Tensor
    topk_ids: Tensor
    topk_weights: Tensor

    def expert_load(self) -> Tensor:
        """Rows sent to each expert [E], int64; sums to N*K."""
        return torch.bincount(self.topk_ids.flatten(), minlength=self.probabilities.shape[1])

    def expert_share(self) -> Tensor:
        """`expert_load` as fractions of all rows [E], float32; sums to 1."""
        return self.expert_load().float() / self.topk_ids.numel()


def route(router_logits: Tensor, num_experts_per_tok: int) -> Routing:
    """Mixtral's gate (arXiv:2401.04088, section 2.1): softmax in float32, top-k, renormalised."""
    probabilities = router_logits.float().softmax(dim=-1)
    topk_weights, topk_ids = probabilities.topk(num_experts_per_tok, dim=-1)
    return Routing(
        probabilities=probabilities,
        topk_ids=topk_ids,
        topk_weights=topk_weights / topk_weights.sum(dim=-1, keepdim=True),
    )


def load_balancing_loss(routings: Sequence[Routing]) -> Tensor:
    """Mean over layers of `E * sum_e share_e * mean_probability_e`; 1.0 when all are balanced.

    The formula is equations 4 to 6 of Switch Transformers (arXiv:2101.03961), with the share
    counted over all K choices. It is taken layer by layer: pooled over layers first, as in
    `transformers`, it can sit at its balanced value while single layers have collapsed.
    """
    return torch.stack([_layer_balance(routing) for routing in routings]).mean()


def _layer_balance(routing: Routing) -> Tensor:
    mean_probability = routing.probabilities.mean(dim=0)
    num_experts = routing.probabilities.shape[1]
    return num_experts * torch.sum(routing.expert_share() * mean_probability)
