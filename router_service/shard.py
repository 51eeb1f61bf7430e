"""An attention shard put together: model, experts, sessions, engine, telemetry, lease.

It is the `ShardClient` of a gateway in the same process, and what Ray's deployment wraps.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b

import torch
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry

from router_service.dispatch.dispatcher import RemoteExperts
from router_service.dispatch.lane_choice import chosen_transport
from router_service.dispatch.local_experts import LocalExperts
from router_service.engine.engine import Engine
from router_service.engine.engine_stats import EngineMetrics, EngineStats
from router_service.engine.step_timings import StepTimings
from router_service.loop_thread import LoopThread
from router_service.model.decoder import MixtralDecoder
from router_service.model.kv_cache import KVCache
from router_service.model.reproducibility import resolve_reproducible
from router_service.sampling.sampler import Sampler
from router_service.scheduling.step_plan import SchedulerConfig
from router_service.session_tier.session_tier import SessionTier
from router_service.shard_server import ShardServer
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.expert_ffn import computed_digest
from services.core.generation import GenerateRequest, GenerationDelta, SessionInfo
from services.core.kernels.choice import kernels_name, native_kernels_for, set_num_threads
from services.core.lease import Lease
from services.core.memory_registry import MemoryRegistry
from services.core.metrics import MetricsServer, new_registry
from services.core.model_config import ModelConfig
from services.core.redis_registry import RedisRegistry
from services.core.registry import Registry, ShardRecord, Slot
from services.core.settings import Settings
from services.core.static_registry import StaticRegistry, parse_endpoints
from services.core.telemetry import SERVICE_SHARD
from services.core.tensor_codec import dtype_name, resolve_device, torch_dtype
from services.core.tls import peer_tls
from services.core.tracing import Tracing, configure_tracing
from services.sessions.redis_store import RedisSessionStore
from services.sessions.store import BlockLayout

log = logging.getLogger(__name__)

_EVERYWHERE = ("0.0.0.0", "::")


class AttentionShard:
    """A running engine and what belongs to it. Made by `start`, ended by `stop`."""

    def __init__(
        self,
        engine: Engine,
        *,
        shard_id: str,
        sessions: SessionTier | None,
        tracing: Tracing,
        metrics: MetricsServer,
        lease_registry: Registry,
        settings: Settings,
    ) -> None:
        self._engine = engine
        self._shard_id = shard_id
        self._sessions = sessions
        self._tracing = tracing
        self._metrics = metrics
        self._drain_timeout_s = settings.drain_timeout_s
        self._max_num_seqs = settings.max_num_seqs
        self._started_at = time.time()
        self._server = ShardServer(self, host=settings.shard_host, tls=peer_tls(settings))
        self._advertised_host = _advertised_host(settings)
        self._endpoint: str | None = None
        # On a thread of its own: a long step must not cost the lease.
        self._lease_thread = LoopThread("lease")
        self._lease = Lease(
            lease_registry,
            self._record,
            heartbeat_s=settings.heartbeat_s,
            lease_s=settings.lease_s,
        )

    @classmethod
    def start(cls, settings: Settings, *, in_process_experts: bool) -> AttentionShard:
        """Load the model, find the experts, start the engine. Blocks until it could serve.

        Raises `CheckpointError`, `ConfigurationError`, or `UnavailableError` naming the experts
        that no worker holds after `expert_wait_s`.
        """
        shard_id = f"shard-{secrets.token_hex(4)}"
        tracing = configure_tracing(settings, SERVICE_SHARD, instance_id=shard_id)
        collectors = new_registry()
        thread = LoopThread("engine")
        thread.start()
        # Weights are read and packed on the thread that computes: OpenMP keeps a pool for every
        # thread that has used it, and with more pools than cores each parallel region costs twice.
        model = thread.run_blocking(
            _load_model(settings, in_process_experts, tracing.tracer, collectors)
        )
        checkpoint, config, dtype = model.checkpoint, model.config, model.decoder.dtype
        experts = model.experts
        non_expert_digest = checkpoint.non_expert_digest()
        if settings.shard_weights != "auto":
            non_expert_digest = computed_digest(non_expert_digest, settings.shard_weights)
        if settings.reproducible:
            # A session's KV is then only for shards that round as this one does.
            kernels = kernels_name(dtype, model.decoder.device)
            non_expert_digest = computed_digest(non_expert_digest, kernels)
        fingerprint = model_fingerprint(config, non_expert_digest, experts.slot_digests())
        sessions = _session_tier(settings, config, dtype, fingerprint)
        engine = Engine(
            config=config,
            scheduler_config=SchedulerConfig(
                block_size=settings.block_size,
                num_blocks=model.kv_cache.num_blocks,
                max_model_len=settings.max_model_len or config.max_position_embeddings,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                max_waiting_tokens=settings.max_waiting_tokens,
                max_waiting_seqs=settings.max_waiting_seqs,
                max_ttft_s=settings.max_ttft_s,
            ),
            decoder=model.decoder,
            kv_cache=model.kv_cache,
            experts=experts,
            sampler=Sampler(),
            model_fingerprint=fingerprint,
            device=model.decoder.device,
            # With the experts in process there is nothing to wait for, hence nothing to overlap.
            num_micro_batches=1 if model.has_local_experts else settings.num_micro_batches,
            session_tier=sessions,
            tracer=tracing.tracer,
            step_sample_interval=settings.step_sample_interval,
            metrics=EngineMetrics(collectors),
            thread=thread,
        )
        shard = cls(
            engine,
            shard_id=shard_id,
            sessions=sessions,
            tracing=tracing,
            metrics=MetricsServer(collectors, settings.metrics_host, settings.metrics_port),
            lease_registry=_registry(settings),
            settings=settings,
        )
        engine.start()
        shard._listen()
        shard._start_lease()
        log.info(
            "%s on %s in %s (%s), %d KV blocks of %d tokens",
            checkpoint.name,
            model.decoder.device,
            dtype_name(dtype),
            kernels_name(dtype, model.decoder.device),
            model.kv_cache.num_blocks,
            settings.block_size,
        )
        return shard

    async def stop(self) -> None:
        """Let running requests finish within `drain_timeout_s`, then end everything."""
        await self._lease_thread.run(self._lease.end(self._shard_id))
        await self._lease_thread.stop()
        await self._engine.stop(self._drain_timeout_s)
        await self._server.stop()
        self._metrics.close()
        self._tracing.shutdown()

    async def hand_back(self) -> None:
        """Take no more requests and give running ones back at once, for another shard to go on
        with (`ShardLostError`). `stop` comes after."""
        await self._engine.hand_back()

    def stop_now(self) -> None:
        """`stop`, from code without an event loop."""
        asyncio.run(self.stop())

    def generate(self, request: GenerateRequest) -> AsyncIterator[tuple[GenerationDelta, ...]]:
        return self._engine.generate(request)

    async def get_session(self, tenant: str, session_id: str) -> SessionInfo | None:
        if self._sessions is None:
            return None
        return await self._sessions.get_session(tenant, session_id)

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        if self._sessions is None:
            return False
        return await self._sessions.delete_session(tenant, session_id)

    async def check_ready(self) -> None:
        self._engine.check_ready()

    def check_alive(self) -> None:
        """Raise `UnavailableError` when the engine has died; waiting for experts is no death."""
        self._engine.check_alive()

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def take_timings(self) -> StepTimings:
        """Where the engine's time went since the last call."""
        return self._engine.take_timings()

    def _listen(self) -> None:
        self._endpoint = f"{self._advertised_host}:{self._server.start()}"

    def _start_lease(self) -> None:
        self._lease_thread.start()
        self._lease_thread.run_blocking(self._lease.start())

    def _metrics_endpoint(self) -> str:
        """Where others reach it: with the pod's or host's address if it listens on all."""
        host = self._metrics.host
        return f"{self._advertised_host if host in _EVERYWHERE else host}:{self._metrics.port}"

    def _record(self) -> ShardRecord:
        stats = self._engine.stats()
        load: dict[Slot, int] = {
            (layer, expert): int(tokens)
            for layer, row in enumerate(stats.expert_load.tolist())
            for expert, tokens in enumerate(row)
            if tokens
        }
        return ShardRecord(
            shard_id=self._shard_id,
            pid=os.getpid(),
            host=socket.gethostname(),
            started_at=self._started_at,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            waiting_tokens=stats.waiting_tokens,
            kv_blocks_used=stats.kv_blocks_used,
            kv_blocks_total=stats.kv_blocks_total,
            num_generated_tokens=stats.num_generated_tokens,
            num_prefilled_tokens=stats.num_prefilled_tokens,
            metrics_endpoint=self._metrics_endpoint(),
            endpoint=self._endpoint,
            expert_load=load,
            max_num_seqs=self._max_num_seqs,
            step_s=stats.timings.step_s,
            full_s=stats.timings.full_s,
            experts_s=stats.timings.experts_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    checkpoint: Checkpoint
    config: ModelConfig
    decoder: MixtralDecoder
    kv_cache: KVCache
    experts: LocalExperts | RemoteExperts

    @property
    def has_local_experts(self) -> bool:
        return isinstance(self.experts, LocalExperts)


async def _load_model(
    settings: Settings, in_process_experts: bool, tracer: Tracer, metrics: CollectorRegistry
) -> _Model:
    """Everything that holds tensors, and the experts once every slot has a replica."""
    checkpoint = Checkpoint.open(settings.model)
    config = checkpoint.config
    device = resolve_device(settings.device)
    dtype = torch_dtype(config.dtype if settings.dtype == "auto" else settings.dtype)
    if settings.num_threads is not None:
        is_native = native_kernels_for(dtype, device) is not None
        set_num_threads(settings.num_threads, is_native=is_native)
    resolve_reproducible(settings.reproducible, config, dtype=dtype, device=device)
    checkpoint.require(non_expert=True)
    decoder = MixtralDecoder.load(
        checkpoint, dtype=dtype, device=device, shard_weights=settings.shard_weights
    )
    experts: LocalExperts | RemoteExperts
    if in_process_experts or not config.is_moe:
        experts = LocalExperts.load(
            checkpoint,
            dtype=dtype,
            device=device,
            wire_dtype=settings.wire_dtype,
            expert_weights=settings.expert_weights,
            tracer=tracer,
            metrics=metrics,
        )
    else:
        experts = RemoteExperts(
            config,
            registry=_registry(settings),
            dtype=dtype,
            wire_dtype=settings.wire_dtype,
            expert_wait_s=settings.expert_wait_s,
            call_timeout_s=settings.call_timeout_s,
            max_frame_bytes=settings.max_frame_bytes,
            local_host=socket.gethostname(),
            transport=chosen_transport(
                settings.dispatch_transport,
                max_frame_bytes=settings.max_frame_bytes,
                tls=peer_tls(settings),
            ),
            seed=secrets.randbits(32),  # equal replicas are not the same shards' first choice
            tracer=tracer,
            metrics=metrics,
        )
        await experts.wait_ready()
    kv_cache = KVCache(
        config,
        num_blocks=KVCache.num_blocks_for(
            config, settings.kv_cache_bytes, settings.block_size, dtype
        ),
        block_size=settings.block_size,
        dtype=dtype,
        device=device,
    )
    return _Model(
        checkpoint=checkpoint, config=config, decoder=decoder, kv_cache=kv_cache, experts=experts
    )


def model_fingerprint(
    config: ModelConfig, non_expert_digest: bytes, slot_digests: Mapping[Slot, bytes]
) -> bytes:
    """16 bytes that differ when config, attention weights or any expert's weights differ.

    Experts' digests come from the workers, so no process reads weights it does not serve.
    """
    digest = blake2b(repr(config).encode(), digest_size=16)
    digest.update(non_expert_digest)
    for slot in sorted(slot_digests):
        digest.update(repr(slot).encode() + slot_digests[slot])
    return digest.digest()


def _advertised_host(settings: Settings) -> str:
    if settings.shard_advertised_host is not None:
        return settings.shard_advertised_host
    return socket.gethostname() if settings.shard_host in _EVERYWHERE else settings.shard_host


def _registry(settings: Settings) -> Registry:
    """The static list where one is given, else Redis, else this process alone."""
    if settings.workers:
        return StaticRegistry(parse_endpoints(settings.workers), tls=peer_tls(settings))
    if settings.redis_url is not None:
        return RedisRegistry(settings.redis_url, fleet=settings.fleet)
    return MemoryRegistry()


def _session_tier(
    settings: Settings, config: ModelConfig, dtype: torch.dtype, fingerprint: bytes
) -> SessionTier | None:
    if settings.redis_url is None:
        return None
    layout = BlockLayout(
        model_fingerprint=fingerprint,
        num_layers=config.num_hidden_layers,
        block_size=settings.block_size,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=dtype_name(dtype),
    )
    return SessionTier(
        RedisSessionStore(settings.redis_url, fleet=settings.fleet, layout=layout),
        layout=layout,
        queue_bytes=settings.session_queue_bytes,
        default_ttl_s=settings.session_ttl_s,
        checkpoint_kv=settings.checkpoint_kv,
        checkpoint_ttl_s=settings.checkpoint_ttl_s,
    )
