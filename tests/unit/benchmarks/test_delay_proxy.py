from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from benchmarks.delay_proxy import DelayedNetwork


@contextlib.asynccontextmanager
async def _delayed_echo(delay_s: float) -> AsyncIterator[tuple[str, int]]:
    """An echo server behind the proxy."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(1 << 16):
            writer.write(chunk)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    network = await asyncio.to_thread(DelayedNetwork, f"127.0.0.1:{port}")
    try:
        network.set_delay(delay_s)
        host, _, proxied = network.endpoints.rpartition(":")
        yield host, int(proxied)
    finally:
        await asyncio.to_thread(network.close)
        server.close()


async def test_a_round_trip_takes_twice_the_delay_and_pipelined_ones_do_not_wait_in_line() -> None:
    async with _delayed_echo(0.2) as address, asyncio.timeout(60):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"x")
        await reader.readexactly(1)  # connected, and the delay is set
        start = time.perf_counter()
        for _ in range(20):
            writer.write(b"y")
            await asyncio.sleep(0.001)
        await reader.readexactly(20)
        seconds = time.perf_counter() - start
        writer.close()
    assert 0.4 <= seconds < 6.0, "20 round trips one after the other would take 8 s"


async def test_bytes_come_back_whole_and_in_order() -> None:
    sent = b"".join(number.to_bytes(4, "little") for number in range(1 << 19))
    async with _delayed_echo(0.002) as address, asyncio.timeout(60):
        reader, writer = await asyncio.open_connection(*address)
        receiving = asyncio.ensure_future(reader.readexactly(len(sent)))
        writer.write(sent)
        await writer.drain()
        assert await receiving == sent
        writer.write_eof()
        assert await reader.read() == b"", "the end of a connection is passed on"
        writer.close()
