"""Links over gRPC: one channel per worker, one long-lived stream per micro-batch, raw bytes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import grpc.aio

from protos import experts_pb2
from router_service.dispatch.transport import OnAnswer
from services.core.describe import describe_worker
from services.core.errors import MalformedFrameError
from services.core.grpc_options import DISPATCH_METHOD, channel_options
from services.core.tls import PeerTls, open_channel
from services.core.tls_diagnosis import unreachable
from services.core.wire import decode_response

logger = logging.getLogger(__name__)


class GrpcTransport:
    """An `ExpertTransport` over grpc.aio."""

    def __init__(self, *, max_frame_bytes: int, tls: PeerTls | None = None) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._tls = tls

    def open(self, endpoint: str, on_broken: Callable[[str], None]) -> GrpcWorkerLink:
        return GrpcWorkerLink(
            endpoint, on_broken, max_frame_bytes=self._max_frame_bytes, tls=self._tls
        )


class GrpcWorkerLink:
    """A `WorkerLink`. A stream that ends, however it ends, breaks the link and all its streams.

    Each stream has one task, which reads answers and hands them to who waits for them; frames to
    send pass through a queue that gRPC's own task drains. So a call makes no task and no future.
    """

    def __init__(
        self,
        endpoint: str,
        on_broken: Callable[[str], None],
        *,
        max_frame_bytes: int,
        tls: PeerTls | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._on_broken = on_broken
        self._broken: str | None = None
        self._in_flight: dict[int, OnAnswer] = {}
        self._outgoing: dict[int, asyncio.Queue[bytes | None]] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._tls = tls
        self._channel = open_channel(endpoint, tls, channel_options(max_frame_bytes))

    @property
    def broken(self) -> str | None:
        return self._broken

    async def describe(self, timeout_s: float) -> experts_pb2.DescribeResponse:
        try:
            return await describe_worker(self._channel, timeout_s=timeout_s, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            text = f"does not answer: {error.code().name} {error.details()}"
            raise await unreachable(
                "worker",
                self._endpoint,
                self._tls,
                otherwise=f"worker at {self._endpoint} {text}",
            ) from error

    def send(self, stream: int, call_id: int, frame: bytes, on_answer: OnAnswer) -> None:
        if self._broken is not None:
            on_answer(None)
            return
        self._in_flight[call_id] = on_answer
        outgoing = self._outgoing.get(stream)
        if outgoing is None:
            outgoing = self._open_stream(stream)
        outgoing.put_nowait(frame)

    def forget(self, call_id: int) -> None:
        self._in_flight.pop(call_id, None)

    async def close(self) -> None:
        self._break("closed")
        await self._channel.close(None)
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    def _open_stream(self, stream: int) -> asyncio.Queue[bytes | None]:
        outgoing: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._outgoing[stream] = outgoing
        method = self._channel.stream_stream(
            DISPATCH_METHOD, request_serializer=None, response_deserializer=None
        )
        call = method(_drain(outgoing))
        self._readers.append(asyncio.create_task(self._read(call)))
        return outgoing

    async def _read(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        try:
            async for frame in call:
                self._deliver(frame)
            self._break("the worker ended the stream")
        except grpc.aio.AioRpcError as error:
            self._break(f"{error.code().name} {error.details()}")
        except MalformedFrameError as error:
            call.cancel()
            self._break(error.message)
        except asyncio.CancelledError:
            self._break("closed")
            raise

    def _deliver(self, frame: bytes) -> None:
        """Answers nobody waits for any more (late, or sent twice) are dropped."""
        response = decode_response(frame)
        on_answer = self._in_flight.pop(response.call_id, None)
        if on_answer is not None:
            on_answer(response)

    def _break(self, reason: str) -> None:
        if self._broken is not None:
            return
        self._broken = reason
        for outgoing in self._outgoing.values():
            outgoing.put_nowait(None)  # else gRPC's task would be left waiting for frames
        waiting, self._in_flight = self._in_flight, {}
        self._on_broken(reason)
        for on_answer in waiting.values():
            on_answer(None)


async def _drain(outgoing: asyncio.Queue[bytes | None]) -> AsyncIterator[bytes]:
    while (frame := await outgoing.get()) is not None:
        yield frame
