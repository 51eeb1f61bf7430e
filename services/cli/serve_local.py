"""Child of `expertfleet up --no-ray`: gateway and engine in one process, under uvicorn."""

from __future__ import annotations

import argparse
import os
import signal
import sys

import uvicorn

from services.cli.gateway_factory import build_gateway
from services.core.errors import EXIT_BAD_INPUT, CheckpointError, ConfigurationError
from services.core.logging_setup import configure_logging
from services.core.settings import load_settings


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
    # uvicorn drains on a signal and then raises it again for whoever handled it before; left to the
    # default it would end the process with the shard's lease, sessions and spans still open.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
        uvicorn.run(
            build_gateway(settings, shard),
            host=settings.host,
            port=settings.port,
            log_level="warning",
            loop="uvloop",
            timeout_graceful_shutdown=round(settings.drain_timeout_s / 2),
        )
    finally:
        shard.stop_now()
    return 0


if __name__ == "__main__":
    sys.exit(main())
