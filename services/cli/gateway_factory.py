"""Builds the gateway over whatever carries it to the shards. Named in Ray's deployment."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from services.core.checkpoints.hub import find_model
from services.core.generation import ShardClient
from services.core.redis_registry import RedisRegistry
from services.core.registry import Registry
from services.core.settings import Settings
from services.core.telemetry import SERVICE_GATEWAY
from services.core.tracing import configure_tracing
from services.gateway.app import create_app


def build_gateway(settings: Settings, shard: ShardClient) -> Any:
    """The gateway's ASGI application, with its registry and tracing, which end with it."""
    instance = f"gateway-{os.getpid()}"
    tracing = configure_tracing(settings, SERVICE_GATEWAY, instance_id=instance)
    registry: Registry | None = None
    if settings.redis_url is not None:
        registry = RedisRegistry(settings.redis_url, fleet=settings.fleet)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if registry is not None:
            await registry.close()
        await asyncio.to_thread(tracing.shutdown)

    return create_app(
        settings,
        shard,
        registry,
        model_folder=find_model(settings.model).folder,
        tracer=tracing.tracer,
        lifespan=lifespan,
    )
