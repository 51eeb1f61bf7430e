"""One expert's SwiGLU FFN (Shazeer 2020) and the sum over a token's experts.

Shared by the expert worker, the in-process backend and the dense MLP, so that the same rows give
the same bits whichever process computes them: with the native kernels a row's bits depend on that
row and the weights alone; with torch's, also on the number of rows and of threads.

Shapes: R rows of one expert, T tokens, A assignments, H hidden_size, F intermediate_size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from services.core.errors import UnsupportedModelError
from services.core.kernels.moe import NativeExpert, NativeFrame, NativePart, native_moe
from services.core.packed_linear import PackedLinear
from services.core.quantization.formats import QuantizedFormat
from services.core.row_source import RowSource

_MAX_ROWS_AT_ONCE = 1024
_PART_BYTES = 64 << 20


class FfnWeights(Protocol):
    """w1 [F, H] gate, w3 [F, H] up, w2 [H, F] down."""

    @property
    def w1(self) -> RowSource: ...
    @property
    def w2(self) -> RowSource: ...
    @property
    def w3(self) -> RowSource: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignments:
    """The (token, expert) pairs of one frame: ascending expert id, within it ascending row.

    `token_rows` int64 [A] are rows of the frame's hidden_states, `topk_weights` float32 [A].
    """

    expert_ids: tuple[int, ...]
    rows_per_expert: tuple[int, ...]
    token_rows: Tensor
    topk_weights: Tensor

    def to(self, device: torch.device) -> Assignments:
        """Its tensors on `device`, where hidden_states lies."""
        if self.token_rows.device == device:
            return self
        return Assignments(
            expert_ids=self.expert_ids,
            rows_per_expert=self.rows_per_expert,
            token_rows=self.token_rows.to(device),
            topk_weights=self.topk_weights.to(device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeInput:
    """One frame's part of a layer: hidden_states [T, H] and who gets which row.

    `combine` true gives one row per token, the sum over its experts; false gives one weighted row
    per assignment, in their order.
    """

    hidden_states: Tensor
    assignments: Assignments
    combine: bool


class PackedExpert:
    """An expert's weights in the layout of the fastest kernel at hand (see `PackedLinear`).

    `native` is what native kernels compute with, and None without them: then the activation is
    fused into torch's first product; fusing w1 and w3 into one product measured no faster. Each
    matrix is asked for once and its unpacked form is not kept. With weights that are read when
    asked for, packing takes about `_PART_BYTES` more memory than the result.
    """

    def __init__(
        self,
        weights: FfnWeights,
        *,
        dtype: torch.dtype,
        device: torch.device,
        hidden_act: str = "silu",
        native: bool = True,
        quantized: QuantizedFormat | None = None,
    ) -> None:
        if hidden_act not in ("silu", "swish"):
            raise UnsupportedModelError(
                f"hidden_act {hidden_act!r} is not served; experts must use 'silu'"
            )
        self.weight_format = weight_format(dtype, quantized)
        packed = partial(
            PackedLinear, dtype=dtype, device=device, native=native, weight_format=quantized
        )
        self._gate = packed(weights.w1, silu=True)
        self._up = packed(weights.w3)
        self._down = packed(weights.w2, part_bytes=_PART_BYTES)
        self.weight_bytes = sum(p.weight_bytes for p in (self._gate, self._up, self._down))
        gate, up, down = self._gate.native, self._up.native, self._down.native
        self.native: NativeExpert | None = None
        if gate is not None and up is not None and down is not None:
            self.native = NativeExpert(gate=gate, up=up, down=down)

    def forward(self, rows: Tensor) -> Tensor:
        """w2(silu(w1 x) * w3 x) of every row: [R, H] -> [R, H] in the weights' dtype."""
        return self.forward_each([rows])[0]

    def forward_each(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """`forward` of several batches of rows, each with the bits it has when computed alone.

        Kernels may round a row differently at another row count, so batches are not concatenated;
        instead each weight matrix is applied to all batches while it is in the cache, which takes
        about two thirds of the time of computing batch after batch.
        """
        if self.native is not None:
            return self._forward_natively(self.native, batches)
        if sum(len(rows) for rows in batches) > _MAX_ROWS_AT_ONCE:
            return [self._forward_chunked(rows) for rows in batches]
        return self._forward_each(batches)

    def _forward_natively(self, expert: NativeExpert, batches: Sequence[Tensor]) -> list[Tensor]:
        outputs = [rows.new_empty(rows.shape) for rows in batches]
        native_moe(
            [
                NativeFrame(rows, None, None, out, False)
                for rows, out in zip(batches, outputs, strict=True)
            ],
            [NativePart(expert, i, 0, len(rows)) for i, rows in enumerate(batches)],
        )
        return outputs

    def _forward_chunked(self, rows: Tensor) -> Tensor:
        chunks = torch.split(rows, _MAX_ROWS_AT_ONCE)
        return torch.cat([self._forward_each([chunk])[0] for chunk in chunks])

    def _forward_each(self, batches: Sequence[Tensor]) -> list[Tensor]:
        gates = [self._gate(rows) for rows in batches]
        for gate, rows in zip(gates, batches, strict=True):
            gate.mul_(self._up(rows))
        return [self._down(gate) for gate in gates]


def weight_format(dtype: torch.dtype, quantized: QuantizedFormat | None = None) -> str:
    """What the wire calls weights that are held in an activation dtype, or quantised."""
    if quantized is not None:
        return quantized
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "float32")


def computed_digest(stored_digest: bytes, weight_format: str) -> bytes:
    """16 bytes, equal for replicas of a slot that can stand in for each other."""
    return hashlib.blake2b(stored_digest + weight_format.encode(), digest_size=16).digest()


def moe_forward(
    experts: Mapping[int, PackedExpert],
    hidden_states: Tensor,
    assignments: Assignments,
    *,
    combine: bool,
) -> Tensor:
    """The experts' part of a MoE layer for one frame: [T, H] if `combine`, else [A, H].

    A weighted row is (FFN row in float32 * weight), rounded to the activation dtype; sums are in
    the activation dtype, expert by expert in ascending id, as Hugging Face's eager experts do.
    """
    frame = MoeInput(hidden_states=hidden_states, assignments=assignments, combine=combine)
    return moe_forward_each(experts, [frame])[0]


def moe_forward_each(
    experts: Mapping[int, PackedExpert], frames: Sequence[MoeInput]
) -> list[Tensor]:
    """`moe_forward` of several frames of one layer, each with the bits it has when alone."""
    outputs = [_empty_output(frame) for frame in frames]
    parts = _ordered_parts(frames)
    native_parts = [
        NativePart(native, part.frame_index, part.start, part.stop - part.start)
        for part in parts
        if (native := experts[part.expert_id].native) is not None
    ]
    if len(native_parts) == len(parts):
        native_moe(_native_frames(frames, outputs), native_parts)
        return outputs
    for expert_id, of_expert in groupby(parts, key=attrgetter("expert_id")):
        addends = [
            _Addend(frames[part.frame_index], outputs[part.frame_index], part.start, part.stop)
            for part in of_expert
        ]
        results = experts[expert_id].forward_each([addend.rows() for addend in addends])
        for addend, result in zip(addends, results, strict=True):
            addend.add_to_output(result)
    return outputs


def _native_frames(frames: Sequence[MoeInput], outputs: Sequence[Tensor]) -> list[NativeFrame]:
    return [
        NativeFrame(
            frame.hidden_states,
            frame.assignments.token_rows,
            frame.assignments.topk_weights,
            output,
            frame.combine,
        )
        for frame, output in zip(frames, outputs, strict=True)
    ]


class _Part(NamedTuple):
    """Assignments start:stop of one frame, all of one expert."""

    expert_id: int
    frame_index: int
    start: int
    stop: int


def _ordered_parts(frames: Sequence[MoeInput]) -> list[_Part]:
    """All that have rows, in ascending expert id and within it in the order of the frames."""
    parts: list[_Part] = []
    for index, frame in enumerate(frames):
        start = 0
        assigned = frame.assignments
        for expert_id, count in zip(assigned.expert_ids, assigned.rows_per_expert, strict=True):
            if count:
                parts.append(_Part(expert_id, index, start, start + count))
            start += count
    parts.sort(key=attrgetter("expert_id"))
    return parts


class _Addend(NamedTuple):
    """What torch adds to a frame's output: assignments start:stop, all of one expert."""

    frame: MoeInput
    output: Tensor
    start: int
    stop: int

    def rows(self) -> Tensor:
        if self._is_whole():
            return self.frame.hidden_states
        return self.frame.hidden_states[self._token_rows()]

    def add_to_output(self, result: Tensor) -> None:
        weights = self.frame.assignments.topk_weights[self.start : self.stop, None]
        weighted = (result * weights).to(result.dtype)  # the product is in float32
        if not self.frame.combine:
            self.output[self.start : self.stop] = weighted
        elif self._is_whole():
            self.output.add_(weighted)
        else:
            self.output.index_add_(0, self._token_rows(), weighted)

    def _token_rows(self) -> Tensor:
        return self.frame.assignments.token_rows[self.start : self.stop]

    def _is_whole(self) -> bool:
        """Rows ascend strictly, so as many assignments as tokens are all tokens in order."""
        return self.stop - self.start == self.frame.hidden_states.shape[0]


def _empty_output(frame: MoeInput) -> Tensor:
    if frame.combine:
        return torch.zeros_like(frame.hidden_states, memory_format=torch.contiguous_format)
    num_rows = len(frame.assignments.token_rows)
    return frame.hidden_states.new_empty((num_rows, frame.hidden_states.shape[1]))
