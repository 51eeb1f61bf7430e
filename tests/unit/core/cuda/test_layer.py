"""A layer's experts over whole frames, against the experts one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from services.core.cuda.expert import CudaExpert
from services.core.cuda.frames import staged_moe_forward
from services.core.cuda.layer import CudaLayer
from services.core.cuda.staging import StagingBuffers
from services.core.expert_ffn import MoeInput, moe_forward_each
from tests.unit.core.cuda.oracle import CPU, ffn, random_frame, random_weights, relative_error

HIDDEN, INTERMEDIATE = 64, 96
EXPERTS = [1, 3, 4, 6]


def _experts() -> dict[int, CudaExpert]:
    return {
        expert: CudaExpert(random_weights(HIDDEN, INTERMEDIATE), dtype=torch.bfloat16, device=CPU)
        for expert in EXPERTS
    }


def _plain(experts: dict[int, CudaExpert], frame: MoeInput) -> Tensor:
    """The frame's part of the layer in float32, assignment by assignment."""
    assigned = frame.assignments
    expert_of = [
        expert
        for expert, count in zip(assigned.expert_ids, assigned.rows_per_expert, strict=True)
        for _ in range(count)
    ]
    rows = [
        weight * ffn(*experts[expert].dequantised(), frame.hidden_states[token][None])[0]
        for expert, token, weight in zip(
            expert_of, assigned.token_rows.tolist(), assigned.topk_weights, strict=True
        )
    ]
    if not frame.combine:
        return torch.stack(rows)
    output = torch.zeros(frame.hidden_states.shape)
    for token, row in zip(assigned.token_rows.tolist(), rows, strict=True):
        output[token] += row
    return output


@pytest.mark.parametrize("grouped_rows", [None, 1], ids=["one by one", "grouped"])
@pytest.mark.parametrize("combine", [True, False])
def test_frames_are_the_weighted_sums_of_their_experts(
    grouped_rows: int | None, combine: bool
) -> None:
    experts = _experts()
    frames = [random_frame(tokens, HIDDEN, EXPERTS, combine=combine) for tokens in (7, 1, 20)]
    wanted = [_plain(experts, frame) for frame in frames]
    layer = CudaLayer(experts, grouped_rows=grouped_rows)
    assert layer.is_grouped == (grouped_rows is not None)
    for got, want in zip(layer.forward_frames(frames), wanted, strict=True):
        assert relative_error(got, want) <= 0.01
    for frame, want in zip(frames, wanted, strict=True):
        assert relative_error(layer.forward_frames([frame])[0], want) <= 0.01


def test_experts_without_rows_are_left_out_of_a_grouped_product() -> None:
    experts = _experts()
    frame = random_frame(5, HIDDEN, [3], combine=True)
    wanted = _plain(experts, frame)
    got = CudaLayer(experts, grouped_rows=1).forward_frames([frame])[0]
    assert relative_error(got, wanted) <= 0.01


def test_few_rows_are_computed_expert_by_expert() -> None:
    experts = _experts()
    frame = random_frame(4, HIDDEN, EXPERTS)
    one_by_one = CudaLayer(experts, grouped_rows=None).forward_frames([frame])[0]
    assert torch.equal(CudaLayer(experts).forward_frames([frame])[0], one_by_one)


def test_stacking_moves_the_weights_instead_of_copying_them() -> None:
    experts = _experts()
    rows = torch.randn(3, HIDDEN).bfloat16()
    before = experts[3].forward(rows)
    CudaLayer(experts)
    linears = [expert.stackable() for expert in experts.values()]
    storages = {pair[0].weight.untyped_storage().data_ptr() for pair in linears if pair}
    assert len(storages) == 1
    assert torch.equal(experts[3].forward(rows), before)


def test_weights_that_lie_together_are_not_moved() -> None:
    w13 = torch.randn(3, 2 * INTERMEDIATE, HIDDEN).bfloat16()
    w2 = torch.randn(3, HIDDEN, INTERMEDIATE).bfloat16()
    layer = CudaLayer({e: CudaExpert.of_stacked(w13[e], w2[e]) for e in range(3)})
    assert layer.is_grouped
    pair = layer[2].stackable()
    assert pair is not None
    assert pair[0].weight.data_ptr() == w13[2].data_ptr()


def test_quantised_experts_are_not_grouped() -> None:
    experts = {
        e: CudaExpert(
            random_weights(64, 96), dtype=torch.bfloat16, device=CPU, weight_format="int8"
        )
        for e in range(2)
    }
    assert not CudaLayer(experts).is_grouped


@pytest.mark.parametrize("is_layer", [True, False], ids=["layer", "mapping"])
def test_frames_in_host_memory_are_answered_there(is_layer: bool) -> None:
    layer = CudaLayer(_experts())
    frames = [random_frame(6, HIDDEN, EXPERTS, combine=combine) for combine in (True, False)]
    wanted = layer.forward_frames(frames)
    experts: Any = layer if is_layer else dict(layer)
    got = staged_moe_forward(StagingBuffers(CPU), experts, frames)
    for one, other in zip(got, wanted, strict=True):
        assert relative_error(one, other) <= 0.01
    assert staged_moe_forward(StagingBuffers(CPU), layer, []) == []


def test_the_layer_is_a_mapping_that_the_common_code_can_use() -> None:
    layer = CudaLayer(_experts())
    frames = [random_frame(6, HIDDEN, EXPERTS) for _ in range(2)]
    for got, want in zip(
        layer.forward_frames(frames),
        moe_forward_each(layer, frames),  # type: ignore[arg-type]
        strict=True,
    ):
        assert relative_error(got, want) <= 0.01
