"""Real expert workers inside the test: their servers on loopback, their frames, their threads.

A worker costs milliseconds here instead of the seconds that a process takes to import torch, so a
test can afford many fleets. What differs from the product is only that they share one process.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from opentelemetry.trace import NoOpTracer, Tracer
from prometheus_client import CollectorRegistry

from expert_service.dispatch import DispatchService
from expert_service.frame_spans import FrameSpans
from expert_service.slots import SlotGroup
from expert_service.worker import ExpertWorker, WorkerOptions
from expert_service.worker_stats import WorkerStats
from router_service.dispatch.dispatcher import RemoteExperts
from router_service.dispatch.lane_choice import chosen_transport
from router_service.dispatch.local_experts import LocalExperts
from router_service.engine.engine import Engine
from router_service.loop_thread import LoopThread
from router_service.model.decoder import MixtralDecoder
from router_service.model.kv_cache import KVCache
from router_service.sampling.sampler import Sampler
from router_service.scheduling.step_plan import SchedulerConfig
from router_service.session_tier.session_tier import SessionTier
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.generation import GenerateRequest, SamplingParams
from services.core.memory_registry import MemoryRegistry
from services.core.model_config import ModelConfig
from services.core.placement import WorkerSlots
from services.core.quantization.formats import WeightsSetting
from services.core.settings import DispatchTransportName, Settings, load_settings
from services.core.static_registry import StaticRegistry
from tests.support.at_once import all_at_once
from tests.support.eventually import eventually

NUM_THREADS = 1
"""Torch threads of a worker; experts in process must have as many to give the same bits."""


@asynccontextmanager
async def running_workers(
    folder: Path,
    placement: Sequence[WorkerSlots],
    *,
    expert_weights: str = "auto",
    tracer: Tracer | None = None,
    **settings: object,
) -> AsyncIterator[list[str]]:
    """One worker for each part of the placement; yields their endpoints once all are ready."""
    fleet = _Fleet(
        tracer=tracer or NoOpTracer(),
        settings=load_settings(
            model=str(folder), device="cpu", expert_weights=expert_weights, **settings
        ),
    )
    thread = LoopThread("workers")
    thread.start()
    try:
        yield await thread.run(fleet.start(placement))
    finally:
        # gRPC's server must end before its loop does.
        is_drained = await thread.run(fleet.stop())
        await thread.stop()
    assert is_drained, "frames were left unanswered"


def remote_experts(
    config: ModelConfig,
    endpoints: Sequence[str],
    dtype: torch.dtype,
    *,
    transport: DispatchTransportName = "grpc",
    tracer: Tracer | None = None,
) -> RemoteExperts:
    """A dispatcher to the workers at `endpoints`."""
    return RemoteExperts(
        config,
        registry=StaticRegistry(endpoints, timeout_s=60.0),
        dtype=dtype,
        transport=chosen_transport(transport, max_frame_bytes=256 << 20),
        tracer=tracer,
    )


@asynccontextmanager
async def connected(
    config: ModelConfig, endpoints: Sequence[str], dtype: torch.dtype
) -> AsyncIterator[RemoteExperts]:
    """A dispatcher on this event loop, to all of the model's experts."""
    experts = remote_experts(config, endpoints, dtype)
    try:
        await experts.wait_ready()
        yield experts
    finally:
        await experts.close()


@asynccontextmanager
async def running_engine(
    folder: Path,
    endpoints: Sequence[str],
    *,
    dtype: torch.dtype = torch.float32,
    block_size: int = 4,
    num_blocks: int = 96,
    max_num_batched_tokens: int = 24,
    num_micro_batches: int | Literal["auto"] = 1,
    shard_weights: WeightsSetting = "auto",
    session_tier: SessionTier | None = None,
    transport: DispatchTransportName = "grpc",
    tracer: Tracer | None = None,
    step_sample_interval: int = 64,
) -> AsyncIterator[Engine]:
    """The engine over the workers at `endpoints`, ready; with the experts in process where there
    are none."""
    checkpoint = Checkpoint.open(str(folder))
    config, device = checkpoint.config, torch.device("cpu")
    thread = LoopThread("engine")
    thread.start()
    experts: LocalExperts | RemoteExperts
    if endpoints:
        experts = remote_experts(config, endpoints, dtype, transport=transport, tracer=tracer)
    else:
        experts = LocalExperts.load(checkpoint, dtype=dtype, device=device, tracer=tracer)
    await thread.run(experts.wait_ready())
    engine = Engine(
        config=config,
        scheduler_config=SchedulerConfig(
            block_size=block_size,
            num_blocks=num_blocks,
            max_model_len=config.max_position_embeddings,
            max_num_batched_tokens=max_num_batched_tokens,
        ),
        decoder=MixtralDecoder.load(
            checkpoint, dtype=dtype, device=device, shard_weights=shard_weights
        ),
        kv_cache=KVCache(
            config, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=device
        ),
        experts=experts,
        sampler=Sampler(),
        model_fingerprint=checkpoint.non_expert_digest(),
        num_micro_batches=num_micro_batches,
        num_threads=NUM_THREADS,
        session_tier=session_tier,
        tracer=tracer,
        step_sample_interval=step_sample_interval,
        thread=thread,
    )
    engine.start()
    try:
        yield engine
        engine.check_alive()
    finally:
        await engine.stop(timeout_s=5)


async def greedy(
    engine: Engine, prompts: Sequence[Sequence[int]], max_tokens: int
) -> list[list[int]]:
    """`max_tokens` greedy tokens of every prompt; see `all_at_once`."""

    async def one(number: int, prompt: Sequence[int]) -> list[int]:
        request = GenerateRequest(
            request_id=f"request-{number}",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        )
        return [
            token
            async for deltas in engine.generate(request)
            for delta in deltas
            for token in delta.token_ids
        ]

    return await all_at_once(engine, [one(*item) for item in enumerate(prompts)])


def random_placement(config: ModelConfig, generator: random.Random) -> list[WorkerSlots]:
    """Every layer's experts dealt anew to one to three workers, in no order; one worker has a
    replica."""
    placement = []
    for layer in range(config.num_hidden_layers):
        experts = list(range(config.num_local_experts))
        generator.shuffle(experts)
        num_workers = generator.randint(1, min(3, len(experts)))
        for first in range(num_workers):
            held = tuple(sorted(experts[first::num_workers]))
            placement.append(WorkerSlots(experts=held, layers=range(layer, layer + 1)))
    placement.append(generator.choice(placement))
    generator.shuffle(placement)
    return placement


@dataclass(kw_only=True)
class _Fleet:
    """Workers on one loop; their leases say when they are ready."""

    settings: Settings
    tracer: Tracer
    registry: MemoryRegistry = field(default_factory=MemoryRegistry)
    workers: list[ExpertWorker] = field(default_factory=list)
    runs: list[asyncio.Task[bool]] = field(default_factory=list)

    async def start(self, placement: Sequence[WorkerSlots]) -> list[str]:
        """Their endpoints once all are ready; raises what one of them raised."""
        for index, part in enumerate(placement):
            worker = self._worker(f"worker-{index}", part)
            self.workers.append(worker)
            self.runs.append(asyncio.create_task(worker.run()))
        await eventually(self._is_ready, timeout_s=60)
        return [worker.endpoint for worker in self.workers]

    async def stop(self) -> bool:
        """Drain and end all; whether everything accepted was answered."""
        for worker in self.workers:
            worker.request_stop()
        ends = await asyncio.gather(*self.runs, return_exceptions=True)
        return all(end is True for end in ends)

    async def _is_ready(self) -> bool:
        for run in self.runs:
            if run.done():
                run.result()
        leases = (await self.registry.snapshot()).workers
        return sum(lease.state == "ready" for lease in leases) == len(self.workers)

    def _worker(self, worker_id: str, part: WorkerSlots) -> ExpertWorker:
        stats = WorkerStats(CollectorRegistry())
        options = WorkerOptions(
            worker_id=worker_id,
            slots=[SlotGroup(experts=part.experts, layers=tuple(part.layers))],
            host="127.0.0.1",
            port=0,
            advertised_host="127.0.0.1",
            num_threads=NUM_THREADS,
        )
        dispatch = DispatchService(
            max_frame_bytes=self.settings.max_frame_bytes,
            stats=stats,
            spans=FrameSpans(self.tracer, worker_id=worker_id),
        )
        return ExpertWorker(
            self.settings,
            options,
            dispatch=dispatch,
            stats=stats,
            tracer=self.tracer,
            registry=self.registry,
        )
