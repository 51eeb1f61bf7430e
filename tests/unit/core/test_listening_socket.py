from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path

import pytest

from services.core.errors import ConfigurationError, UnavailableError
from services.core.listening_socket import (
    ListenerOffer,
    gateway_listener,
    open_listener,
    take_listener,
)
from services.core.settings import Settings
from tests.support.eventually import eventually

HOST = "127.0.0.1"
TAKE_AND_ACCEPT = """
import sys
from pathlib import Path
from services.core.listening_socket import take_listener
listener = take_listener(Path(sys.argv[1]))
listener.setblocking(True)
listener.settimeout(30)
listener.listen()
print("listening", flush=True)
connection, _ = listener.accept()
connection.sendall(b"hello from another process")
connection.close()
"""


async def test_another_process_serves_the_socket_and_the_queue_outlives_it(tmp_path: Path) -> None:
    taken: list[int] = []
    listener = open_listener(HOST, 0, reuse_port=False)
    address = listener.getsockname()
    offer = ListenerOffer(listener, tmp_path / "listen.sock", taken.append)
    offer.start()
    try:
        with socket.socket() as early:
            assert early.connect_ex(address) != 0
        for _ in range(2):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", TAKE_AND_ACCEPT, str(tmp_path / "listen.sock")),
                stdout=asyncio.subprocess.PIPE,
            )
            assert process.stdout is not None
            assert await asyncio.wait_for(process.stdout.readline(), 60) == b"listening\n"
            assert taken[-1] == process.pid
            assert await _ask(address) == b"hello from another process"
            assert await asyncio.wait_for(process.wait(), 60) == 0
        # No process serves it now: a connection waits instead of being refused.
        reader, writer = await asyncio.open_connection(*address)
        again = await asyncio.to_thread(take_listener, tmp_path / "listen.sock")
        assert taken[-1] == os.getpid()
        waited, _ = await asyncio.get_running_loop().sock_accept(again)
        waited.sendall(b"late")
        assert await asyncio.wait_for(reader.read(4), 60) == b"late"
        writer.close()
        waited.close()
        again.close()
    finally:
        await offer.close()
        listener.close()
    with socket.socket() as late:
        assert late.connect_ex(address) != 0


async def test_a_launcher_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"listen\.sock"):
        take_listener(tmp_path / "listen.sock")


async def test_without_a_launcher_the_port_is_bound_here_and_shared() -> None:
    first = gateway_listener(Settings(host=HOST, port=0))
    port = first.getsockname()[1]
    second = gateway_listener(Settings(host=HOST, port=port))
    assert second.getsockname()[1] == port
    first.close()
    second.close()


def test_a_port_that_somebody_listens_on_is_named() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=str(port)):
            open_listener(HOST, port, reuse_port=False)


async def test_the_offer_can_be_taken_by_many_at_once(tmp_path: Path) -> None:
    taken: list[int] = []
    with open_listener(HOST, 0, reuse_port=False) as listener:
        offer = ListenerOffer(listener, tmp_path / "listen.sock", taken.append)
        offer.start()
        sockets = await asyncio.gather(
            *(asyncio.to_thread(take_listener, tmp_path / "listen.sock") for _ in range(8))
        )
        await eventually(lambda: len(taken) == 8)
        assert {each.getsockname() for each in sockets} == {listener.getsockname()}
        for each in sockets:
            each.close()
        await offer.close()


async def _ask(address: tuple[str, int]) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    answer = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    return answer
