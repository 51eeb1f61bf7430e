"""A network that is slow to answer: forwards TCP bytes after a fixed delay, in order.

    python -m benchmarks.delay_proxy HOST:PORT [HOST:PORT ...]

Listens on 127.0.0.2 at the port of each target, and says by a line when it does. So one address
stands for the other, also with ports that a target itself tells, as a worker tells that of its
lanes. Then reads lines from standard input, each a delay in seconds that bytes have from then on,
in each direction; ends with its input. Bandwidth is not limited. One thread on `select`, whose
timeouts are finer than the milliseconds of epoll and of event loops.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence

PROXY_HOST = "127.0.0.2"
_READ_BYTES = 1 << 20


class DelayedNetwork:
    """The proxy's process. `endpoints` stand for those given; `more` are proxied beside them."""

    def __init__(self, endpoints: str, more: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.delay_proxy", *endpoints.split(","), *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise OSError(f"the proxy ended with status {self._process.wait()}")
        ports = [endpoint.rpartition(":")[2] for endpoint in endpoints.split(",")]
        self.endpoints = ",".join(f"{PROXY_HOST}:{port}" for port in ports)

    def set_delay(self, seconds: float) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


class DelayProxy:
    """The listening sockets and the connections through them."""

    def __init__(self, targets: Sequence[str]) -> None:
        self._delay_s = 0.0
        self._targets: dict[socket.socket, tuple[str, int]] = {}
        self._pipes: dict[socket.socket, _Pipe] = {}
        """By the socket that is read."""
        for target in targets:
            host, _, port = target.rpartition(":")
            self._targets[socket.create_server((PROXY_HOST, int(port)))] = (host, int(port))

    def run(self) -> None:
        """Forward until standard input ends."""
        control = sys.stdin.fileno()
        while True:
            now = time.monotonic()
            for pipe in list(self._pipes.values()):
                pipe.send_due(now)
                if pipe.is_closed:
                    self._drop(pipe)
            due = min((p.due for p in self._pipes.values() if p.due is not None), default=None)
            wait_s = None if due is None else max(0.0, due - time.monotonic())
            blocked = [pipe.sink for pipe in self._pipes.values() if pipe.is_blocked]
            sources = [pipe.source for pipe in self._pipes.values() if not pipe.has_ended]
            readable, _, _ = select.select([control, *self._targets, *sources], blocked, [], wait_s)
            for ready in readable:
                if isinstance(ready, int):
                    lines = os.read(control, _READ_BYTES).split()
                    if not lines:
                        return
                    self._delay_s = float(lines[-1])
                elif ready in self._targets:
                    self._accept(ready)
                elif ready in self._pipes:
                    self._pipes[ready].read(time.monotonic() + self._delay_s)

    def _accept(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        server = socket.create_connection(self._targets[listener], timeout=10)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setblocking(False)
        self._pipes[client] = _Pipe(client, server)
        self._pipes[server] = _Pipe(server, client)

    def _drop(self, pipe: _Pipe) -> None:
        """End both directions of the pipe's connection."""
        for end in (pipe.source, pipe.sink):
            self._pipes.pop(end, None)
            end.close()


class _Pipe:
    """One direction of a connection: chunks on their way with the times they arrive at."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.has_ended = False
        self.is_blocked = False
        self.is_closed = False
        self._chunks: deque[tuple[float, memoryview]] = deque()

    @property
    def due(self) -> float | None:
        """When the next chunk arrives; None if there is none or the sink takes no more now."""
        return self._chunks[0][0] if self._chunks and not self.is_blocked else None

    def read(self, arrives_at: float) -> None:
        try:
            chunk = self.source.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        # The end of the stream is an empty chunk: it arrives after what was sent before it.
        self.has_ended = not chunk
        self._chunks.append((arrives_at, memoryview(chunk)))

    def send_due(self, now: float) -> None:
        """Pass on what has arrived by now."""
        self.is_blocked = False
        while self._chunks and self._chunks[0][0] <= now:
            arrives_at, chunk = self._chunks.popleft()
            if not chunk:
                self.is_closed = True
                return
            try:
                sent = self.sink.send(chunk)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.is_closed = True
                return
            if sent < len(chunk):
                self._chunks.appendleft((arrives_at, chunk[sent:]))
                self.is_blocked = True
                return


def main() -> None:
    proxy = DelayProxy(sys.argv[1:])
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    proxy.run()


if __name__ == "__main__":
    main()
