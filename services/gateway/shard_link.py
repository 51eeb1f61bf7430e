"""One gateway's connection to one attention shard: a gRPC stream that all requests share."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import TypeVar

import grpc.aio

from protos import shards_pb2, shards_pb2_grpc
from services.core.errors import ExpertfleetError, LossReason, ShardLostError, UnavailableError
from services.core.generation import GenerateRequest, GenerationDelta, SessionInfo
from services.core.grpc_options import shard_options
from services.core.shard_wire import (
    delta_from_proto,
    error_from_proto,
    request_to_proto,
    session_from_proto,
)
from services.core.tls import PeerTls, open_channel
from services.core.tls_diagnosis import unreachable
from services.gateway.beat_watch import BeatWatch
from services.gateway.shard_choice import RUNNING_COST, request_cost

_CALL_TIMEOUT_S = 5.0
_T = TypeVar("_T")
_Inbox = asyncio.Queue[shards_pb2.RequestOutput | None]


class ShardLink:
    """Used on one event loop. Once the stream has ended, the link is broken and stays so."""

    def __init__(
        self,
        shard_id: str,
        endpoint: str,
        *,
        tls: PeerTls | None = None,
        beats: BeatWatch | None = None,
    ) -> None:
        self.shard_id = shard_id
        self.beats = beats or BeatWatch()
        """Is told of every message."""
        self._endpoint = endpoint
        self._tls = tls
        self.broken = asyncio.Event()
        self.reason = ""
        """Why it broke."""
        self._loss_reason: LossReason = "died"
        self._has_heard = asyncio.Event()
        self._numbers = itertools.count(1)
        self._inboxes: dict[int, _Inbox] = {}
        self._outgoing: asyncio.Queue[shards_pb2.ShardMessage | None] = asyncio.Queue()
        self._cost = 0
        self._channel = open_channel(endpoint, tls, shard_options())
        self._stub = shards_pb2_grpc.ShardServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._reader: asyncio.Task[None] | None = None

    @property
    def cost(self) -> int:
        """Of this gateway's requests there: prompt tokens until their first token, then a fixed
        part for each."""
        return self._cost

    async def connect(self, timeout_s: float) -> None:
        """Raises `UnavailableError`, also where a shard that is known to beat does not: the
        connection to one that hangs may well be open."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._channel.channel_ready()
        except TimeoutError:
            raise await unreachable(
                f"shard {self.shard_id}",
                self._endpoint,
                self._tls,
                otherwise=f"shard {self.shard_id} does not answer",
            ) from None
        self.beats.connected()
        self._reader = asyncio.create_task(self._read(), name=f"shard {self.shard_id}")
        if self.beats.has_beaten:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._has_heard.wait()
            except TimeoutError:
                raise UnavailableError(f"shard {self.shard_id} hangs") from None

    async def close(self) -> None:
        """Requests in flight get `ShardLostError`."""
        self._break("closed")
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close(None)

    def give_up(self, reason: str) -> None:
        """The shard hangs: break the link, so that requests in flight get `ShardLostError`. Should
        it go on, it sees its stream cancelled and drops them."""
        self._loss_reason = "hung"
        self._break(reason)

    async def generate(
        self, request: GenerateRequest
    ) -> AsyncGenerator[tuple[GenerationDelta, ...], None]:
        """As `ShardClient.generate`. Raises `ShardLostError` when the link breaks, or is broken."""
        if self.broken.is_set():
            raise ShardLostError(
                f"shard {self.shard_id} is gone: {self.reason}", reason="unreachable"
            )
        number = next(self._numbers)
        inbox: _Inbox = asyncio.Queue()
        cost = request_cost(request)
        self._inboxes[number] = inbox
        self._cost += cost
        self._send(
            shards_pb2.ShardMessage(request_number=number, generate=request_to_proto(request))
        )
        is_ended = False
        try:
            while not is_ended:
                outputs = await _take_all(inbox)
                self._cost += RUNNING_COST - cost
                cost = RUNNING_COST
                for output in outputs:
                    if output is None:
                        is_ended = True
                        break
                    if output.deltas:
                        yield tuple(delta_from_proto(delta) for delta in output.deltas)
                    if output.is_ended:
                        is_ended = True
                        if output.HasField("error"):
                            raise error_from_proto(output.error)
                        return
            raise ShardLostError(
                f"shard {self.shard_id} is gone: {self.reason}", reason=self._loss_reason
            )
        finally:
            del self._inboxes[number]
            self._cost -= cost
            if not is_ended:
                self._send(shards_pb2.ShardMessage(request_number=number, abort=True))

    async def get_session(self, tenant: str, session_id: str) -> SessionInfo | None:
        key = shards_pb2.SessionKey(tenant=tenant, session_id=session_id)
        state = await self._call(self._stub.GetSession(key, timeout=_CALL_TIMEOUT_S))
        return session_from_proto(state, tenant, session_id)

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        key = shards_pb2.SessionKey(tenant=tenant, session_id=session_id)
        state = await self._call(self._stub.DeleteSession(key, timeout=_CALL_TIMEOUT_S))
        return bool(state.found)

    async def check_ready(self) -> None:
        """Raises `UnavailableError` saying what the shard misses."""
        request = shards_pb2.CheckReadyRequest()
        await self._call(self._stub.CheckReady(request, timeout=_CALL_TIMEOUT_S))

    def _send(self, message: shards_pb2.ShardMessage) -> None:
        self._outgoing.put_nowait(message)

    async def _drain(self) -> AsyncIterator[shards_pb2.ShardMessage]:
        while (message := await self._outgoing.get()) is not None:
            yield message

    async def _read(self) -> None:
        try:
            async for step in self._stub.Generate(self._drain()):
                self.beats.heard(is_beat=not step.outputs)
                self._has_heard.set()
                for output in step.outputs:
                    if inbox := self._inboxes.get(output.request_number):
                        inbox.put_nowait(output)
            self._break("it ended the stream")
        except grpc.aio.AioRpcError as error:
            self._break(f"{error.code().name} {error.details()}")
        finally:
            self._break("closed")

    def _break(self, reason: str) -> None:
        if self.broken.is_set():
            return
        self.reason = reason
        self.broken.set()
        self._outgoing.put_nowait(None)
        for inbox in self._inboxes.values():
            inbox.put_nowait(None)

    async def _call(self, call: Awaitable[_T]) -> _T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise _error_of(error, self.shard_id) from error


async def _take_all(inbox: _Inbox) -> list[shards_pb2.RequestOutput | None]:
    """What has come, at least one; outputs that came while the caller was busy come together."""
    outputs = [await inbox.get()]
    while not inbox.empty():
        outputs.append(inbox.get_nowait())
    return outputs


def _error_of(error: grpc.aio.AioRpcError, shard_id: str) -> ExpertfleetError:
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return UnavailableError(error.details() or f"shard {shard_id} does not answer")
    return ExpertfleetError(f"shard {shard_id}: {error.code().name} {error.details()}")
