"""The lab's network fails as it is told to."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.proxy import FaultProxy, Route

DELAY_S = 0.1


@pytest.fixture(scope="module")
def echo_port() -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while chunk := connection.recv(1 << 16):
                connection.sendall(chunk)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield int(listener.getsockname()[1])
    listener.close()


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    made = FaultProxy()
    yield made
    made.close()


@pytest.fixture
def route(proxy: FaultProxy, echo_port: int) -> Route:
    return proxy.listen(("127.0.0.1", 0), ("127.0.0.1", echo_port))


@pytest.fixture
def client(proxy: FaultProxy, route: Route) -> Iterator[socket.socket]:
    with _connect(proxy, route) as connection:
        assert _echo(connection, b"hello") == b"hello"
        yield connection


def test_bytes_pass_in_order_late_by_the_delay_each_way(
    proxy: FaultProxy, route: Route, client: socket.socket
) -> None:
    sent = bytes(range(256)) * 4000
    assert _echo(client, sent) == sent
    proxy.delay(route, DELAY_S)
    started = time.monotonic()
    assert _echo(client, b"late") == b"late"
    assert 2 * DELAY_S <= time.monotonic() - started < 2 * DELAY_S + 20.0
    proxy.restore(route)
    assert _echo(client, b"soon") == b"soon"


def test_silence_holds_connections_open_and_answers_nothing(
    proxy: FaultProxy, route: Route, client: socket.socket
) -> None:
    proxy.silence(route)
    client.settimeout(0.2)
    for connection in (client, _connect(proxy, route)):
        connection.settimeout(0.2)
        connection.sendall(b"anyone?")
        with pytest.raises(TimeoutError):
            connection.recv(1)
    proxy.restore(route)
    client.settimeout(60)
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with _connect(proxy, route) as fresh:
        assert _echo(fresh, b"again") == b"again"


def test_a_cut_resets_and_refuses_until_restored(
    proxy: FaultProxy, route: Route, client: socket.socket
) -> None:
    proxy.cut(route, refuse=True)
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with pytest.raises(ConnectionError), _connect(proxy, route) as refused:
        refused.sendall(b"hello")
        refused.recv(1)
    proxy.restore(route)
    with _connect(proxy, route) as fresh:
        assert _echo(fresh, b"again") == b"again"


def test_a_unix_socket_can_stand_before_another(proxy: FaultProxy, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "real"))
        server.listen()
        proxy.listen(tmp_path / "seen", tmp_path / "real")
        client.settimeout(60)
        client.connect(str(tmp_path / "seen"))
        client.sendall(b"through")
        accepted, _ = server.accept()
        with accepted:
            accepted.settimeout(60)
            assert accepted.recv(7) == b"through"


def _connect(proxy: FaultProxy, route: Route) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port_of(route)), timeout=60)


def _echo(connection: socket.socket, sent: bytes) -> bytes:
    sender = threading.Thread(target=connection.sendall, args=(sent,))
    sender.start()
    received = b""
    while len(received) < len(sent):
        chunk = connection.recv(1 << 16)
        assert chunk, "the connection ended"
        received += chunk
    sender.join()
    return received


def test_nothing_of_a_connection_is_left_when_the_proxy_is_closed(
    proxy: FaultProxy, route: Route, client: socket.socket
) -> None:
    proxy.silence(route)
    client.sendall(b"kept back")
    proxy.close()
    assert not asyncio.all_tasks(proxy._loop)
