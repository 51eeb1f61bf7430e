from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from router_service.model.gate import TopKGate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_experts", "k"), [(2, 1), (8, 2), (16, 4), (16, 16)])
def test_gate_equals_the_router_of_transformers(
    dtype: torch.dtype, num_experts: int, k: int
) -> None:
    config = MixtralConfig(hidden_size=32, num_local_experts=num_experts, num_experts_per_tok=k)
    router = MixtralTopKRouter(config).to(dtype)
    with torch.no_grad():
        router.weight.normal_()
    hidden_states = torch.randn(50, 32).to(dtype)
    topk_ids, topk_weights = TopKGate(router.weight.detach(), num_experts_per_tok=k)(hidden_states)
    _, expected_weights, expected_ids = router(hidden_states)
    assert torch.equal(topk_ids, expected_ids)
    assert torch.equal(topk_weights, expected_weights)
    assert topk_weights.dtype == torch.float32
    assert topk_ids.dtype == torch.int64


def test_a_tokens_weights_sum_to_one_and_a_single_expert_has_weight_one() -> None:
    weight, hidden_states = torch.randn(8, 32), torch.randn(20, 32)
    _, topk_weights = TopKGate(weight, num_experts_per_tok=3)(hidden_states)
    torch.testing.assert_close(topk_weights.sum(-1), torch.ones(20))
    _, topk_weights = TopKGate(weight, num_experts_per_tok=1)(hidden_states)
    assert torch.equal(topk_weights, torch.ones(20, 1))
