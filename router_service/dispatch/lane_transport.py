"""Links over lanes: the dispatch frames over bare TCP, and another transport for the rest.

A worker says in its description where its lane is. Each stream has a connection of its own.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from protos import experts_pb2
from router_service.dispatch.lane_hub import LaneHub
from router_service.dispatch.transport import ExpertTransport, OnAnswer, WorkerLink
from services.core.errors import MalformedFrameError, UnavailableError
from services.core.kernels.library import NativeLibrary
from services.core.wire import decode_response

logger = logging.getLogger(__name__)

_ANSWER_BYTES_PER_FRAME_BYTE = 2
"""As for gRPC: an answer is about as long as its frame."""
_MAX_MESSAGE_BYTES = 2**31 - 1
_GREETED_STREAM = 0


class LaneTransport:
    """An `ExpertTransport`. Workers are described over `control`; those that offer no lane, or one
    that cannot be reached, are sent to over it too, or with `is_required` not used."""

    def __init__(
        self,
        control: ExpertTransport,
        library: NativeLibrary,
        *,
        max_frame_bytes: int,
        is_required: bool = False,
    ) -> None:
        self.hub = LaneHub(library)
        self._control = control
        self._max_message_bytes = min(
            _ANSWER_BYTES_PER_FRAME_BYTE * max_frame_bytes, _MAX_MESSAGE_BYTES
        )
        self._is_required = is_required

    def open(self, endpoint: str, on_broken: Callable[[str], None]) -> LaneWorkerLink:
        return LaneWorkerLink(
            endpoint,
            on_broken,
            hub=self.hub,
            control=self._control,
            max_message_bytes=self._max_message_bytes,
            is_required=self._is_required,
        )


class LaneWorkerLink:
    """A `WorkerLink`. A connection that ends, however it ends, breaks the link and all others."""

    def __init__(
        self,
        endpoint: str,
        on_broken: Callable[[str], None],
        *,
        hub: LaneHub,
        control: ExpertTransport,
        max_message_bytes: int,
        is_required: bool,
    ) -> None:
        self._endpoint = endpoint
        self._on_broken = on_broken
        self._hub = hub
        self._control: WorkerLink = control.open(endpoint, self._break)
        self._max_message_bytes = max_message_bytes
        self._is_required = is_required
        self._broken: str | None = None
        self._address: tuple[str, int] | None = None
        self._may_use_lane = True
        self._connections: dict[int, int] = {}
        self._in_flight: dict[int, OnAnswer] = {}

    @property
    def broken(self) -> str | None:
        return self._broken

    async def describe(self, timeout_s: float) -> experts_pb2.DescribeResponse:
        """Finds out whether the worker has a lane, too."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + timeout_s
        description = await self._control.describe(timeout_s)
        if self._address is None and self._may_use_lane and self._broken is None:
            await self._find_lane(description.lane_port, give_up_at - loop.time())
        return description

    def send(self, stream: int, call_id: int, frame: bytes, on_answer: OnAnswer) -> None:
        if self._broken is not None:
            on_answer(None)
            return
        connection = self.lane_connection(stream)
        if connection is None:
            self._control.send(stream, call_id, frame, on_answer)
            return
        self._in_flight[call_id] = on_answer
        self._hub.send(connection, frame)

    def adopt(self, call_id: int, on_answer: OnAnswer) -> None:
        """As if the frame, which is on its way, had been sent by `send`."""
        if self._broken is not None:
            on_answer(None)
        else:
            self._in_flight[call_id] = on_answer

    def lane_connection(self, stream: int) -> int | None:
        """The connection of the lane for a stream, made if need be; None where there is no lane."""
        connection = self._connections.get(stream)
        if connection is None and self._address is not None and self._broken is None:
            connection = self._connections[stream] = self._connect(self._address, self)
        return connection

    def forget(self, call_id: int) -> None:
        if self._in_flight.pop(call_id, None) is None:
            self._control.forget(call_id)

    async def close(self) -> None:
        self._break("closed")
        await self._control.close()

    def greeted(self) -> None:
        """A `ConnectionListener`'s, as the next two."""

    def broke(self, reason: str) -> None:
        self._break(reason)

    def answered(self, frame: bytes) -> None:
        """Answers nobody waits for any more (late, or sent twice) are dropped."""
        try:
            response = decode_response(frame)
        except MalformedFrameError as error:
            self._break(error.message)
            return
        on_answer = self._in_flight.pop(response.call_id, None)
        if on_answer is not None:
            on_answer(response)

    async def _find_lane(self, port: int, timeout_s: float) -> None:
        if not port:
            if self._is_required:
                raise UnavailableError(
                    f"worker at {self._endpoint} offers no lane; build the native kernels there, "
                    "or set EXPERTFLEET_DISPATCH_TRANSPORT=auto"
                )
            return
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                self._address = await self._greet(await _numeric_address(self._endpoint), port)
        except (TimeoutError, OSError, UnavailableError) as error:
            reason = str(error) or "it does not greet in time"
            if self._is_required:
                raise UnavailableError(
                    f"the lane of worker {self._endpoint} at port {port} cannot be used: {reason}"
                ) from error
            self._may_use_lane = False
            logger.warning(
                "going without a lane, as that of worker %s at port %d cannot be used: %s",
                self._endpoint,
                port,
                reason,
            )

    async def _greet(self, address: str, port: int) -> tuple[str, int]:
        """Open the first stream and wait until the worker greets."""
        first = _FirstConnection(self)
        connection = self._connect((address, port), first)
        try:
            await first.greeting
        except BaseException:
            self._hub.disconnect(connection)
            raise
        if self._broken is not None:
            self._hub.disconnect(connection)
            raise UnavailableError(self._broken)
        self._connections[_GREETED_STREAM] = connection
        return address, port

    def _connect(
        self, address: tuple[str, int], listener: LaneWorkerLink | _FirstConnection
    ) -> int:
        return self._hub.connect(*address, listener, max_message_bytes=self._max_message_bytes)

    def _break(self, reason: str) -> None:
        if self._broken is not None:
            return
        self._broken = reason
        for connection in self._connections.values():
            self._hub.disconnect(connection)
        waiting, self._in_flight = self._in_flight, {}
        self._on_broken(reason)
        for on_answer in waiting.values():
            on_answer(None)


class _FirstConnection:
    """A `ConnectionListener`: until the greeting, whether there is a lane is open."""

    def __init__(self, link: LaneWorkerLink) -> None:
        self._link = link
        self.greeting: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def greeted(self) -> None:
        if not self.greeting.done():
            self.greeting.set_result(None)

    def broke(self, reason: str) -> None:
        if self.greeting.done():
            self._link.broke(reason)
        else:
            self.greeting.set_exception(UnavailableError(reason))

    def answered(self, frame: bytes) -> None:
        self._link.answered(frame)


async def _numeric_address(endpoint: str) -> str:
    """Of host:port. Raises `OSError` for a host that is not known."""
    host = endpoint.rpartition(":")[0].strip("[]")
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return str(found[0][4][0]).partition("%")[0]
