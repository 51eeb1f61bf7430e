"""The experts of a MoE layer in one native call."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.core.kernels.library import NativeLibrary
from services.core.kernels.matrix import ACTIVATIONS, MatrixStruct, NativeMatrix


class _ExpertStruct(ctypes.Structure):
    """`Expert` of native/moe.cpp."""

    _fields_ = (("gate", MatrixStruct), ("up", MatrixStruct), ("down", MatrixStruct))


class NativeExpert:
    """w1 [F, H] gate, w3 [F, H] up and w2 [H, F] down of one expert, in one format."""

    def __init__(self, *, gate: NativeMatrix, up: NativeMatrix, down: NativeMatrix) -> None:
        assert gate.weight_format == up.weight_format == down.weight_format
        self.library = gate.library
        self.hidden_size = gate.in_features
        self._matrices = gate, up, down
        self._struct = _ExpertStruct(gate.struct, up.struct, down.struct)
        self.address = ctypes.addressof(self._struct)


class NativeFrame(NamedTuple):
    """hidden_states [T, H] and assignments of its rows, in the order of the experts.

    `output`, contiguous, is [T, H] and added to if `combine`, else [A, H]. Without `token_rows`
    int64 [A], assignment i is of row i; without `topk_weights` float32 [A], all weights are 1.
    """

    hidden_states: Tensor
    token_rows: Tensor | None
    topk_weights: Tensor | None
    output: Tensor
    combine: bool


class NativePart(NamedTuple):
    """Assignments start .. start + num_rows of a frame, all of one expert."""

    expert: NativeExpert
    frame: int
    start: int
    num_rows: int


def native_moe(frames: Sequence[NativeFrame], parts: Sequence[NativePart]) -> None:
    """Compute the outputs of all frames, float32 or bfloat16; parts in ascending expert id.

    A row has the same bits whatever is computed beside it. Raises `ValueError` for rows of another
    length than the experts', `IndexError` for a token row that a frame does not have.
    """
    if not parts:
        return
    held: list[Tensor] = []
    frame_words = array("q")
    for frame in frames:
        rows = frame.hidden_states.contiguous()
        assert frame.output.is_contiguous()
        if rows.shape[1] != parts[0].expert.hidden_size:
            raise ValueError(f"rows of {rows.shape[1]}, not of {parts[0].expert.hidden_size}")
        held.append(rows)
        frame_words.extend(
            (
                rows.data_ptr(),
                len(rows),
                _address(frame.token_rows, torch.int64, held),
                _address(frame.topk_weights, torch.float32, held),
                frame.output.data_ptr(),
                frame.combine,
            )
        )
    part_words = array("q")
    for expert, frame_index, start, num_rows in parts:
        part_words.extend((expert.address, frame_index, start, num_rows))
    is_done = _declared(parts[0].expert.library).ef_moe_forward(
        frame_words.buffer_info()[0],
        part_words.buffer_info()[0],
        len(parts),
        ACTIVATIONS[frames[0].hidden_states.dtype],
    )
    if not is_done:
        raise IndexError("token_rows has rows that hidden_states has not")


class NativeLayer:
    """All experts of a layer, for who holds every one of them."""

    def __init__(self, experts: Sequence[NativeExpert]) -> None:
        """In the order of their ids."""
        self._experts = tuple(experts)
        self._addresses = array("q", [expert.address for expert in experts])
        self._forward = _declared(experts[0].library).ef_moe_gated

    def forward(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> tuple[Tensor, NDArray[np.int64]]:
        """[T, H], float32 or bfloat16, the gate's int64 [T, K] and float32 [T, K], on the CPU ->
        [T, H], and the rows of each expert [E]. The bits are those of `native_moe`."""
        rows, ids, weights = (
            tensor.contiguous() for tensor in (hidden_states, topk_ids, topk_weights)
        )
        if rows.shape[1] != self._experts[0].hidden_size:
            raise ValueError(f"rows of {rows.shape[1]}, not of {self._experts[0].hidden_size}")
        assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
        output = torch.zeros_like(rows)
        rows_per_expert = np.empty(len(self._experts), dtype=np.int64)
        self._forward(
            self._addresses.buffer_info()[0],
            len(self._experts),
            rows.data_ptr(),
            len(rows),
            ids.data_ptr(),
            weights.data_ptr(),
            ids.shape[1],
            output.data_ptr(),
            rows_per_expert.ctypes.data,
            ACTIVATIONS[rows.dtype],
        )
        return output, rows_per_expert


def _address(values: Tensor | None, dtype: torch.dtype, held: list[Tensor]) -> int:
    """Of contiguous values of the dtype, which `held` keeps alive; 0 for None."""
    if values is None:
        return 0
    held.append(values.to(dtype).contiguous())
    return held[-1].data_ptr()


@functools.cache
def _declared(library: NativeLibrary) -> ctypes.CDLL:
    functions = library.functions
    pointer = ctypes.c_void_p
    functions.ef_moe_forward.argtypes = [pointer, pointer, ctypes.c_int64, ctypes.c_int32]
    functions.ef_moe_forward.restype = ctypes.c_int32
    functions.ef_moe_gated.argtypes = [
        *(pointer, ctypes.c_int64, pointer, ctypes.c_int64, pointer, pointer, ctypes.c_int64),
        *(pointer, pointer, ctypes.c_int32),
    ]
    functions.ef_moe_gated.restype = None
    return functions
