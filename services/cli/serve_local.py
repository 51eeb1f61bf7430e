"""Child of `expertfleet up --no-ray`: gateway and engine in one process, under uvicorn.

SIGTERM lets running requests end for half of `drain_timeout_s`. SIGUSR1, sent when another process
has taken over the listening socket, lets them end for `restart_drain_s`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys

import uvloop

from services.cli.gateway_factory import build_gateway
from services.core.asgi_server import AsgiServer
from services.core.errors import EXIT_BAD_INPUT, CheckpointError, ConfigurationError
from services.core.generation import ShardClient
from services.core.heap import freeze_heap
from services.core.listening_socket import gateway_listener
from services.core.logging_setup import configure_logging
from services.core.settings import Settings, load_settings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in-process-experts", action="store_true")
    arguments = parser.parse_args()
    settings = load_settings()
    configure_logging(settings.log_level, service="serve", instance=str(os.getpid()))
    # Imported here: it brings torch, which the command line does without.
    from router_service.shard import AttentionShard

    try:
        shard = AttentionShard.start(settings, in_process_experts=arguments.in_process_experts)
    except (CheckpointError, ConfigurationError) as error:
        sys.stderr.write(f"{error.message}\n")
        return EXIT_BAD_INPUT
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, shard))
    finally:
        shard.stop_now()
    return 0


async def _serve(settings: Settings, shard: ShardClient) -> None:
    """Until a signal, and then until the running requests have ended."""
    bounds_s: asyncio.Queue[float] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, bounds_s.put_nowait, settings.drain_timeout_s / 2)
    loop.add_signal_handler(signal.SIGUSR1, bounds_s.put_nowait, settings.restart_drain_s)
    # There is no other shard that could go on with what this one leaves.
    application = build_gateway(settings.override(shard_wait_s=0.0), shard)
    freeze_heap()
    # Taken last: from then on it is for this process to answer what comes.
    listener = gateway_listener(settings)
    server = AsgiServer(application, listener, drain_timeout_s=settings.drain_timeout_s / 2)
    await server.start()
    stopping = asyncio.create_task(server.stop(await bounds_s.get()))
    while not stopping.done():
        another = asyncio.create_task(bounds_s.get())
        await asyncio.wait((stopping, another), return_when=asyncio.FIRST_COMPLETED)
        if another.done():
            server.drain_within(another.result())
        another.cancel()
    await stopping


if __name__ == "__main__":
    sys.exit(main())
