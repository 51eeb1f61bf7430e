from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from router_service.dispatch.dispatch_plan import (
    DispatchPlan,
    GatedTokens,
    PlannedFrame,
    combine_frames,
    frame_bytes,
    group_by_expert,
    plan_dispatch,
    rows_that_fit,
    split_frame,
)
from router_service.dispatch.local_experts import LocalExperts
from router_service.experts import StepContext
from services.core.expert_ffn import PackedExpert, moe_forward
from services.core.wire import encode_request
from tests.support.moe_layers import random_expert, random_gate, random_workers_of_experts

H, F, E = 32, 48, 16


@pytest.fixture
def generator() -> torch.Generator:
    seed = int(torch.randint(2**31, ()))
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def experts_of(generator: torch.Generator, dtype: torch.dtype) -> dict[int, PackedExpert]:
    return {
        expert: random_expert(generator, hidden_size=H, intermediate_size=F, dtype=dtype)
        for expert in range(E)
    }


def answer(
    experts: dict[int, PackedExpert], gated: GatedTokens, frame: PlannedFrame, rows: Tensor
) -> tuple[PlannedFrame, Tensor]:
    """What a worker would send back for a frame with its rows."""
    return frame, moe_forward(experts, rows, frame.assignments, combine=gated.combine)


def answers(
    experts: dict[int, PackedExpert], gated: GatedTokens, plan: DispatchPlan, hidden_states: Tensor
) -> list[tuple[PlannedFrame, Tensor]]:
    numbers = hidden_states.view(torch.uint8).numpy()
    selected = [torch.from_numpy(rows).view(hidden_states.dtype) for rows in plan.select(numbers)]
    return [answer(experts, gated, *item) for item in zip(plan.frames, selected, strict=True)]


def combined(gated: GatedTokens, answered: Sequence[tuple[PlannedFrame, Tensor]]) -> Tensor:
    frames, rows = zip(*answered, strict=True)
    return combine_frames(gated, frames, torch.cat(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 4, 16])
async def test_the_sum_has_the_same_bits_whoever_computes_which_expert(
    generator: torch.Generator, dtype: torch.dtype, top_k: int
) -> None:
    experts = experts_of(generator, dtype)
    local = LocalExperts([experts], {})
    for num_tokens in (1, 5, 33):
        hidden_states = torch.randn(num_tokens, H, generator=generator).to(dtype)
        ids, weights = random_gate(generator, num_tokens=num_tokens, num_experts=E, top_k=top_k)
        expected = await local.forward(0, hidden_states, ids, weights, StepContext())
        gated = group_by_expert(ids, weights, E)
        for num_workers in range(1, 9):
            workers = random_workers_of_experts(generator, num_experts=E, num_workers=num_workers)
            answered = answers(experts, gated, plan_dispatch(gated, workers), hidden_states)
            order = torch.randperm(len(answered), generator=generator).tolist()
            output = combined(gated, [answered[index] for index in order])
            assert torch.equal(output.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("top_k", [1, 2, 4])
async def test_frames_of_a_first_try_and_of_a_resend_add_up_to_the_same_bits(
    generator: torch.Generator, top_k: int
) -> None:
    experts = experts_of(generator, torch.bfloat16)
    hidden_states = torch.randn(20, H, generator=generator).bfloat16()
    ids, weights = random_gate(generator, num_tokens=20, num_experts=E, top_k=top_k)
    gated = group_by_expert(ids, weights, E)
    expected = await LocalExperts([experts], {}).forward(
        0, hidden_states, ids, weights, StepContext()
    )
    workers = random_workers_of_experts(generator, num_experts=E, num_workers=3)
    failed = workers == 1
    first = plan_dispatch(gated, np.where(failed, -1, workers))
    again = plan_dispatch(gated, np.where(failed, np.arange(E) % 2, -1))
    answered = [
        *answers(experts, gated, first, hidden_states),
        *answers(experts, gated, again, hidden_states),
    ]
    assert torch.equal(combined(gated, answered), expected)


@pytest.mark.parametrize("top_k", [1, 2, 4])
async def test_a_frame_split_by_tokens_gives_the_whole_result(
    generator: torch.Generator, top_k: int
) -> None:
    experts = experts_of(generator, torch.float32)
    hidden_states = torch.randn(20, H, generator=generator)
    ids, weights = random_gate(generator, num_tokens=20, num_experts=E, top_k=top_k)
    gated = group_by_expert(ids, weights, E)
    expected = await LocalExperts([experts], {}).forward(
        0, hidden_states, ids, weights, StepContext()
    )
    workers = random_workers_of_experts(generator, num_experts=E, num_workers=2)
    frames = plan_dispatch(gated, workers).frames
    pieces = [piece for frame in frames for piece in split_frame(frame, 3)]
    assert max(len(piece.token_ids) for piece in pieces) <= 3
    answered = [
        answer(experts, gated, piece, hidden_states[torch.from_numpy(piece.token_ids)])
        for piece in pieces
    ]
    torch.testing.assert_close(combined(gated, answered), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 4, 16])
def test_a_worker_gets_each_of_its_tokens_once_in_the_order_the_wire_asks_for(
    generator: torch.Generator, top_k: int
) -> None:
    ids, weights = random_gate(generator, num_tokens=40, num_experts=E, top_k=top_k)
    gated = group_by_expert(ids, weights, E)
    workers = random_workers_of_experts(generator, num_experts=E, num_workers=4)
    seen: list[tuple[int, int, float]] = []
    for frame in plan_dispatch(gated, workers).frames:
        tokens = frame.token_ids
        assert tokens.tolist() == sorted(set(tokens.tolist()))
        assigned = frame.assignments
        assert list(assigned.expert_ids) == sorted(set(assigned.expert_ids))
        assert {workers[expert] for expert in assigned.expert_ids} == {frame.worker}
        assert set(assigned.token_rows.tolist()) == set(range(len(tokens)))
        start = 0
        for expert, count in zip(assigned.expert_ids, assigned.rows_per_expert, strict=True):
            rows = assigned.token_rows[start : start + count].tolist()
            row_weights = assigned.topk_weights[start : start + count].tolist()
            start += count
            assert rows == sorted(set(rows))
            seen.extend(
                (int(tokens[row]), expert, weight)
                for row, weight in zip(rows, row_weights, strict=True)
            )
    expected = [
        (token, int(expert), float(weight))
        for token in range(40)
        for expert, weight in zip(ids[token], weights[token], strict=True)
    ]
    assert sorted(seen) == sorted(expected)


def test_experts_without_a_worker_are_left_out() -> None:
    ids, weights = torch.tensor([[0, 1], [2, 1]]), torch.full((2, 2), 0.5)
    gated = group_by_expert(ids, weights, 4)
    (frame,) = plan_dispatch(gated, np.array([-1, 7, -1, 7])).frames
    assert frame.worker == 7
    assert frame.assignments.expert_ids == (1,)
    nothing = plan_dispatch(gated, np.full(4, -1))
    assert list(nothing.frames) == []
    assert list(nothing.select(np.zeros((2, H)))) == []


def test_negative_zero_comes_out_as_positive_zero_however_it_is_summed() -> None:
    gated = group_by_expert(torch.tensor([[0]]), torch.ones(1, 1), 2)
    (frame,) = plan_dispatch(gated, np.zeros(2, dtype=np.int64)).frames
    two = group_by_expert(torch.tensor([[0, 1, 2]]), torch.ones(1, 3), 3)
    frames = plan_dispatch(two, np.array([0, 1, 1])).frames
    rows = [torch.full((len(f.assignments.token_rows), H), -0.0) for f in frames]
    output = combined(two, list(zip(frames, rows, strict=True)))
    assert not torch.signbit(output).any()
    # A worker's own sum starts from zeros, so its answer has no negative zero to pass on.
    negative = torch.full((1, H), -0.0)
    zeros = torch.zeros(1, H).index_add_(0, frame.assignments.token_rows, negative)
    assert not torch.signbit(combine_frames(gated, [frame], zeros)).any()


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_frames_cut_to_a_bound_stay_below_it(generator: torch.Generator, top_k: int) -> None:
    bound = 20_000
    max_rows = rows_that_fit(bound, top_k=top_k, row_bytes=H * 4)
    assert frame_bytes(max_rows, top_k=top_k, row_bytes=H * 4) <= bound
    assert frame_bytes(max_rows + 1, top_k=top_k, row_bytes=H * 4) > bound
    ids, weights = random_gate(generator, num_tokens=max_rows, num_experts=E, top_k=top_k)
    hidden_states = torch.randn(max_rows, H, generator=generator)
    gated = group_by_expert(ids, weights, E)
    (frame,) = plan_dispatch(gated, np.zeros(E, dtype=np.int64)).frames
    encoded = encode_request(
        call_id=2**63,
        layer=2**31,
        hidden_states=hidden_states,
        assignments=frame.assignments,
        combine=gated.combine,
        traceparent="00-" + "f" * 52,
    )
    assert len(encoded) <= bound
