"""Gateway and attention shards as Ray Serve deployments: the only file that imports ray.

Ray places, supervises and scales; what crosses it per step is one batch of deltas per stream. The
gateway is not imported here but named ("module:function"), since the rooms do not know each other.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import random
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from router_service.shard import AttentionShard
from router_service.shard_scaling import ScalingTargets, ShardLoad, desired_shards
from services.core.asgi_server import AsgiServer
from services.core.errors import (
    CheckpointError,
    ConfigurationError,
    ExpertfleetError,
    UnavailableError,
    UnsupportedModelError,
)
from services.core.generation import GenerateRequest, GenerationDelta, SessionInfo
from services.core.logging_setup import configure_logging
from services.core.settings import Settings

log = logging.getLogger(__name__)

APPLICATION = "expertfleet"
MAX_ONGOING_REQUESTS = 4096
SERVE_LOGGING = {"enable_access_log": False, "log_level": "WARNING"}


class SessionThenLoadRouter(ConsistentHashRouter):  # type: ignore[misc]
    """Requests of a session go to its shard; others to the less loaded of two random shards."""

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        metadata = pending_request.metadata if pending_request is not None else None
        if metadata is None or metadata.session_id or len(candidate_replicas) < 2:
            ranks: list[list[Any]] = await super().choose_replicas(
                candidate_replicas, pending_request
            )
            return ranks
        return [random.sample(candidate_replicas, 2)]


class ShardReplica:
    """One attention shard: an engine in a thread of its own, behind Ray Serve's actor."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: Settings, in_process_experts: bool
    ) -> None:
        _log_to_file(settings, "shard")
        # In a thread: loading may take minutes, and Ray talks to the replica meanwhile.
        self._shard = await asyncio.to_thread(
            AttentionShard.start, settings, in_process_experts=in_process_experts
        )

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Any]:
        async for deltas in self._shard.generate(request):
            yield deltas

    async def get_session(self, tenant: str, session_id: str) -> SessionInfo | None:
        return await self._shard.get_session(tenant, session_id)

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        return await self._shard.delete_session(tenant, session_id)

    async def check_ready(self) -> None:
        await self._shard.check_ready()

    async def check_health(self) -> None:
        """Ray replaces the replica when this raises."""
        self._shard.check_alive()

    def record_autoscaling_stats(self) -> dict[str, float]:
        stats = self._shard.stats()
        return {
            "waiting_tokens": float(stats.waiting_tokens),
            "kv_use": stats.kv_blocks_used / max(1, stats.kv_blocks_total),
        }

    async def __del__(self) -> None:
        # Ray Serve awaits this when it retires the replica; it may not have been constructed.
        shard = getattr(self, "_shard", None)
        if shard is not None:
            await shard.stop()


class GatewayReplica:
    """The HTTP front: serves the application that `factory` names, over the shards' handle.

    It listens on the product's port itself. Behind Ray Serve's proxy a token costs several times
    as much, and its direct ingress delays shutdown (docs/adr/0004).
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: Settings, factory: str, shards: Any
    ) -> None:
        _log_to_file(settings, "gateway")
        module, _, name = factory.partition(":")
        build = getattr(importlib.import_module(module), name)
        self._server = AsgiServer(
            build(settings, RayShardClient(shards)),
            host=settings.host,
            port=settings.port,
            drain_timeout_s=settings.drain_timeout_s / 2,
        )
        await self._server.start()

    async def __del__(self) -> None:
        server = getattr(self, "_server", None)
        if server is not None:
            await server.stop()


class RayShardClient:
    """`ShardClient` over a Ray Serve deployment handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def generate(
        self, request: GenerateRequest
    ) -> AsyncIterator[tuple[GenerationDelta, ...]]:
        options: dict[str, Any] = {"stream": True}
        if request.session_id is not None:
            options["session_id"] = _session_key(request.tenant, request.session_id)
        responses = self._handle.options(**options).generate.remote(request)
        finished = False
        try:
            async for deltas in responses:
                yield deltas
            finished = True
        except (RayTaskError, RayActorError, RayServeException) as error:
            finished = True
            raise _unwrap(error) from error
        finally:
            # An endless stream left behind would delay Ray's shutdown, and keep its blocks.
            if not finished:
                responses.cancel()

    async def get_session(self, tenant: str, session_id: str) -> SessionInfo | None:
        handle = self._handle.options(session_id=_session_key(tenant, session_id))
        info: SessionInfo | None = await _call(handle.get_session, tenant, session_id)
        return info

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        handle = self._handle.options(session_id=_session_key(tenant, session_id))
        return bool(await _call(handle.delete_session, tenant, session_id))

    async def check_ready(self) -> None:
        await _call(self._handle.check_ready)


def build_application(
    settings: Settings,
    *,
    gateway: str,
    min_shards: int,
    max_shards: int,
    in_process_experts: bool,
    num_gpus_per_shard: float = 0.0,
) -> Any:
    """Bind gateway and shards. `gateway` names `f(settings, shard_client) -> ASGI app`."""
    actor_options = {"num_cpus": 0, "num_gpus": num_gpus_per_shard}
    scaling: dict[str, Any] = {"num_replicas": min_shards}
    if max_shards > min_shards:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=min_shards,
                max_replicas=max_shards,
                initial_replicas=min_shards,
                policy=AutoscalingPolicy(policy_function=scale_shards),
                upscale_delay_s=5.0,
                downscale_delay_s=60.0,
                metrics_interval_s=1.0,
            )
        }
    shards = serve.deployment(
        ShardReplica,
        name="AttentionShard",
        ray_actor_options=actor_options,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.2,
        request_router_config=RequestRouterConfig(request_router_class=SessionThenLoadRouter),
        **scaling,
    ).bind(settings, in_process_experts)
    return serve.deployment(
        GatewayReplica,
        name="Gateway",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.2,
    ).bind(settings, gateway, shards)


def scale_shards(context: Any) -> tuple[int, dict[str, Any]]:
    """Ray Serve's autoscaling policy: from the engines' own load, not from counts of requests."""
    metrics = context.aggregated_metrics or {}
    waiting, kv_use = metrics.get("waiting_tokens", {}), metrics.get("kv_use", {})
    loads = [
        ShardLoad(waiting_tokens=float(waiting[replica]), kv_use=float(kv_use.get(replica, 0.0)))
        for replica in waiting
    ]
    wanted = desired_shards(
        loads,
        current=context.target_num_replicas,
        minimum=context.capacity_adjusted_min_replicas,
        maximum=context.capacity_adjusted_max_replicas,
        targets=ScalingTargets(),
    )
    return wanted, {}


def start_ray(*, ray_dir: Path, num_gpus: int) -> None:
    """Start Ray on this machine alone. It installs signal handlers of its own.

    The environment of `ray_environment` must have been set before this module was imported.
    """
    ray.init(
        num_cpus=1,
        num_gpus=num_gpus,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=str(ray_dir),
        object_store_memory=128 << 20,
    )


def serve_application(application: Any) -> None:
    """Deploy on the running Ray; returns when gateway and shards serve.

    Raises `CheckpointError` or `ConfigurationError` when a shard refused its input,
    `UnavailableError` with the replica's own words when it did not come up otherwise.
    """
    serve.start(proxy_location="Disabled", logging_config=SERVE_LOGGING)
    try:
        serve.run(
            application,
            name=APPLICATION,
            route_prefix=None,
            logging_config=SERVE_LOGGING,
        )
    except RuntimeError as error:
        raise _start_failure(error) from error


def stop(timeout_s: float) -> None:
    """End the application, for at most `timeout_s` with its consent, and then Ray itself."""
    graceful = threading.Thread(target=serve.shutdown, daemon=True)
    graceful.start()
    graceful.join(timeout_s)
    ray.shutdown()


def _log_to_file(settings: Settings, service: str) -> None:
    """Into the state folder, where there is one: what Ray keeps of a replica goes with Ray."""
    file = settings.state_dir / "logs" / f"{service}.log" if settings.state_dir else None
    configure_logging(settings.log_level, service=service, instance=str(os.getpid()), file=file)


async def _call(method: Any, *arguments: Any) -> Any:
    try:
        return await method.remote(*arguments)
    except (RayTaskError, RayActorError, RayServeException) as error:
        raise _unwrap(error) from error


def _start_failure(error: Exception) -> ExpertfleetError:
    """The last line of what a replica's constructor raised, as the error it was."""
    application = serve.status().applications.get(APPLICATION)
    messages = [d.message for d in application.deployments.values()] if application else []
    text = "\n".join(message for message in messages if message) or str(error)
    for kind in (UnsupportedModelError, CheckpointError, ConfigurationError):
        if found := re.findall(rf"{kind.__name__}: (.*)", text):
            return kind(found[-1])
    return UnavailableError(f"the attention shards did not start: {text}")


def _unwrap(error: Exception) -> ExpertfleetError:
    """Our own error out of Ray's wrapping; anything else means that the shard is gone."""
    cause = getattr(error, "cause", None)
    if isinstance(error, ExpertfleetError):
        return error
    if isinstance(cause, ExpertfleetError):
        return cause
    log.error("attention shard failed: %s", error)
    return UnavailableError("the attention shard that served the request is gone; send it again")


def _session_key(tenant: str, session_id: str) -> str:
    return f"{tenant}:{session_id}"
