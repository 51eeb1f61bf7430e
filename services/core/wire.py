"""Dispatch frames: valid protobuf whose tensor never passes through a protobuf parse.

Writers put the tensor into field 1 (tag, length, payload) and a small header behind it; readers
recognise that first tag, slice the payload out and parse the rest. A message that starts otherwise
is parsed as usual, so that a stock client in any language can speak to a worker.

Shapes: T tokens, A assignments, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from protos import experts_pb2
from services.core.bit_patterns import bit_patterns
from services.core.errors import FrameTooLargeError, MalformedFrameError
from services.core.expert_ffn import Assignments
from services.core.tensor_codec import tensor_from_buffer
from services.core.wire_checks import (
    WIRE_DTYPE_TO_PROTO,
    check_payload,
    checked_assignments,
    checked_dtype,
    checked_scales,
    checked_tensor,
)
from services.core.wire_dtype import dequantize_rows
from services.core.wire_fields import bytes_field, number_field, packed_field, varint

_PAYLOAD_TAG = 0x0A
_MAX_LENGTH_BYTES = 5
_MAX_UINT32 = 2**32 - 1
_MAX_HEADER_BYTES = 1 << 20
_Header = TypeVar("_Header", experts_pb2.DispatchRequest, experts_pb2.DispatchResponse)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFrame:
    """A checked request: hidden_states [T, H] lies in the frame's own bytes, so do not write to it.

    Every row index, count and length agrees; weights and scales are finite. Layer, experts, H,
    dtypes and the values of hidden_states are for the worker to judge. `scales` float32 [T] are
    there if hidden_states is int8. `answer_dtype` None is the worker's activation dtype.
    """

    call_id: int
    layer: int
    hidden_states: Tensor
    assignments: Assignments
    combine: bool
    traceparent: str
    scales: Tensor | None = None
    answer_dtype: torch.dtype | None = None

    @property
    def num_assignments(self) -> int:
        return sum(self.assignments.rows_per_expert)

    def rows(self, dtype: torch.dtype) -> Tensor:
        """[T, H] in the activation dtype."""
        if self.scales is not None:
            return dequantize_rows(self.hidden_states, self.scales, dtype)
        return self.hidden_states.to(dtype)


class ResponseFrame(NamedTuple):
    """`status` is a value of `experts_pb2.DispatchStatus`; rows are there if it is OK.

    A tuple, since one is made per frame on the shard's critical path; its rows become a tensor
    only when they are asked for.
    """

    call_id: int
    status: experts_pb2.DispatchStatus
    error: str
    payload: memoryview
    dtype: torch.dtype
    num_rows: int
    queue_us: int
    compute_us: int

    @property
    def row_bytes(self) -> int:
        return self.payload.nbytes // self.num_rows if self.num_rows else 0

    @property
    def hidden_states(self) -> Tensor | None:
        """[num_rows, H] over the frame's own bytes; None where the status is not OK."""
        if not self.num_rows:
            return None
        row_values = self.row_bytes // self.dtype.itemsize
        return tensor_from_buffer(self.payload, self.dtype, (self.num_rows, row_values))


class RequestHeader:
    """What the frames of one layer call have in common; writes the frames.

    The header is written by hand: it is a few dozen bytes, half of them the same for every frame.
    `answer_dtype` None is the worker's activation dtype.
    """

    __slots__ = ("_head", "_tail")

    def __init__(
        self,
        *,
        layer: int,
        dtype: torch.dtype,
        hidden_size: int,
        combine: bool,
        answer_dtype: torch.dtype | None = None,
        traceparent: str = "",
    ) -> None:
        self._head = (
            number_field(3, layer)
            + number_field(4, WIRE_DTYPE_TO_PROTO[dtype])
            + number_field(6, hidden_size)
        )
        self._tail = number_field(11, combine) + bytes_field(12, traceparent.encode())
        if answer_dtype is not None:
            self._tail += number_field(14, WIRE_DTYPE_TO_PROTO[answer_dtype])

    def frame(
        self,
        *,
        call_id: int,
        payload: memoryview,
        num_tokens: int,
        expert_ids: Sequence[int],
        rows_per_expert: Sequence[int],
        token_rows: bytes,
        topk_weights: bytes,
        scales: bytes = b"",
    ) -> bytes:
        """A DispatchRequest. `payload` [T, H], `token_rows` int32 [A], `topk_weights` float32 [A]
        and `scales` float32 [T] are C-contiguous and little-endian; the payload is copied once."""
        return b"".join(
            (
                b"\x0a",
                varint(payload.nbytes),
                payload,
                number_field(2, call_id),
                self._head,
                number_field(5, num_tokens),
                packed_field(7, expert_ids),
                packed_field(8, rows_per_expert),
                bytes_field(9, token_rows),
                bytes_field(10, topk_weights),
                bytes_field(13, scales),
                self._tail,
            )
        )


def encode_request(
    *,
    call_id: int,
    layer: int,
    hidden_states: Tensor,
    assignments: Assignments,
    combine: bool,
    traceparent: str = "",
    scales: Tensor | None = None,
    answer_dtype: torch.dtype | None = None,
) -> bytes:
    """A DispatchRequest. hidden_states [T, H] may lie on any device; it is copied once."""
    header = RequestHeader(
        layer=layer,
        dtype=hidden_states.dtype,
        hidden_size=hidden_states.shape[1],
        combine=combine,
        answer_dtype=answer_dtype,
        traceparent=traceparent,
    )
    return header.frame(
        call_id=call_id,
        payload=bit_patterns(hidden_states.cpu()).data,
        num_tokens=hidden_states.shape[0],
        expert_ids=assignments.expert_ids,
        rows_per_expert=assignments.rows_per_expert,
        token_rows=assignments.token_rows.to("cpu", torch.int32).numpy().tobytes(),
        topk_weights=assignments.topk_weights.to("cpu", torch.float32).numpy().tobytes(),
        scales=b"" if scales is None else scales.to("cpu", torch.float32).numpy().tobytes(),
    )


def decode_request(frame: bytes, *, max_frame_bytes: int) -> RequestFrame:
    """Parse and check a request.

    Raises `FrameTooLargeError` or `MalformedFrameError`; both carry the call_id in their details,
    0 where it could not be read.
    """
    if len(frame) > max_frame_bytes:
        raise too_large_error(len(frame), _slice_payload(memoryview(frame))[1], max_frame_bytes)
    payload, header = _split(frame, experts_pb2.DispatchRequest())
    try:
        hidden_states = checked_tensor(payload, header.dtype, header.num_tokens, header.hidden_size)
        return RequestFrame(
            call_id=header.call_id,
            layer=header.layer,
            hidden_states=hidden_states,
            assignments=checked_assignments(header),
            combine=header.combine,
            traceparent=header.traceparent,
            scales=checked_scales(header),
            answer_dtype=checked_dtype(header.answer_dtype) if header.answer_dtype else None,
        )
    except MalformedFrameError as error:
        error.details["call_id"] = header.call_id
        raise


def too_large_error(
    num_bytes: int, rest: bytes | memoryview, max_frame_bytes: int
) -> FrameTooLargeError:
    """Says that a frame is over the bound; `rest` has its fields after the payload."""
    return FrameTooLargeError(
        f"frame of {num_bytes} bytes is larger than this worker's bound of "
        f"{max_frame_bytes}; send fewer tokens at once",
        call_id=_peek_call_id(rest),
    )


def encode_response(
    *, call_id: int, hidden_states: Tensor, queue_us: int = 0, compute_us: int = 0
) -> bytes:
    """A DispatchResponse with status OK. hidden_states [rows, H] on any device, copied once."""
    payload = bit_patterns(hidden_states.cpu()).data
    return b"".join(
        (
            b"\x0a",
            varint(payload.nbytes),
            payload,
            number_field(2, call_id),
            number_field(5, WIRE_DTYPE_TO_PROTO[hidden_states.dtype]),
            number_field(6, hidden_states.shape[0]),
            number_field(7, min(queue_us, _MAX_UINT32)),
            number_field(8, min(compute_us, _MAX_UINT32)),
        )
    )


def encode_error(*, call_id: int, status: experts_pb2.DispatchStatus, error: str) -> bytes:
    """A DispatchResponse that carries a fault instead of rows."""
    return experts_pb2.DispatchResponse(
        call_id=call_id, status=status, error=error
    ).SerializeToString()


def decode_response(frame: bytes) -> ResponseFrame:
    """Parse a response. Raises `MalformedFrameError` with the call_id, 0 where unreadable."""
    payload, header = _split(frame, experts_pb2.DispatchResponse())
    dtype, num_rows = torch.float32, 0
    if header.status == experts_pb2.DISPATCH_STATUS_OK:
        try:
            dtype, num_rows = checked_dtype(header.dtype), header.num_rows
            check_payload(payload, dtype, num_rows)
        except MalformedFrameError as error:
            error.details["call_id"] = header.call_id
            raise
    return ResponseFrame(
        header.call_id,
        header.status,
        header.error,
        payload,
        dtype,
        num_rows,
        header.queue_us,
        header.compute_us,
    )


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


def _peek_call_id(rest: bytes | memoryview) -> int:
    if len(rest) > _MAX_HEADER_BYTES:
        return 0
    header = experts_pb2.DispatchRequest()
    try:
        header.ParseFromString(bytes(rest))
    except DecodeError:
        return 0
    return header.call_id
