"""The calls that change what a worker holds, or end it: LoadSlots, UnloadSlots, Drain."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from expert_service.held_experts import HeldExperts
from expert_service.slot_control import SlotControl
from protos import experts_pb2
from services.core.errors import ExpertfleetError
from services.core.registry import Slot

_Request = TypeVar("_Request", bound=Message)
_Context = grpc.aio.ServicerContext[Any, Any]
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class WorkerControl:
    """gRPC handlers; an `ExpertfleetError` becomes a status here. `drain` returns when the
    draining is announced."""

    def __init__(self, slots: SlotControl, drain: Callable[[], Awaitable[None]]) -> None:
        self._slots = slots
        self._drain = drain

    def handlers(self) -> dict[str, _Handler]:
        """By the names of their methods."""
        return {
            "LoadSlots": _unary(self._load_slots, experts_pb2.LoadSlotsRequest),
            "UnloadSlots": _unary(self._unload_slots, experts_pb2.UnloadSlotsRequest),
            "Drain": _unary(self._drain_worker, experts_pb2.DrainRequest),
        }

    async def _load_slots(
        self, request: experts_pb2.LoadSlotsRequest, context: _Context
    ) -> experts_pb2.LoadSlotsResponse:
        await self._slots.load(_slots_of(request.slots), carrier=_carrier(context))
        return experts_pb2.LoadSlotsResponse(
            slots=slot_messages(self._slots.experts),
            memory_free_bytes=self._slots.memory_free_bytes(),
        )

    async def _unload_slots(
        self, request: experts_pb2.UnloadSlotsRequest, context: _Context
    ) -> experts_pb2.UnloadSlotsResponse:
        await self._slots.unload(_slots_of(request.slots), carrier=_carrier(context))
        return experts_pb2.UnloadSlotsResponse(
            slots=slot_messages(self._slots.experts),
            memory_free_bytes=self._slots.memory_free_bytes(),
        )

    async def _drain_worker(
        self, _request: experts_pb2.DrainRequest, _context: _Context
    ) -> experts_pb2.DrainResponse:
        await self._drain()
        return experts_pb2.DrainResponse()


def slot_messages(experts: HeldExperts | None) -> list[experts_pb2.Slot]:
    """What is held, in ascending order."""
    return [
        experts_pb2.Slot(layer=layer, expert=expert, digest=digest)
        for (layer, expert), digest in sorted(experts.digests.items() if experts else ())
    ]


def _unary(
    serve: Callable[[_Request, _Context], Awaitable[Message]], request_type: type[_Request]
) -> _Handler:
    async def handle(request: _Request, context: _Context) -> Message | None:
        try:
            return await serve(request, context)
        except ExpertfleetError as error:
            await context.abort(grpc.StatusCode[error.grpc_status], error.message)
        return None

    return grpc.unary_unary_rpc_method_handler(
        handle,
        request_deserializer=request_type.FromString,
        response_serializer=_serialize,
    )


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _slots_of(messages: Sequence[experts_pb2.Slot]) -> frozenset[Slot]:
    return frozenset((slot.layer, slot.expert) for slot in messages)


def _carrier(context: _Context) -> dict[str, str]:
    """The caller's trace context, if it sent one."""
    metadata = context.invocation_metadata() or ()
    return {key: str(value) for key, value in metadata if key in ("traceparent", "tracestate")}
