"""All of one layer's experts on a CUDA device, computed together for whole frames.

Shapes: A assignments, T tokens, E experts held, H hidden_size, F intermediate_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from services.core.cuda.device_support import DeviceSupport
from services.core.cuda.expert import CudaExpert, swiglu
from services.core.expert_ffn import MoeInput

GROUPED_ROWS = 64
"""Assignments from which one grouped product takes the place of a product per expert."""


class CudaLayer(Mapping[int, CudaExpert]):
    """Expert id -> expert, and the layer's part of a frame for all of them.

    Frames are merged: rows of an expert from several frames are computed as one. Where the device
    has a grouped product and weights are in the activation dtype, the experts' weights are moved
    into one piece, [E, 2F, H] and [E, H, F]; that needs a layer's weights twice for a moment.
    """

    def __init__(
        self, experts: Mapping[int, CudaExpert], *, grouped_rows: int | None = GROUPED_ROWS
    ) -> None:
        """`grouped_rows` None never groups."""
        self._experts = dict(sorted(experts.items()))
        self._places = {expert_id: place for place, expert_id in enumerate(self._experts)}
        self._stack = None if grouped_rows is None else _Stack.of(list(self._experts.values()))
        self._grouped_rows = grouped_rows or 0

    @property
    def is_grouped(self) -> bool:
        return self._stack is not None

    def forward_frames(self, frames: Sequence[MoeInput]) -> list[Tensor]:
        """What `moe_forward_each` gives: [T, H] for a frame to combine, else [A, H].

        Everything of the frames lies on the device; nothing waits for it.
        """
        if not frames:
            return []
        gathered = [f.hidden_states.index_select(0, f.assignments.token_rows) for f in frames]
        if len(frames) == 1:
            assigned = frames[0].assignments
            counts = dict(zip(assigned.expert_ids, assigned.rows_per_expert, strict=True))
            results = [self._ffn(gathered[0], counts)]
        else:
            results = self._merged(frames, gathered)
        return [_weighted(frame, rows) for frame, rows in zip(frames, results, strict=True)]

    def _merged(self, frames: Sequence[MoeInput], gathered: Sequence[Tensor]) -> list[Tensor]:
        """The experts' rows of each frame, in its order, computed expert by expert over all."""
        pieces = sorted(
            (expert_id, frame_index, count)
            for frame_index, frame in enumerate(frames)
            for expert_id, count in zip(
                frame.assignments.expert_ids, frame.assignments.rows_per_expert, strict=True
            )
        )
        taken = [0] * len(frames)
        rows, counts = [], dict[int, int]()
        for expert_id, frame_index, count in pieces:
            start = taken[frame_index]
            rows.append(gathered[frame_index][start : start + count])
            taken[frame_index] += count
            counts[expert_id] = counts.get(expert_id, 0) + count
        computed = self._ffn(torch.cat(rows), counts)
        parts = torch.split_with_sizes(computed, [count for _, _, count in pieces])
        return [
            torch.cat(
                [part for part, piece in zip(parts, pieces, strict=True) if piece[1] == frame_index]
            )
            for frame_index in range(len(frames))
        ]

    def _ffn(self, rows: Tensor, counts: Mapping[int, int]) -> Tensor:
        """Rows [A, H] in the order of `counts`, ascending expert ids -> [A, H]."""
        if self._stack is not None and len(rows) >= self._grouped_rows:
            per_place = [0] * len(self._experts)
            for expert_id, count in counts.items():
                per_place[self._places[expert_id]] = count
            return self._stack.forward(rows, per_place)
        result = torch.empty_like(rows)
        start = 0
        for expert_id, count in counts.items():
            own = slice(start, start + count)
            self._experts[expert_id].forward_into(rows[own], result[own])
            start += count
        return result

    def __getitem__(self, expert_id: int) -> CudaExpert:
        return self._experts[expert_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._experts)

    def __len__(self) -> int:
        return len(self._experts)


class _Stack:
    """The weights of all experts in one piece: w13 [E, 2F, H], w2 [E, H, F]."""

    def __init__(self, w13: Tensor, w2: Tensor) -> None:
        self._w13 = w13.transpose(1, 2)
        self._w2 = w2.transpose(1, 2)
        self._device = w13.device

    @classmethod
    def of(cls, experts: Sequence[CudaExpert]) -> _Stack | None:
        """Move the experts' weights into it; None where they cannot be used so."""
        products = [expert.stackable() for expert in experts]
        pairs = [pair for pair in products if pair is not None]
        if not pairs or len(pairs) < len(experts):
            return None
        weight = pairs[0][0].weight
        if weight.dtype != torch.bfloat16 or not DeviceSupport.of(weight.device).grouped:
            return None
        if any(size * weight.itemsize % 16 for size in pairs[0][1].weight.shape):
            return None  # the grouped product loads 16 bytes at a time
        stacks = []
        for part in (0, 1):
            linears = [pair[part] for pair in pairs]
            stack = _adjacent([linear.weight for linear in linears])
            if stack is None:
                stack = torch.empty(
                    (len(linears), *linears[0].weight.shape),
                    dtype=weight.dtype,
                    device=weight.device,
                )
                for place, linear in enumerate(linears):
                    stack[place].copy_(linear.weight)
                    linear.weight = stack[place]
            stacks.append(stack)
        return cls(*stacks)

    def forward(self, rows: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """Rows [A, H] in the order of the experts -> [A, H]."""
        ends = torch.tensor(list(accumulate(rows_per_expert)), dtype=torch.int32)
        if self._device.type == "cuda":
            ends = ends.pin_memory().to(self._device, non_blocking=True)
        gate_up = torch._grouped_mm(rows, self._w13, offs=ends)
        result: Tensor = torch._grouped_mm(swiglu(gate_up), self._w2, offs=ends)
        return result


def _adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors as one, without a copy, if they already lie one after the other in memory."""
    first = tensors[0]
    in_place = all(
        tensor.is_contiguous()
        and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and tensor.storage_offset() == first.storage_offset() + place * first.numel()
        for place, tensor in enumerate(tensors)
    )
    if not in_place:
        return None
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))


def _weighted(frame: MoeInput, rows: Tensor) -> Tensor:
    """Rows [A, H] weighted in float32 and rounded, and summed per token if the frame says so."""
    weights = frame.assignments.topk_weights[:, None]
    weighted = (rows * weights).to(rows.dtype)
    if not frame.combine:
        return weighted
    output = torch.zeros_like(frame.hidden_states)
    return output.index_add_(0, frame.assignments.token_rows, weighted)
