"""What an answer is: good, a fault after which the frame is sent again, or an error for good."""

from __future__ import annotations

import torch

from protos import experts_pb2
from router_service.dispatch.sent_frame import Fault, SentFrame
from services.core.errors import MalformedFrameError
from services.core.wire import ResponseFrame

BROKEN = Fault("broken", "the connection broke")
BLAMELESS = ("unknown_expert", "draining", "broken", "refused")
"""Faults for which a worker is not ejected: the table follows them by itself, or it is the frame
that is at fault."""


def find_fault(
    sent: SentFrame, *, layer: int, combine: bool, hidden_size: int, dtype: torch.dtype
) -> Fault | None:
    """None where the answer is good. `dtype` and `hidden_size` are those rows must have.

    Raises `MalformedFrameError` where the worker refused the frame for what it is: every other
    worker would.
    """
    response, frame = sent.response, sent.frame
    if response is None:
        return BROKEN
    if response.status == experts_pb2.DISPATCH_STATUS_OK:
        num_rows = len(frame.token_ids) if combine else frame.num_assignments
        expected = (num_rows, hidden_size * dtype.itemsize, dtype)
        seen = (response.num_rows, response.row_bytes, response.dtype)
        if seen == expected:
            return None
        text = f"answered with rows, bytes of a row, dtype {seen}, not {expected}"
        return Fault("internal", text)
    return _refusal(sent, response, layer)


def _refusal(sent: SentFrame, response: ResponseFrame, layer: int) -> Fault:
    if response.status in (
        experts_pb2.DISPATCH_STATUS_INVALID_FRAME,
        experts_pb2.DISPATCH_STATUS_TOO_LARGE,
    ):
        raise MalformedFrameError(
            f"worker {sent.worker_id} refused a frame of layer {layer} with "
            f"{len(sent.frame.token_ids)} tokens: {response.error}",
            layer=layer,
            worker_id=sent.worker_id,
        )
    if response.status == experts_pb2.DISPATCH_STATUS_UNKNOWN_EXPERT:
        return Fault("unknown_expert", response.error)
    if response.status == experts_pb2.DISPATCH_STATUS_DRAINING:
        return Fault("draining", response.error or "is draining")
    return Fault("internal", response.error)
