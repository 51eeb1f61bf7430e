"""What a worker can be told at run time: hold further slots, give some up, drain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from protos import experts_pb2
from services.core.errors import (
    CheckpointError,
    ExpertfleetError,
    InvalidRequestError,
    UnavailableError,
    WorkerMemoryError,
    WorkerRefusedError,
)
from services.core.grpc_options import DRAIN_METHOD, LOAD_SLOTS_METHOD, UNLOAD_SLOTS_METHOD
from services.core.registry import Slot
from services.core.tls import PeerTls, open_channel
from services.core.tls_diagnosis import unreachable

_Response = TypeVar("_Response", bound=Message)
_ERRORS: dict[grpc.StatusCode, type[ExpertfleetError]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: UnavailableError,
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: WorkerMemoryError,
    grpc.StatusCode.FAILED_PRECONDITION: WorkerRefusedError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.DATA_LOSS: CheckpointError,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotsHeld:
    """All slots that a worker holds, and what further ones may take."""

    slots: frozenset[Slot]
    memory_free_bytes: int


async def load_slots(
    endpoint: str,
    slots: Iterable[Slot],
    *,
    timeout_s: float,
    carrier: Mapping[str, str] | None = None,
    tls: PeerTls | None = None,
) -> SlotsHeld:
    """Have the worker at host:port hold `slots` too; returns once they are announced.

    Loading is given up when `timeout_s` is over or the caller is cancelled. `carrier` is the trace
    context of the span it is done under. Raises `UnavailableError` when the worker cannot be
    reached or is late, `WorkerMemoryError`, `WorkerRefusedError` (it is loading or draining),
    `InvalidRequestError` (no such slot) or `CheckpointError`; the worker then holds what it held.
    """
    response = await _call(
        endpoint,
        LOAD_SLOTS_METHOD,
        experts_pb2.LoadSlotsRequest(slots=_messages(slots)),
        experts_pb2.LoadSlotsResponse.FromString,
        timeout_s=timeout_s,
        carrier=carrier,
        tls=tls,
    )
    return _held(response)


async def unload_slots(
    endpoint: str,
    slots: Iterable[Slot],
    *,
    timeout_s: float,
    carrier: Mapping[str, str] | None = None,
    tls: PeerTls | None = None,
) -> SlotsHeld:
    """Have the worker give `slots` up; returns once that is announced. Raises as `load_slots`,
    and `WorkerRefusedError` when nothing would be left."""
    response = await _call(
        endpoint,
        UNLOAD_SLOTS_METHOD,
        experts_pb2.UnloadSlotsRequest(slots=_messages(slots)),
        experts_pb2.UnloadSlotsResponse.FromString,
        timeout_s=timeout_s,
        carrier=carrier,
        tls=tls,
    )
    return _held(response)


async def drain_worker(endpoint: str, *, timeout_s: float, tls: PeerTls | None = None) -> None:
    """Have the worker finish and end, as SIGTERM does; returns once its draining is announced.

    Raises `UnavailableError` when it cannot be reached.
    """
    await _call(
        endpoint,
        DRAIN_METHOD,
        experts_pb2.DrainRequest(),
        experts_pb2.DrainResponse.FromString,
        timeout_s=timeout_s,
        carrier=None,
        tls=tls,
    )


async def _call(
    endpoint: str,
    method: str,
    request: Message,
    read_response: Callable[[bytes], _Response],
    *,
    timeout_s: float,
    carrier: Mapping[str, str] | None,
    tls: PeerTls | None,
) -> _Response:
    metadata = tuple((carrier or {}).items())
    async with open_channel(endpoint, tls, [("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary(
            method,
            request_serializer=type(request).SerializeToString,
            response_deserializer=read_response,
        )
        try:
            response: _Response = await call(request, timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            text = f"worker {endpoint}: {error.details() or error.code().name}"
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise await unreachable("worker", endpoint, tls, otherwise=text) from error
            kind = _ERRORS.get(error.code(), ExpertfleetError)
            raise kind(text, endpoint=endpoint) from error
    return response


def _messages(slots: Iterable[Slot]) -> list[experts_pb2.Slot]:
    return [experts_pb2.Slot(layer=layer, expert=expert) for layer, expert in sorted(slots)]


def _held(
    response: experts_pb2.LoadSlotsResponse | experts_pb2.UnloadSlotsResponse,
) -> SlotsHeld:
    return SlotsHeld(
        slots=frozenset((slot.layer, slot.expert) for slot in response.slots),
        memory_free_bytes=response.memory_free_bytes,
    )
