"""Dispatch frames: valid protobuf whose tensor never passes through a protobuf parse.

Writers put the tensor into field 1 by hand (tag, length, payload) and let protobuf write the rest;
readers recognise that first tag, slice the payload out and parse the rest. A message that starts
otherwise is parsed as usual, so that a stock client in any language can speak to a worker.

Shapes: T tokens, A assignments, H hidden_size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from torch import Tensor

from protos import experts_pb2
from services.core.errors import FrameTooLargeError, MalformedFrameError
from services.core.expert_ffn import Assignments
from services.core.tensor_codec import (
    DTYPE_TO_PROTO,
    PROTO_TO_DTYPE,
    tensor_from_buffer,
    tensor_to_bytes,
)

_PAYLOAD_TAG = 0x0A
_MAX_LENGTH_BYTES = 5
_MAX_UINT32 = 2**32 - 1
_MAX_HEADER_BYTES = 1 << 20
_Header = TypeVar("_Header", experts_pb2.DispatchRequest, experts_pb2.DispatchResponse)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFrame:
    """A checked request: hidden_states [T, H] lies in the frame's own bytes, so do not write to it.

    Every row index, count and length agrees; weights are finite. Layer, experts, H, dtype and the
    values of hidden_states are for the worker to judge.
    """

    call_id: int
    layer: int
    hidden_states: Tensor
    assignments: Assignments
    combine: bool
    traceparent: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseFrame:
    """`status` is a value of `experts_pb2.DispatchStatus`; hidden_states is there if it is OK."""

    call_id: int
    status: experts_pb2.DispatchStatus
    error: str
    hidden_states: Tensor | None
    queue_us: int
    compute_us: int


def encode_request(
    *,
    call_id: int,
    layer: int,
    hidden_states: Tensor,
    assignments: Assignments,
    combine: bool,
    traceparent: str = "",
) -> bytes:
    """A DispatchRequest. hidden_states [T, H] may lie on any device; it is copied once."""
    header = experts_pb2.DispatchRequest(
        call_id=call_id,
        layer=layer,
        dtype=DTYPE_TO_PROTO[hidden_states.dtype],
        num_tokens=hidden_states.shape[0],
        hidden_size=hidden_states.shape[1],
        expert_ids=assignments.expert_ids,
        rows_per_expert=assignments.rows_per_expert,
        token_rows=assignments.token_rows.to("cpu", torch.int32).numpy().tobytes(),
        topk_weights=assignments.topk_weights.to("cpu", torch.float32).numpy().tobytes(),
        combine=combine,
        traceparent=traceparent,
    )
    return _join(tensor_to_bytes(hidden_states), header)


def decode_request(frame: bytes, *, max_frame_bytes: int) -> RequestFrame:
    """Parse and check a request.

    Raises `FrameTooLargeError` or `MalformedFrameError`; both carry the call_id in their details,
    0 where it could not be read.
    """
    if len(frame) > max_frame_bytes:
        raise FrameTooLargeError(
            f"frame of {len(frame)} bytes is larger than this worker's bound of "
            f"{max_frame_bytes}; send fewer tokens at once",
            call_id=_peek_call_id(frame),
        )
    payload, header = _split(frame, experts_pb2.DispatchRequest())
    try:
        return RequestFrame(
            call_id=header.call_id,
            layer=header.layer,
            hidden_states=_tensor(payload, header.dtype, header.num_tokens, header.hidden_size),
            assignments=_assignments(header),
            combine=header.combine,
            traceparent=header.traceparent,
        )
    except MalformedFrameError as error:
        error.details["call_id"] = header.call_id
        raise


def encode_response(
    *, call_id: int, hidden_states: Tensor, queue_us: int = 0, compute_us: int = 0
) -> bytes:
    """A DispatchResponse with status OK. hidden_states [rows, H] on any device, copied once."""
    header = experts_pb2.DispatchResponse(
        call_id=call_id,
        dtype=DTYPE_TO_PROTO[hidden_states.dtype],
        num_rows=hidden_states.shape[0],
        queue_us=min(queue_us, _MAX_UINT32),
        compute_us=min(compute_us, _MAX_UINT32),
    )
    return _join(tensor_to_bytes(hidden_states), header)


def encode_error(*, call_id: int, status: experts_pb2.DispatchStatus, error: str) -> bytes:
    """A DispatchResponse that carries a fault instead of rows."""
    return experts_pb2.DispatchResponse(
        call_id=call_id, status=status, error=error
    ).SerializeToString()


def decode_response(frame: bytes) -> ResponseFrame:
    """Parse a response. Raises `MalformedFrameError` with the call_id, 0 where unreadable."""
    payload, header = _split(frame, experts_pb2.DispatchResponse())
    hidden_states = None
    if header.status == experts_pb2.DISPATCH_STATUS_OK:
        try:
            row_values = _row_values(len(payload), header)
            hidden_states = _tensor(payload, header.dtype, header.num_rows, row_values)
        except MalformedFrameError as error:
            error.details["call_id"] = header.call_id
            raise
    return ResponseFrame(
        call_id=header.call_id,
        status=header.status,
        error=header.error,
        hidden_states=hidden_states,
        queue_us=header.queue_us,
        compute_us=header.compute_us,
    )


def _join(
    payload: memoryview, header: experts_pb2.DispatchRequest | experts_pb2.DispatchResponse
) -> bytes:
    prefix = bytearray((_PAYLOAD_TAG,))
    length = payload.nbytes
    while length >= 0x80:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return b"".join((prefix, payload, header.SerializeToString()))


def _split(frame: bytes, header: _Header) -> tuple[memoryview, _Header]:
    """The payload, sliced without a copy where it is the first field, and the parsed header."""
    view = memoryview(frame)
    payload, rest = _slice_payload(view)
    try:
        header.ParseFromString(bytes(rest))
    except DecodeError as error:
        raise MalformedFrameError(
            f"frame of {len(frame)} bytes is no {header.DESCRIPTOR.full_name}: {error}", call_id=0
        ) from error
    if header.hidden_states:
        payload = memoryview(header.hidden_states)
    return payload, header


def _slice_payload(view: memoryview) -> tuple[memoryview, memoryview]:
    """Field 1 if it stands first and whole, and what follows; else nothing, and everything."""
    if len(view) and view[0] == _PAYLOAD_TAG:
        length = 0
        for position, byte in enumerate(view[1 : 1 + _MAX_LENGTH_BYTES]):
            length |= (byte & 0x7F) << (7 * position)
            if byte < 0x80:
                start = position + 2
                if start + length <= len(view):
                    return view[start : start + length], view[start + length :]
                break
    return view[:0], view


def _peek_call_id(frame: bytes) -> int:
    rest = _slice_payload(memoryview(frame))[1]
    if len(rest) > _MAX_HEADER_BYTES:
        return 0
    header = experts_pb2.DispatchRequest()
    try:
        header.ParseFromString(bytes(rest))
    except DecodeError:
        return 0
    return header.call_id


def _tensor(payload: memoryview, proto_dtype: int, num_rows: int, row_values: int) -> Tensor:
    dtype = _dtype(proto_dtype)
    expected = num_rows * row_values * dtype.itemsize
    if not expected or len(payload) != expected:
        raise MalformedFrameError(
            f"hidden_states has {len(payload)} bytes; [{num_rows}, {row_values}] in {dtype} "
            f"takes {expected}, and may not be empty"
        )
    return tensor_from_buffer(payload, dtype, (num_rows, row_values))


def _row_values(num_bytes: int, header: experts_pb2.DispatchResponse) -> int:
    if header.num_rows == 0:
        return 0
    return num_bytes // (header.num_rows * _dtype(header.dtype).itemsize)


def _dtype(proto_dtype: int) -> torch.dtype:
    dtype = PROTO_TO_DTYPE.get(proto_dtype)
    if dtype is None:
        raise MalformedFrameError(
            f"dtype {proto_dtype} is unknown; send one of {sorted(PROTO_TO_DTYPE)}"
        )
    return dtype


def _assignments(header: experts_pb2.DispatchRequest) -> Assignments:
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


def _values(data: bytes, name: str, dtype: str, count: int) -> NDArray[Any]:
    if len(data) != 4 * count:
        raise MalformedFrameError(
            f"{name} has {len(data)} bytes; {count} assignments take {4 * count}"
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
