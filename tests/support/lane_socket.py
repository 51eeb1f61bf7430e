"""A lane's client in plain Python: what any other language would do with the proto file."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

LANE_MAGIC = b"EFLANE1\n"
_TIMEOUT_S = 20.0


class LaneSocket:
    """One connection; `receive` raises `EOFError` when the worker has cut it."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._bytes = connected.makefile("rb")

    def send(self, message: bytes) -> None:
        self.socket.sendall(struct.pack("<I", len(message)) + message)

    def receive(self) -> bytes:
        return self.receive_exactly(struct.unpack("<I", self.receive_exactly(4))[0])

    def ask(self, message: bytes) -> bytes:
        self.send(message)
        return self.receive()

    def receive_exactly(self, num_bytes: int) -> bytes:
        try:
            received = self._bytes.read(num_bytes)
        except ConnectionError:
            received = b""
        if len(received) < num_bytes:
            raise EOFError
        return received

    def is_cut(self) -> bool:
        """Wait until the worker cuts the connection; false if it says something instead."""
        try:
            return not self._bytes.read(1)
        except ConnectionError:
            return True

    def close(self) -> None:
        self._bytes.close()
        self.socket.close()


@contextlib.contextmanager
def lane_socket(
    port: int, *, greet: bool = True, receive_buffer: int | None = None
) -> Iterator[LaneSocket]:
    """Connected to 127.0.0.1, and greeted unless told otherwise."""
    with socket.socket() as connecting:
        connecting.settimeout(_TIMEOUT_S)
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer is not None:
            connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connecting.connect(("127.0.0.1", port))
        lane = LaneSocket(connecting)
        try:
            if greet:
                connecting.sendall(LANE_MAGIC)
                assert lane.receive_exactly(len(LANE_MAGIC)) == LANE_MAGIC
            yield lane
        finally:
            lane.close()
