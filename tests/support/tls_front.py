"""A server that asks for client certificates, in front of one that speaks plain text."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from router_service.loop_thread import LoopThread
from services.core.tls import TlsFiles


@contextmanager
def tls_front(url: str, files: TlsFiles) -> Iterator[int]:
    """The port on localhost that leads to the host and port of `url`."""
    target = urlsplit(url)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files.ca_file)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(files.cert_file, files.key_file)

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner = await asyncio.open_connection(target.hostname, target.port)
        try:
            await asyncio.gather(_copy(reader, inner[1]), _copy(inner[0], writer))
        finally:
            for each in (writer, inner[1]):
                each.transport.abort()

    thread = LoopThread("tls-front")
    thread.start()
    server = thread.run_blocking(asyncio.start_server(pass_on, "localhost", 0, ssl=context))
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        thread.call_soon(server.close)
        asyncio.run_coroutine_threadsafe(_end(), thread.loop).result()
        thread.call_soon(thread.loop.stop)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
    else:
        writer.transport.abort()


async def _end() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
