"""An expert worker on weights made from a seed, for `benchmarks.gpu`.

It is the product's worker (its loading, dispatch service, compute thread and gRPC server) without
lease, metrics and tracing. Writes one JSON line when it is ready, and ends when its standard input
does, so that it never outlives who started it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, cast

import torch
from opentelemetry.trace import NoOpTracer
from prometheus_client import CollectorRegistry

from benchmarks.gpu_weights import SeededWeights, random_config
from expert_service.dispatch import DispatchService
from expert_service.frame_spans import FrameSpans
from expert_service.held_experts import HeldExperts, load_experts
from expert_service.server import WorkerServer
from expert_service.worker_stats import WorkerStats
from protos import experts_pb2
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.model_config import ModelConfig
from services.core.tensor_codec import DTYPE_TO_PROTO

MAX_FRAME_BYTES = 256 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--experts", required=True, help="comma-separated")
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = random_config(arguments.shape, arguments.layers)
    experts = [int(expert) for expert in arguments.experts.split(",")]
    device = torch.device(arguments.device)
    held = load_experts(
        cast(Checkpoint, SeededWeights(config, device)),
        [(layer, expert) for layer in range(arguments.layers) for expert in experts],
        dtype=torch.bfloat16,
        device=device,
        cancelled=threading.Event(),
    )
    run_on_fast_loop(_serve(config, held, num_threads=arguments.threads))


async def _serve(config: ModelConfig, held: HeldExperts, *, num_threads: int) -> None:
    stats = WorkerStats(CollectorRegistry())
    dispatch = DispatchService(
        max_frame_bytes=MAX_FRAME_BYTES,
        stats=stats,
        spans=FrameSpans(NoOpTracer(), worker_id="worker"),
    )
    described = _describe(config, held)

    async def describe(_request: object, _context: object) -> experts_pb2.DescribeResponse:
        return described

    server = WorkerServer(dispatch=dispatch, describe=describe, max_frame_bytes=MAX_FRAME_BYTES)
    port = await server.start("127.0.0.1", 0)
    described.worker_id = f"worker-{port}"
    dispatch.open(held, num_threads=num_threads)
    await server.set_serving(True)
    sys.stdout.write(json.dumps({"endpoint": f"127.0.0.1:{port}"}) + "\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0.2)
    dispatch.close()


def _describe(config: ModelConfig, held: HeldExperts) -> experts_pb2.DescribeResponse:
    return experts_pb2.DescribeResponse(
        model="random",
        version="benchmark",
        state=experts_pb2.WORKER_STATE_READY,
        num_layers=config.num_hidden_layers,
        num_experts=config.num_local_experts,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        dtype=DTYPE_TO_PROTO[held.dtype],
        weight_format="bf16",
        device=str(held.device),
        slots=[
            experts_pb2.Slot(layer=layer, expert=expert, digest=digest)
            for (layer, expert), digest in sorted(held.digests.items())
        ],
        weight_bytes=held.weight_bytes,
        max_frame_bytes=MAX_FRAME_BYTES,
    )


def run_on_fast_loop(main: Coroutine[Any, Any, None]) -> None:
    """asyncio.run on uvloop, as the product runs, where it is installed."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(main)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


if __name__ == "__main__":
    main()
