"""What a container's probes and hooks ask of an expert worker; starts without torch.

python -m expert_service.probe health                      # exit status 0: it serves
python -m expert_service.probe health --every-address --endpoint expertfleet-experts:50051
python -m expert_service.probe drain                       # finish and end, as SIGTERM does
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
from collections.abc import Sequence

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from services.core.errors import ExpertfleetError, UnavailableError
from services.core.settings import load_settings
from services.core.tls import PeerTls, open_channel, peer_tls
from services.core.tls_diagnosis import unreachable
from services.core.worker_control import drain_worker

HEALTH_METHOD = "/grpc.health.v1.Health/Check"
DEFAULT_ENDPOINT = "127.0.0.1:50051"
_SERVING = health_pb2.HealthCheckResponse.SERVING


async def check_health(endpoint: str, *, timeout_s: float, tls: PeerTls | None = None) -> None:
    """Raise `UnavailableError` unless the worker at host:port says SERVING."""
    async with open_channel(endpoint, tls, [("grpc.enable_http_proxy", 0)]) as channel:
        check = channel.unary_unary(
            HEALTH_METHOD,
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = await check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            text = f"worker {endpoint}: {error.details() or error.code().name}"
            raise await unreachable("worker", endpoint, tls, otherwise=text) from error
    if answer.status != _SERVING:
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        raise UnavailableError(f"worker {endpoint}: {name}", endpoint=endpoint)


def main(arguments: Sequence[str] | None = None) -> int:
    """Certificates are those of the settings, if they name any."""
    parser = argparse.ArgumentParser(prog="python -m expert_service.probe")
    parser.add_argument("what", choices=["health", "drain"])
    parser.add_argument("--endpoint", default=DEFAULT_ENDPOINT, help="host:port of the worker")
    parser.add_argument(
        "--every-address", action="store_true", help="ask every address that the host's name has"
    )
    parser.add_argument("--timeout-s", type=float, default=4.0)
    given = parser.parse_args(arguments)
    try:
        tls = peer_tls(load_settings())
        for endpoint in _addresses(given.endpoint) if given.every_address else [given.endpoint]:
            if given.what == "health":
                asyncio.run(check_health(endpoint, timeout_s=given.timeout_s, tls=tls))
                sys.stdout.write(f"{endpoint} serves\n")
            else:
                asyncio.run(drain_worker(endpoint, timeout_s=given.timeout_s, tls=tls))
    except ExpertfleetError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    return 0


def _addresses(endpoint: str) -> list[str]:
    host, _, port = endpoint.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise UnavailableError(f"{endpoint}: {error}", endpoint=endpoint) from error
    addresses = {str(address[0]) for *_, address in found}
    return sorted(f"[{each}]:{port}" if ":" in each else f"{each}:{port}" for each in addresses)


if __name__ == "__main__":
    sys.exit(main())
