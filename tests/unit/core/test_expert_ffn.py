from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

from services.core.errors import UnsupportedModelError
from services.core.expert_ffn import (
    Assignments,
    MoeInput,
    PackedExpert,
    computed_digest,
    moe_forward,
    moe_forward_each,
)
from tests.support.checkpoints import fresh_seed
from tests.support.frames import random_assignments, random_weights

HIDDEN, INTERMEDIATE, NUM_EXPERTS = 64, 96, 4
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(fresh_seed())


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def native(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def make_experts(
    generator: torch.Generator, dtype: torch.dtype, native: bool
) -> dict[int, PackedExpert]:
    return {
        expert: PackedExpert(
            random_weights(generator, hidden=HIDDEN, intermediate=INTERMEDIATE, dtype=dtype),
            dtype=dtype,
            device=CPU,
            native=native,
        )
        for expert in range(NUM_EXPERTS)
    }


def make_frame(
    generator: torch.Generator, num_tokens: int, dtype: torch.dtype, *, combine: bool = True
) -> MoeInput:
    return MoeInput(
        hidden_states=torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype),
        assignments=random_assignments(
            generator, num_tokens=num_tokens, expert_ids=range(NUM_EXPERTS)
        ),
        combine=combine,
    )


@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 33, 300])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)],
)
def test_an_expert_equals_the_swiglu_formula(
    generator: torch.Generator,
    dtype: torch.dtype,
    tolerance: float,
    num_rows: int,
    native: bool,
) -> None:
    weights = random_weights(generator, hidden=HIDDEN, intermediate=INTERMEDIATE, dtype=dtype)
    rows = torch.randn(num_rows, HIDDEN, generator=generator).to(dtype)
    x, w1, w2, w3 = (t.double() for t in (rows, weights.w1, weights.w2, weights.w3))
    expected = F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
    result = PackedExpert(weights, dtype=dtype, device=CPU, native=native).forward(rows)
    assert result.dtype == dtype
    assert relative_error(result, expected) < tolerance


def test_the_sum_over_experts_equals_hugging_faces_eager_experts(
    generator: torch.Generator, native: bool
) -> None:
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
    )
    config._experts_implementation = "eager"
    oracle = MixtralExperts(config)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    experts: dict[int, PackedExpert] = {}
    for expert in range(NUM_EXPERTS):
        w1, w3 = oracle.gate_up_proj[expert].detach().chunk(2)
        weights = SimpleNamespace(w1=w1, w2=oracle.down_proj[expert].detach(), w3=w3)
        experts[expert] = PackedExpert(weights, dtype=torch.float32, device=CPU, native=native)
    hidden_states = torch.randn(37, HIDDEN, generator=generator)
    router_logits = torch.randn(37, NUM_EXPERTS, generator=generator)
    top_values, topk_ids = router_logits.topk(2)
    topk_weights = top_values.softmax(dim=-1)

    with torch.no_grad():
        expected = oracle(hidden_states, topk_ids, topk_weights)
    result = moe_forward(
        experts, hidden_states, assignments_of(topk_ids, topk_weights), combine=True
    )
    assert relative_error(result, expected) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_uncombined_rows_add_up_to_the_combined_ones_in_expert_order(
    generator: torch.Generator, dtype: torch.dtype, native: bool
) -> None:
    experts = make_experts(generator, dtype, native)
    frame = make_frame(generator, 9, dtype)
    rows = moe_forward(experts, frame.hidden_states, frame.assignments, combine=False)
    added = torch.zeros_like(frame.hidden_states)
    for row, token in zip(rows, frame.assignments.token_rows.tolist(), strict=True):
        added[token] += row
    combined = moe_forward(experts, frame.hidden_states, frame.assignments, combine=True)
    assert torch.equal(added, combined)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_frames_have_the_bits_they_have_alone(
    generator: torch.Generator, dtype: torch.dtype, native: bool
) -> None:
    experts = make_experts(generator, dtype, native)
    frames = [
        make_frame(generator, num_tokens, dtype, combine=num_tokens % 2 == 0)
        for num_tokens in (1, 2, 5, 16, 1, 40)
    ]
    merged = moe_forward_each(experts, frames)
    for frame, result in zip(frames, merged, strict=True):
        alone = moe_forward(experts, frame.hidden_states, frame.assignments, combine=frame.combine)
        assert torch.equal(result, alone)


def test_more_rows_than_are_computed_at_once_merge_without_a_change_of_bits(
    generator: torch.Generator, native: bool
) -> None:
    experts = make_experts(generator, torch.bfloat16, native)
    frames = [make_frame(generator, num_tokens, torch.bfloat16) for num_tokens in (2500, 3, 900)]
    merged = moe_forward_each(experts, frames)
    for frame, result in zip(frames, merged, strict=True):
        alone = moe_forward(experts, frame.hidden_states, frame.assignments, combine=True)
        assert torch.equal(result, alone)


def test_the_input_is_not_written_to(generator: torch.Generator, native: bool) -> None:
    experts = make_experts(generator, torch.float32, native)
    frame = make_frame(generator, 6, torch.float32)
    before = frame.hidden_states.clone(), frame.assignments.topk_weights.clone()
    moe_forward_each(experts, [frame, frame])
    assert torch.equal(frame.hidden_states, before[0])
    assert torch.equal(frame.assignments.topk_weights, before[1])


def test_weights_are_converted_to_the_activation_dtype(generator: torch.Generator) -> None:
    weights = random_weights(
        generator, hidden=HIDDEN, intermediate=INTERMEDIATE, dtype=torch.float32
    )
    expert = PackedExpert(weights, dtype=torch.bfloat16, device=CPU)
    assert expert.weight_bytes == 3 * HIDDEN * INTERMEDIATE * 2
    assert expert.forward(torch.zeros(1, HIDDEN, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_an_activation_other_than_silu_is_refused(generator: torch.Generator) -> None:
    weights = random_weights(
        generator, hidden=HIDDEN, intermediate=INTERMEDIATE, dtype=torch.float32
    )
    with pytest.raises(UnsupportedModelError, match="'relu'"):
        PackedExpert(weights, dtype=torch.float32, device=CPU, hidden_act="relu")


def test_the_digest_tells_weights_and_formats_apart() -> None:
    digests = {computed_digest(stored, name) for stored in (b"a", b"b") for name in ("bf16", "x")}
    assert len(digests) == 4
    assert {len(digest) for digest in digests} == {16}


def assignments_of(topk_ids: Tensor, topk_weights: Tensor) -> Assignments:
    """Assignments of all tokens, ascending by expert and row."""
    token_rows, slots = zip(
        *[(topk_ids == expert).nonzero(as_tuple=True) for expert in range(NUM_EXPERTS)],
        strict=True,
    )
    return Assignments(
        expert_ids=tuple(range(NUM_EXPERTS)),
        rows_per_expert=tuple(len(rows) for rows in token_rows),
        token_rows=torch.cat(token_rows),
        topk_weights=torch.cat(
            [topk_weights[rows, slot] for rows, slot in zip(token_rows, slots, strict=True)]
        ),
    )


def relative_error(result: Tensor, expected: Tensor) -> float:
    difference = (result.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max())
