"""What operators and probes ask for: `/healthz`, `/readyz`, `/metrics`. Open to all."""

from __future__ import annotations

import asyncio
import logging

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from services.core.errors import UnavailableError
from services.core.metrics import exposition
from services.gateway.gateway import Gateway

_READY_TIMEOUT_S = 5.0
_logger = logging.getLogger(__name__)


def operations_router(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    async def readyz() -> dict[str, str]:
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                await gateway.shard.check_ready()
        except TimeoutError as error:
            raise UnavailableError(
                f"No attention shard said within {_READY_TIMEOUT_S:g} s that it is ready"
            ) from error
        return {"status": "ready"}

    async def metrics(request: Request) -> Response:
        await _refresh_fleet_metrics(gateway)
        accept = request.headers.get("accept", "")
        content, content_type = exposition(gateway.metrics.registry, accept)
        return Response(content, headers={"content-type": content_type})

    router.add_api_route("/healthz", healthz, methods=["GET"])
    router.add_api_route("/readyz", readyz, methods=["GET"])
    router.add_api_route("/metrics", metrics, methods=["GET"])
    return router


async def _refresh_fleet_metrics(gateway: Gateway) -> None:
    """Without the registry the figures last seen stand: a scrape never fails for it."""
    if gateway.registry is None:
        return
    try:
        snapshot = await gateway.registry.snapshot()
    except UnavailableError as error:
        gateway.metrics.fleet.store_away()
        _logger.warning("what is told of the fleet is out of date: %s", error)
        return
    config = gateway.model.config
    gateway.metrics.fleet.show(
        snapshot, num_layers=config.num_hidden_layers, num_experts=config.num_local_experts
    )
