"""The shard's gRPC server, which gateways send requests to.

Everything lives on one event loop, so a step's tokens wake it once, and leave to each gateway in
one message, however many requests they are of.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import NoReturn, Protocol

import grpc
import grpc.aio

from protos import shards_pb2, shards_pb2_grpc
from router_service.loop_thread import LoopThread
from services.core.errors import ExpertfleetError
from services.core.generation import GenerateRequest, GenerationDelta, SessionInfo
from services.core.grpc_options import shard_options
from services.core.shard_wire import (
    delta_to_proto,
    error_to_proto,
    request_from_proto,
    session_to_proto,
)
from services.core.tls import PeerTls, bind_port

log = logging.getLogger(__name__)

BEAT_S = 0.05
"""Where nothing was written for so long, an empty message is: who is silent hangs."""
_STOP_GRACE_S = 0.2
_MAX_CHOICE_BYTES = 8 << 20
"""Past so many bytes of expert choices a step's outputs leave in several messages."""
StepStream = grpc.aio.ServicerContext[shards_pb2.ShardMessage, shards_pb2.StepOutput]


class ServedShard(Protocol):
    """What the server asks of a shard; the methods are those of `ShardClient`."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[tuple[GenerationDelta, ...]]: ...

    async def get_session(self, tenant: str, session_id: str) -> SessionInfo | None: ...

    async def delete_session(self, tenant: str, session_id: str) -> bool: ...

    async def check_ready(self) -> None: ...


class ShardServer:
    """Serves `shard` from `start` on, on a thread of its own."""

    def __init__(self, shard: ServedShard, *, host: str, tls: PeerTls | None = None) -> None:
        self._shard = shard
        self._host = host
        self._tls = tls
        self._thread = LoopThread("shard-server")
        self._server: grpc.aio.Server | None = None

    def start(self) -> int:
        """Listen on a free port, which is returned."""
        self._thread.start()
        return self._thread.run_blocking(self._listen())

    async def stop(self) -> None:
        """End all streams; what they still wait for ends as it does when a gateway has gone."""
        if self._server is not None:
            await self._thread.run(self._server.stop(_STOP_GRACE_S))
        await self._thread.stop()

    async def _listen(self) -> int:
        self._server = grpc.aio.server(options=shard_options())
        shards_pb2_grpc.add_ShardServiceServicer_to_server(  # type: ignore[no-untyped-call]
            _Servicer(self._shard), self._server
        )
        port = bind_port(self._server, f"{self._host}:0", self._tls)
        await self._server.start()
        return port


class _Servicer(shards_pb2_grpc.ShardServiceServicer):
    def __init__(self, shard: ServedShard) -> None:
        self._shard = shard

    async def Generate(  # noqa: N802 - gRPC's name
        self, _messages: AsyncIterator[shards_pb2.ShardMessage], context: StepStream
    ) -> None:
        await _GatewayStream(self._shard, context).serve()

    async def GetSession(  # noqa: N802
        self, key: shards_pb2.SessionKey, context: grpc.aio.ServicerContext[object, object]
    ) -> shards_pb2.SessionState:
        try:
            info = await self._shard.get_session(key.tenant, key.session_id)
        except ExpertfleetError as error:
            await _abort(context, error)
        return session_to_proto(info)

    async def DeleteSession(  # noqa: N802
        self, key: shards_pb2.SessionKey, context: grpc.aio.ServicerContext[object, object]
    ) -> shards_pb2.SessionState:
        try:
            found = await self._shard.delete_session(key.tenant, key.session_id)
        except ExpertfleetError as error:
            await _abort(context, error)
        return shards_pb2.SessionState(found=found)

    async def CheckReady(  # noqa: N802
        self,
        _request: shards_pb2.CheckReadyRequest,
        context: grpc.aio.ServicerContext[object, object],
    ) -> shards_pb2.CheckReadyResponse:
        try:
            await self._shard.check_ready()
        except ExpertfleetError as error:
            await _abort(context, error)
        return shards_pb2.CheckReadyResponse()


class _GatewayStream:
    """The requests of one gateway. When its stream ends, they are dropped."""

    def __init__(self, shard: ServedShard, context: StepStream) -> None:
        self._shard = shard
        self._context = context
        self._running: dict[int, asyncio.Task[None]] = {}
        self._outputs: list[shards_pb2.RequestOutput] = []
        self._choice_bytes = 0
        self._has_outputs = asyncio.Event()
        self._has_written = False

    async def serve(self) -> None:
        tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._beat())]
        try:
            while (message := await self._context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                self._act(message)
        finally:
            for task in (*tasks, *self._running.values()):
                task.cancel()

    def _act(self, message: shards_pb2.ShardMessage) -> None:
        number = message.request_number
        if message.WhichOneof("action") == "generate":
            task = asyncio.create_task(self._run(number, message.generate))
            self._running[number] = task
            task.add_done_callback(lambda _: self._running.pop(number, None))
        elif running := self._running.get(number):
            running.cancel()

    async def _run(self, number: int, message: shards_pb2.GenerateRequest) -> None:
        ended = shards_pb2.RequestOutput(request_number=number, is_ended=True)
        try:
            stream = self._shard.generate(request_from_proto(message))
            async with aclosing(stream):  # type: ignore[type-var]
                async for deltas in stream:
                    self._choice_bytes += sum(len(delta.expert_choices) for delta in deltas)
                    self._put(
                        shards_pb2.RequestOutput(
                            request_number=number, deltas=[delta_to_proto(d) for d in deltas]
                        )
                    )
        except ExpertfleetError as error:
            ended.error.CopyFrom(error_to_proto(error))
        except Exception as error:
            log.exception("request %s failed", message.request_id)
            internal = ExpertfleetError(f"the shard failed ({type(error).__name__}); see its log")
            ended.error.CopyFrom(error_to_proto(internal))
        self._put(ended)

    def _put(self, output: shards_pb2.RequestOutput) -> None:
        self._outputs.append(output)
        self._has_outputs.set()

    async def _beat(self) -> None:
        """At once, so that the gateway knows from the start that this shard beats."""
        while True:
            if not self._has_written:
                self._has_outputs.set()
            self._has_written = False
            await asyncio.sleep(BEAT_S)

    async def _write(self) -> None:
        """All requests of a step have put their tokens by the time this runs again."""
        while True:
            await self._has_outputs.wait()
            self._has_outputs.clear()
            outputs, self._outputs = self._outputs, []
            # A request's choices are a MiB at most (`MAX_EXPERT_CHOICES`).
            piece = len(outputs) if self._choice_bytes <= _MAX_CHOICE_BYTES else 8
            self._choice_bytes = 0
            for first in range(0, max(1, len(outputs)), max(1, piece)):
                step = shards_pb2.StepOutput(outputs=outputs[first : first + piece])
                await self._context.write(step)
            self._has_written = True


async def _abort(
    context: grpc.aio.ServicerContext[object, object], error: ExpertfleetError
) -> NoReturn:
    await context.abort(grpc.StatusCode[error.grpc_status], error.message)
