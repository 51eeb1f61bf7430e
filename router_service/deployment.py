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
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
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
    ShardLostError,
    UnavailableError,
    UnsupportedModelError,
)
from services.core.generation import GenerateRequest, GenerationDelta, SessionInfo
from services.core.heap import freeze_heap
from services.core.listening_socket import gateway_listener
from services.core.logging_setup import configure_logging
from services.core.settings import Settings, load_settings

log = logging.getLogger(__name__)

SHARDS = "AttentionShard"
GATEWAY = "Gateway"
CLUSTER_SHARDS = "shards"
"""Name of the shards' application where a Serve config deploys it."""
MAX_ONGOING_REQUESTS = 4096
_CALL_ATTEMPTS = 3
_ONE_AT_A_TIME = 1
"""Per cent of the replicas, rounded up, that may be started beside those that serve."""
_STOP_SLACK_S = 5.0
_POLL_S = 0.1
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
    """One attention shard: an engine in a thread of its own, behind Ray Serve's actor.

    `settings` None: those of the machine it was placed on.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: Settings | None, in_process_experts: bool
    ) -> None:
        settings = settings or load_settings()
        _log_to_file(settings, "shard")
        # In a thread: loading may take minutes, and Ray talks to the replica meanwhile.
        self._shard = await asyncio.to_thread(
            AttentionShard.start, settings, in_process_experts=in_process_experts
        )
        freeze_heap()

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
    as much, and its direct ingress delays shutdown (docs/adr/0004). `settings` None: those of the
    machine it was placed on.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: Settings | None, factory: str, shards_application: str
    ) -> None:
        settings = settings or load_settings()
        _log_to_file(settings, "gateway")
        module, _, name = factory.partition(":")
        build = getattr(importlib.import_module(module), name)
        shards = serve.get_deployment_handle(SHARDS, shards_application, _check_exists=False)
        application = build(settings, RayShardClient(shards))
        freeze_heap()
        # Taken last: from then on it is for this process to answer what comes.
        listener = await asyncio.to_thread(gateway_listener, settings)
        self._server = AsgiServer(application, listener, drain_timeout_s=settings.restart_drain_s)
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
        except (RayError, RayServeException) as error:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentPlan:
    """What is deployed. `gateway` names `f(settings, shard_client) -> ASGI app`.

    `is_cluster`: on several machines. Each replica then reads the settings of its own, of which it
    takes the one resource `shard` or `gateway` that it offers.
    """

    gateway: str
    min_shards: int
    max_shards: int
    in_process_experts: bool
    num_gpus: int = 0
    num_gateways: int = 1
    is_cluster: bool = False

    @property
    def num_gpus_per_shard(self) -> float:
        return 1.0 if self.num_gpus >= self.max_shards else 0.0

    @property
    def has_room_for_another_shard(self) -> bool:
        """As far as GPUs are concerned."""
        return not self.num_gpus_per_shard or self.num_gpus > self.max_shards


class Deployment:
    """Shards and gateway as two Ray Serve applications, so that each is restarted by itself.

    Ray Serve restarts replicas one by one. Where there is room (`surge`) each new replica serves
    before the old one is told to go; shards hand back what they could not finish, and gateways
    share one listening socket. Methods block. They raise `CheckpointError` or
    `ConfigurationError` when a replica refused its input, `UnavailableError` with its own words
    when it did not come up otherwise; the replicas from before then go on.
    """

    def __init__(self, settings: Settings, plan: DeploymentPlan) -> None:
        self._settings = settings
        self._plan = plan
        self._version = 1

    def start(self) -> None:
        """Return when gateway and shards serve."""
        serve.start(proxy_location="Disabled", logging_config=SERVE_LOGGING)
        self._run(self._shards(surge=False), self._gateway())

    def restart_shards(self, settings: Settings, *, surge: bool) -> None:
        """Start every shard anew, with `settings`; return when the old ones have ended."""
        self._settings = settings
        self._run(self._shards(surge=surge))
        self._wait_old_replicas_ended(self._shards_name, 2 * settings.drain_timeout_s)

    def restart_gateway(self, settings: Settings) -> None:
        """Start a new gateway; return when the old one has answered all it had accepted."""
        self._settings = settings
        self._run(self._gateway())
        self._wait_old_replicas_ended(self._gateway_name, settings.restart_drain_s)

    def replace(self, settings: Settings) -> None:
        """Start new shards and gateway beside the old ones, which answer what they had accepted.

        What is new and what is old have nothing in common; `settings` may name another model.
        """
        old_names = (self._gateway_name, self._shards_name)
        old_settings, self._settings = self._settings, settings
        self._version += 1
        try:
            self._run(self._shards(surge=False))
            self._run(self._gateway())
        except ExpertfleetError:
            self._delete(self._gateway_name, 0.0)
            self._delete(self._shards_name, 0.0)
            self._version -= 1
            self._settings = old_settings
            raise
        for name in old_names:  # the gateway first: its streams end on the old shards
            self._delete(name, settings.restart_drain_s)

    @property
    def _shards_name(self) -> str:
        return f"shards-{self._version}"

    @property
    def _gateway_name(self) -> str:
        return f"gateway-{self._version}"

    def _shards(self, *, surge: bool) -> serve.RunTarget:
        application = _shards_application(self._settings, self._plan, surge=surge)
        return _target(application, self._shards_name)

    def _gateway(self) -> serve.RunTarget:
        application = _gateway_application(self._settings, self._plan, self._shards_name)
        return _target(application, self._gateway_name)

    def _run(self, *targets: serve.RunTarget) -> None:
        try:
            serve.run_many(targets)
        except RuntimeError as error:
            raise _start_failure(error, [target.name for target in targets]) from error

    def _wait_old_replicas_ended(self, name: str, timeout_s: float) -> None:
        """Ray Serve kills what takes longer than `graceful_shutdown_timeout_s`."""
        _wait(lambda: _num_stopping(name) == 0, timeout_s, f"the old replicas of {name} ended")

    def _delete(self, name: str, timeout_s: float) -> None:
        if name in serve.status().applications:
            serve.delete(name, _blocking=False)
            _wait(lambda: name not in serve.status().applications, timeout_s, f"{name} ended")


def build_shards(arguments: Mapping[str, int]) -> serve.Application:
    """Attention shards on a Ray cluster that something else started, such as KubeRay.

    `arguments`: `min_shards`, `max_shards`, `gpus_per_shard` (0 or 1). Named by a Serve config's
    `import_path`; its application must be called "shards".
    """
    max_shards = int(arguments["max_shards"])
    plan = DeploymentPlan(
        gateway="",
        min_shards=int(arguments["min_shards"]),
        max_shards=max_shards,
        in_process_experts=False,
        num_gpus=max_shards * int(arguments["gpus_per_shard"]),
        is_cluster=True,
    )
    return _shards_application(load_settings(), plan, surge=False)


def build_gateways(arguments: Mapping[str, Any]) -> serve.Application:
    """Gateways beside `build_shards`. `arguments`: `num_gateways`, and `factory`, which names
    `f(settings, shard_client) -> ASGI app`."""
    plan = DeploymentPlan(
        gateway=str(arguments["factory"]),
        min_shards=1,
        max_shards=1,
        in_process_experts=False,
        num_gateways=int(arguments["num_gateways"]),
        is_cluster=True,
    )
    return _gateway_application(load_settings(), plan, CLUSTER_SHARDS)


def _shards_application(
    settings: Settings, plan: DeploymentPlan, *, surge: bool
) -> serve.Application:
    scaling: dict[str, Any] = {"num_replicas": plan.min_shards}
    if plan.max_shards > plan.min_shards:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=plan.min_shards,
                max_replicas=plan.max_shards,
                policy=AutoscalingPolicy(policy_function=scale_shards),
                upscale_delay_s=5.0,
                downscale_delay_s=60.0,
                metrics_interval_s=1.0,
            )
        }
    application: serve.Application = serve.deployment(
        ShardReplica,
        name=SHARDS,
        ray_actor_options={
            "num_cpus": 0,
            "num_gpus": plan.num_gpus_per_shard,
            **({"resources": {"shard": 1}} if plan.is_cluster else {}),
        },
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        # The shard drains, and then writes sessions for as long again.
        graceful_shutdown_timeout_s=2 * settings.drain_timeout_s + _STOP_SLACK_S,
        graceful_shutdown_wait_loop_s=0.2,
        max_surge_percent=_ONE_AT_A_TIME if surge and plan.has_room_for_another_shard else 0,
        request_router_config=RequestRouterConfig(request_router_class=SessionThenLoadRouter),
        **scaling,
    ).bind(None if plan.is_cluster else settings, plan.in_process_experts)
    return application


def _gateway_application(
    settings: Settings, plan: DeploymentPlan, shards_name: str
) -> serve.Application:
    application: serve.Application = serve.deployment(
        GatewayReplica,
        name=GATEWAY,
        num_replicas=plan.num_gateways,
        ray_actor_options={
            "num_cpus": 0,
            **({"resources": {"gateway": 1}} if plan.is_cluster else {}),
        },
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=settings.restart_drain_s + _STOP_SLACK_S,
        graceful_shutdown_wait_loop_s=0.2,
        max_surge_percent=0 if plan.is_cluster else _ONE_AT_A_TIME,
    ).bind(None if plan.is_cluster else settings, plan.gateway, shards_name)
    return application


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
    """The answer of one shard or, should it be lost over the question, of another one."""
    for attempt in range(_CALL_ATTEMPTS):
        try:
            return await method.remote(*arguments)
        except (RayError, RayServeException) as error:
            failure = _unwrap(error)
            if not isinstance(failure, ShardLostError) or attempt == _CALL_ATTEMPTS - 1:
                raise failure from error
    raise AssertionError("unreachable")


def _target(application: Any, name: str) -> serve.RunTarget:
    return serve.RunTarget(application, name=name, route_prefix=None, logging_config=SERVE_LOGGING)


def _num_stopping(application: str) -> int:
    states = [
        deployment.replica_states
        for deployment in serve.status().applications[application].deployments.values()
    ]
    return sum(each.get("STOPPING", 0) for each in states)


def _wait(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s + 2 * _STOP_SLACK_S
    while not condition():
        if time.monotonic() > deadline:
            raise UnavailableError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(_POLL_S)


def _start_failure(error: Exception, names: Iterable[str]) -> ExpertfleetError:
    """The last line of what a replica's constructor raised, as the error it was."""
    applications = serve.status().applications
    messages = [
        deployment.message
        for name in names
        if name in applications
        for deployment in applications[name].deployments.values()
    ]
    text = "\n".join(message for message in messages if message) or str(error)
    for kind in (UnsupportedModelError, CheckpointError, ConfigurationError):
        if found := re.findall(rf"{kind.__name__}: (.*)", text):
            return kind(found[-1])
    return UnavailableError(f"gateway or attention shards did not start: {text}")


def _unwrap(error: Exception) -> ExpertfleetError:
    """Our own error out of Ray's wrapping. An exception of the shard's code is no loss of the
    shard, and would come again; anything else means that it is gone or was never reached."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, ExpertfleetError):
        return cause
    log.error("attention shard failed: %s", error)
    if isinstance(error, RayTaskError):
        name = type(cause or error).__name__
        return ExpertfleetError(f"the shard failed ({name}); its log has the traceback")
    if isinstance(error, RayServeException):
        return ShardLostError("no attention shard takes the request", reason="unreachable")
    return ShardLostError("the attention shard that had the request is gone", reason="died")


def _session_key(tenant: str, session_id: str) -> str:
    return f"{tenant}:{session_id}"
