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
from services.core.session_count import RedisSessionCount
from services.core.settings import Settings
from services.core.telemetry import SERVICE_GATEWAY
from services.core.tls import peer_tls
from services.core.tracing import configure_tracing
from services.gateway.app import create_app
from services.gateway.console.activity import Activity
from services.gateway.console.feed import nobody_counts
from services.gateway.shard_pool import ShardPool


def build_gateway(settings: Settings, shard: ShardClient) -> Any:
    """The gateway's ASGI application over one shard; its registry and tracing end with it."""
    return _build(settings, _registry(settings), shard, pool=None)


def build_fleet_gateway(settings: Settings, fallback: ShardClient) -> Any:
    """The same over all shards that have a lease; over `fallback` where there is no registry."""
    registry = _registry(settings)
    if registry is None:
        return _build(settings, None, fallback, pool=None)
    activity = Activity()
    pool = ShardPool(registry, tls=peer_tls(settings), activity=activity)
    return _build(settings, registry, pool, pool=pool, activity=activity)


def _registry(settings: Settings) -> Registry | None:
    if settings.redis_url is None:
        return None
    return RedisRegistry(settings.redis_url, fleet=settings.fleet)


def _build(
    settings: Settings,
    registry: Registry | None,
    shard: ShardClient,
    *,
    pool: ShardPool | None,
    activity: Activity | None = None,
) -> Any:
    url = settings.redis_url
    sessions = None if url is None else RedisSessionCount(url, fleet=settings.fleet)
    instance = f"gateway-{os.getpid()}"
    tracing = configure_tracing(settings, SERVICE_GATEWAY, instance_id=instance)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if pool is not None:
            await pool.close()
        if registry is not None:
            await registry.close()
        if sessions is not None:
            await sessions.close()
        await asyncio.to_thread(tracing.shutdown)

    return create_app(
        settings,
        shard,
        registry,
        model_folder=find_model(settings.model).folder,
        tracer=tracing.tracer,
        activity=activity,
        count_sessions=sessions or nobody_counts,
        lifespan=lifespan,
    )
