"""A lane client on an event loop: hands what happens on its connections to who waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from services.core.kernels.library import NativeLibrary
from services.core.lane.client import (
    AnswerCame,
    ConnectionBroke,
    Greeted,
    LaneClient,
    Refusal,
    RoundRequest,
    RoundSettled,
    RoundState,
)
from services.core.lane.layers import LayersRequest


class ConnectionListener(Protocol):
    """Called on the loop."""

    def greeted(self) -> None: ...

    def broke(self, reason: str) -> None:
        """Once; nothing follows."""
        ...

    def answered(self, frame: bytes) -> None: ...


class LaneHub:
    """Used on one event loop. Holds descriptors only while there are connections."""

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        self._client: LaneClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners: dict[int, ConnectionListener] = {}
        self._on_settled: dict[int, Callable[[], None]] = {}

    @property
    def has_connections(self) -> bool:
        return self._client is not None

    def connect(
        self, address: str, port: int, listener: ConnectionListener, *, max_message_bytes: int
    ) -> int:
        """As `LaneClient.connect`."""
        if self._client is None:
            self._client = LaneClient(self._library)
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._client.fileno(), self._poll)
        client = self._client
        connection = client.connect(address, port, max_message_bytes=max_message_bytes)
        self._listeners[connection] = listener
        self._dispatch_soon()  # one that fails at once says so without epoll
        return connection

    def disconnect(self, connection: int) -> None:
        """Nothing more is heard of it. Twice is once."""
        if self._listeners.pop(connection, None) is None or self._client is None:
            return
        if self._client.disconnect(connection):
            self._dispatch_soon()
        self._close_if_unused()

    def send(self, connection: int, frame: bytes) -> None:
        if self._client is not None and self._client.send(connection, frame):
            self._dispatch_soon()

    def run_round(
        self, request: RoundRequest, on_settled: Callable[[], None], *, wait_s: float
    ) -> int:
        """As `LaneClient.run_round`; a `Refusal` if there are no connections at all.

        `on_settled` is called on the loop, once, unless the round is over when this returns or is
        released before.
        """
        if self._client is None:
            return Refusal.NO_WORKER
        round_id = self._client.run_round(request, wait_s=wait_s)
        self.follow_round(round_id, request, on_settled)
        return round_id

    def run_layers(self, layers: LayersRequest, *, wait_s: float) -> int:
        """As `LaneClient.run_layers`, while `has_connections`. A round that it returns is to be
        followed."""
        assert self._client is not None
        round_id = self._client.run_layers(layers, wait_s=wait_s)
        if layers.num_events:
            self._dispatch_soon()
        return round_id

    def follow_round(
        self, round_id: int, request: RoundRequest, on_settled: Callable[[], None]
    ) -> None:
        """See `run_round`; nothing for a `Refusal`."""
        if round_id > 0:
            if request.state == RoundState.WAITING:
                self._on_settled[round_id] = on_settled
            if request.num_events:
                self._dispatch_soon()

    def release_round(self, round_id: int) -> None:
        self._on_settled.pop(round_id, None)
        if self._client is not None:
            self._client.release_round(round_id)
            self._close_if_unused()

    def catch_up(self) -> None:
        """Take in what has come and hand it out, rather than when the loop gets to it."""
        if self._client is not None:
            self._client.poll()
            self._dispatch()

    def _poll(self) -> None:
        if self._client is not None and self._client.poll():
            self._dispatch()

    def _dispatch_soon(self) -> None:
        if self._loop is not None:
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        # Who is called may close the last connection, and so the client.
        while (client := self._client) is not None and (event := client.take_event()) is not None:
            if isinstance(event, RoundSettled):
                on_settled = self._on_settled.pop(event.round_id, None)
                if on_settled is not None:
                    on_settled()
                continue
            listener = self._listeners.get(event.connection)
            if listener is None:
                continue
            match event:
                case AnswerCame(_, frame):
                    listener.answered(frame)
                case Greeted():
                    listener.greeted()
                case ConnectionBroke(_, reason):
                    listener.broke(reason)

    def _close_if_unused(self) -> None:
        if self._client is None or self._listeners or self._on_settled:
            return
        if self._loop is not None:
            self._loop.remove_reader(self._client.fileno())
        self._client.close()
        self._client = None
