"""What operators and probes ask for: `/`, `/healthz`, `/readyz`, `/metrics`. Open to all."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from services.core.errors import UnavailableError
from services.gateway.expert_load import expert_tokens
from services.gateway.gateway import Gateway

_READY_TIMEOUT_S = 5.0
_logger = logging.getLogger(__name__)


def operations_router(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    async def index() -> dict[str, Any]:
        return {
            "service": "expertfleet",
            "model": gateway.model.name,
            "openai_base": "/v1",
            "endpoints": [
                "/v1/models",
                "/v1/completions",
                "/v1/chat/completions",
                "/v1/sessions/{id}",
                "/v1/experts",
                "/healthz",
                "/readyz",
                "/metrics",
            ],
        }

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

    async def metrics() -> Response:
        await _refresh_expert_tokens(gateway)
        content = generate_latest(gateway.metrics.registry)
        return Response(content, media_type=CONTENT_TYPE_LATEST)

    router.add_api_route("/", index, methods=["GET"])
    router.add_api_route("/healthz", healthz, methods=["GET"])
    router.add_api_route("/readyz", readyz, methods=["GET"])
    router.add_api_route("/metrics", metrics, methods=["GET"])
    return router


async def _refresh_expert_tokens(gateway: Gateway) -> None:
    """Without the registry the figures last seen stand: a scrape never fails for it."""
    if gateway.registry is None:
        return
    try:
        gateway.metrics.set_expert_tokens(expert_tokens(await gateway.registry.snapshot()))
    except UnavailableError as error:
        _logger.warning("tokens per expert are out of date: %s", error)
