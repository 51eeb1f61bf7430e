from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from router_service.model.gate import TopKGate
from services.core.kernels.library import Isa, native_library
from services.core.kernels.row_ops import topk_gate

needs_native = pytest.mark.skipif(native_library() is None, reason="kernels are not built")


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
    topk_ids, topk_weights = TopKGate(router.weight.detach(), num_experts_per_tok=k, native=False)(
        hidden_states
    )
    _, expected_weights, expected_ids = router(hidden_states)
    assert torch.equal(topk_ids, expected_ids)
    assert torch.equal(topk_weights, expected_weights)
    assert topk_weights.dtype == torch.float32
    assert topk_ids.dtype == torch.int64


@needs_native
@pytest.mark.parametrize("isa", [Isa.AMX, Isa.AVX2, Isa.PORTABLE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_experts", "k", "size"), [(2, 1, 32), (8, 2, 1024), (17, 5, 75)])
def test_the_native_gate_is_right_up_to_the_rounding_of_its_logits(
    isa: Isa, dtype: torch.dtype, num_experts: int, k: int, size: int
) -> None:
    library = native_library()
    assert library is not None
    weight = (torch.randn(num_experts, size) / size**0.5).to(dtype)
    hidden_states = torch.randn(50, size).to(dtype)
    library.limit_isa(isa)
    try:
        topk_ids, topk_weights = topk_gate(library, hidden_states, weight, k)
    finally:
        library.limit_isa(Isa.AMX)
    exact = hidden_states.double() @ weight.double().T
    # One rounding of the largest logit, to bf16 or in the sum, decides within this.
    slack = 2.0 ** (-8 if dtype == torch.bfloat16 else -18) * exact.abs().amax(1, keepdim=True)
    chosen = exact.gather(1, topk_ids)
    assert (chosen >= exact.topk(k, dim=1).values - 2 * slack).all()
    assert (chosen[:, :-1] >= chosen[:, 1:] - 2 * slack).all()
    expected = chosen.to(dtype).float().softmax(1) if dtype == torch.float32 else None
    if expected is not None:
        torch.testing.assert_close(topk_weights, expected, atol=1e-4, rtol=1e-4)
    else:
        ratios = (topk_weights.double().log() - chosen).diff(dim=1).abs()
        assert (ratios <= 2 * slack + 1e-5).all()
    torch.testing.assert_close(topk_weights.sum(1), torch.ones(50))
    assert all(len(set(row)) == k for row in topk_ids.tolist())


@needs_native
def test_of_experts_that_are_equally_likely_the_native_gate_takes_the_lower_ids() -> None:
    weight = torch.randn(1, 64).expand(8, 64).contiguous()
    topk_ids, topk_weights = TopKGate(weight, num_experts_per_tok=3)(torch.randn(5, 64))
    assert topk_ids.tolist() == [[0, 1, 2]] * 5
    torch.testing.assert_close(topk_weights, torch.full((5, 3), 1 / 3))


@needs_native
def test_a_row_that_is_not_finite_gets_distinct_experts_and_disturbs_no_other() -> None:
    gate = TopKGate(torch.randn(8, 64), num_experts_per_tok=2)
    hidden_states = torch.randn(3, 64)
    expected_ids, expected_weights = gate(hidden_states)
    hidden_states[1, 5] = float("nan")
    topk_ids, topk_weights = gate(hidden_states)
    assert topk_weights[1].isnan().all()
    assert len(set(topk_ids[1].tolist())) == 2
    assert torch.equal(topk_ids[[0, 2]], expected_ids[[0, 2]])
    assert torch.equal(topk_weights[[0, 2]], expected_weights[[0, 2]])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    gate = TopKGate(torch.randn(8, 1024).to(dtype), num_experts_per_tok=2)
    hidden_states = torch.randn(200, 1024).to(dtype)
    topk_ids, topk_weights = gate(hidden_states)
    for rows in (slice(3, 4), slice(10, 43), slice(100, 200)):
        ids, weights = gate(hidden_states[rows])
        assert torch.equal(ids, topk_ids[rows])
        assert torch.equal(weights, topk_weights[rows])


def test_a_tokens_weights_sum_to_one_and_a_single_expert_has_weight_one() -> None:
    weight, hidden_states = torch.randn(8, 32), torch.randn(20, 32)
    _, topk_weights = TopKGate(weight, num_experts_per_tok=3)(hidden_states)
    torch.testing.assert_close(topk_weights.sum(-1), torch.ones(20))
    _, topk_weights = TopKGate(weight, num_experts_per_tok=1)(hidden_states)
    assert torch.equal(topk_weights, torch.ones(20, 1))
