"""What must hold of a frame's fields before anything is done with them.

All raise `MalformedFrameError` saying what was seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protos import experts_pb2
from services.core.errors import MalformedFrameError
from services.core.expert_ffn import Assignments
from services.core.tensor_codec import DTYPE_TO_PROTO, PROTO_TO_DTYPE, tensor_from_buffer

WIRE_DTYPE_TO_PROTO = DTYPE_TO_PROTO | {torch.int8: experts_pb2.DTYPE_INT8}
"""Activation dtypes, and int8, which only rows on the wire are in."""
_PROTO_TO_DTYPE = PROTO_TO_DTYPE | {int(experts_pb2.DTYPE_INT8): torch.int8}


def checked_tensor(payload: memoryview, proto_dtype: int, num_rows: int, row_values: int) -> Tensor:
    dtype = checked_dtype(proto_dtype)
    expected = num_rows * row_values * dtype.itemsize
    if not expected or len(payload) != expected:
        raise MalformedFrameError(
            f"hidden_states has {len(payload)} bytes; [{num_rows}, {row_values}] in {dtype} "
            f"takes {expected}, and may not be empty"
        )
    return tensor_from_buffer(payload, dtype, (num_rows, row_values))


def check_payload(payload: memoryview, dtype: torch.dtype, num_rows: int) -> None:
    """Raise unless the bytes are so many whole rows of one width."""
    if not num_rows or not len(payload) or len(payload) % (num_rows * dtype.itemsize):
        raise MalformedFrameError(
            f"hidden_states has {len(payload)} bytes, which are no {num_rows} rows in {dtype}, "
            "and may not be empty"
        )


def checked_scales(header: experts_pb2.DispatchRequest) -> Tensor | None:
    if header.dtype != experts_pb2.DTYPE_INT8:
        if header.scales:
            raise MalformedFrameError("scales go with hidden_states in INT8 only")
        return None
    scales = _values(header.scales, "scales", "<f4", header.num_tokens, "tokens")
    if not (_all_true(np.isfinite(scales)) and scales.min() >= 0):
        raise MalformedFrameError("scales has NaN, infinity or a negative value")
    return torch.from_numpy(scales.astype(np.float32))


def checked_dtype(proto_dtype: int) -> torch.dtype:
    dtype = _PROTO_TO_DTYPE.get(proto_dtype)
    if dtype is None:
        raise MalformedFrameError(
            f"dtype {proto_dtype} is unknown; send one of {sorted(_PROTO_TO_DTYPE)}"
        )
    return dtype


def checked_assignments(header: experts_pb2.DispatchRequest) -> Assignments:
    expert_ids, rows_per_expert = tuple(header.expert_ids), tuple(header.rows_per_expert)
    if len(expert_ids) != len(rows_per_expert) or not expert_ids:
        raise MalformedFrameError(
            f"{len(expert_ids)} expert_ids and {len(rows_per_expert)} rows_per_expert; "
            "there must be as many of both, and at least one"
        )
    if not _ascends(expert_ids):
        raise MalformedFrameError(f"expert_ids {expert_ids} must ascend strictly")
    if 0 in rows_per_expert:
        raise MalformedFrameError(f"rows_per_expert {rows_per_expert} must be 1 or more each")
    num_assignments = sum(rows_per_expert)
    rows = _values(header.token_rows, "token_rows", "<i4", num_assignments)
    weights = _values(header.topk_weights, "topk_weights", "<f4", num_assignments)
    _check_rows(rows, rows_per_expert, header.num_tokens)
    if not _all_true(np.isfinite(weights)):
        raise MalformedFrameError("topk_weights has NaN or infinity")
    return Assignments(
        expert_ids=expert_ids,
        rows_per_expert=rows_per_expert,
        token_rows=torch.from_numpy(rows.astype(np.int64)),
        topk_weights=torch.from_numpy(weights.astype(np.float32)),
    )


def _values(
    data: bytes, name: str, dtype: str, count: int, counted: str = "assignments"
) -> NDArray[Any]:
    if len(data) != 4 * count:
        raise MalformedFrameError(
            f"{name} has {len(data)} bytes; {count} {counted} take {4 * count}"
        )
    return np.frombuffer(data, dtype=dtype)


def _check_rows(rows: NDArray[np.int32], rows_per_expert: Sequence[int], num_tokens: int) -> None:
    """Rows ascend strictly within an expert, so its first and last row bound the others."""
    ascends = rows[1:] > rows[:-1]
    start = 0
    for count in rows_per_expert:
        stop = start + count
        first, last = int(rows[start]), int(rows[stop - 1])
        if first < 0 or last >= num_tokens:
            raise MalformedFrameError(
                f"token_rows spans {first} to {last}; rows are 0 to {num_tokens - 1}"
            )
        ascends[start - 1 : start] = True  # the step from the expert before; none before the first
        start = stop
    if not _all_true(ascends):
        raise MalformedFrameError("token_rows must ascend strictly within an expert")


def _all_true(flags: NDArray[np.bool_]) -> bool:
    """`flags.all()` at a third of its cost: frames of one token are mostly overhead."""
    return bool(np.count_nonzero(flags) == flags.size)


def _ascends(values: Sequence[int]) -> bool:
    return all(low < high for low, high in itertools.pairwise(values))
