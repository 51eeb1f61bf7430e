"""A layer's experts over frames that lie in host memory: what an expert worker does for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from services.core.cuda.layer import CudaLayer
from services.core.cuda.staging import StagingBuffers
from services.core.expert_ffn import Assignments, MoeInput, PackedExpert, moe_forward_each


def staged_moe_forward(
    staging: StagingBuffers,
    experts: Mapping[int, PackedExpert] | CudaLayer,
    frames: Sequence[MoeInput],
) -> list[Tensor]:
    """`moe_forward_each` of CPU frames, answered on the CPU: one copy there and one wait back,
    however many frames and tensors there are."""
    tensors = [
        tensor
        for frame in frames
        for tensor in (
            frame.hidden_states,
            frame.assignments.token_rows,
            frame.assignments.topk_weights,
        )
    ]
    moved = iter(staging.to_device(tensors))
    there = [
        MoeInput(
            hidden_states=next(moved),
            assignments=Assignments(
                expert_ids=frame.assignments.expert_ids,
                rows_per_expert=frame.assignments.rows_per_expert,
                token_rows=next(moved),
                topk_weights=next(moved),
            ),
            combine=frame.combine,
        )
        for frame in frames
    ]
    if isinstance(experts, CudaLayer):
        return staging.to_host(experts.forward_frames(there)).wait()
    return staging.to_host(moe_forward_each(experts, there)).wait()
