"""The MoE gate: which experts a token goes to, and how much each counts."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from services.core.kernels.choice import native_kernels_for
from services.core.kernels.row_ops import topk_gate


class TopKGate:
    """Softmax over all experts, top k, renormalised (Jiang et al. 2024, Mixtral of Experts).

    The linear is in the model's dtype, the softmax in float32; with k = 1 every weight is 1. The
    native gate takes the lower id of two experts that are equally likely, torch's either.
    """

    def __init__(self, weight: Tensor, *, num_experts_per_tok: int, native: bool = True) -> None:
        self.weight = weight.contiguous()
        self.num_experts_per_tok = num_experts_per_tok
        self._library = native_kernels_for(weight.dtype, weight.device) if native else None

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] -> topk_ids int64 [T, K], topk_weights float32 [T, K], best first."""
        if self._library is not None:
            return topk_gate(self._library, hidden_states, self.weight, self.num_experts_per_tok)
        router_logits = F.linear(hidden_states, self.weight)
        probabilities = torch.softmax(router_logits, dim=-1, dtype=torch.float32)
        topk_weights, topk_ids = torch.topk(probabilities, self.num_experts_per_tok, dim=-1)
        topk_weights /= topk_weights.sum(dim=-1, keepdim=True)
        return topk_ids, topk_weights
