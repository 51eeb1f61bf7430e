"""What one MoE layer costs over the wire beside the same layer in process.

    python -m benchmarks.dispatch [--model bench-s] [--workers 1,2,4] [--tokens 1,8,32,128]
        [--transport grpc,lane]

Random hidden states and a random gate go through the expert backends in turn, on the same weights.
Prints medians in microseconds per layer call and the difference: what packing, wire, queueing and
combining cost, less what computing in several processes gains. Then the means of the parts of a
call, which are those of its slowest frame (`DispatchTimings`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import uvloop

from benchmarks.machine import describe_machine
from benchmarks.random_checkpoint import write_named_checkpoint
from benchmarks.side import running_workers
from benchmarks.termination import unwind_on_sigterm
from router_service.dispatch.dispatch_timings import DispatchTimings
from router_service.dispatch.dispatcher import RemoteExperts
from router_service.dispatch.lane_choice import chosen_transport
from router_service.dispatch.local_experts import LocalExperts
from router_service.experts import ExpertBackend, StepContext
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.grpc_options import GRPC_ENVIRONMENT
from services.core.kernels.choice import set_num_threads
from services.core.model_config import ModelConfig
from services.core.settings import load_settings
from services.core.static_registry import StaticRegistry, parse_endpoints

NUM_LAYERS = 4
CALLS_PER_ROUND = 40
ROUNDS = 7
CONTEXT = StepContext()


def main() -> None:
    if not GRPC_ENVIRONMENT.items() <= os.environ.items():
        # As the launcher starts a shard; gRPC read its environment when it was imported above.
        command = [sys.executable, "-m", "benchmarks.dispatch", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | GRPC_ENVIRONMENT)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bench-s", help="bench-s or bench-xs")
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--tokens", default="1,8,32,128")
    parser.add_argument("--transport", default="grpc,lane", help="grpc, lane or both")
    arguments = parser.parse_args()
    unwind_on_sigterm()
    transports = arguments.transport.split(",")
    tokens = [int(count) for count in arguments.tokens.split(",")]
    with tempfile.TemporaryDirectory(prefix="expertfleet-bench-") as scratch:
        folder = write_named_checkpoint(
            arguments.model, Path(scratch) / arguments.model, num_layers=NUM_LAYERS
        )
        sys.stdout.write(f"{describe_machine()}\n{arguments.model}, {NUM_LAYERS} layers, bf16\n\n")
        sys.stdout.write(
            "| workers | tokens | transport | in process us | over the wire us | difference us "
            f"| pack | wire | queue | expert | combine |\n{'|---' * 11}|\n"
        )
        for num_workers in (int(count) for count in arguments.workers.split(",")):
            with running_workers(str(folder), "bfloat16", num_workers) as endpoints:
                uvloop.run(_compare(str(folder), endpoints, num_workers, tokens, transports))


async def _compare(
    model: str, endpoints: str, num_workers: int, tokens: list[int], transports: list[str]
) -> None:
    checkpoint = Checkpoint.open(model)
    cpu = torch.device("cpu")
    local = LocalExperts.load(checkpoint, dtype=torch.bfloat16, device=cpu)
    remotes = {name: _remote(checkpoint.config, endpoints, name) for name in transports}
    for remote in remotes.values():
        await remote.wait_ready()
    cores = len(os.sched_getaffinity(0))
    try:
        for count in tokens:
            local_us: list[float] = []
            remote_us: dict[str, list[float]] = {name: [] for name in remotes}
            for remote in remotes.values():
                remote.take_timings()
            for _ in range(ROUNDS):
                set_num_threads(cores)
                local_us.append(await _round_us(local, checkpoint.config, count))
                for name, remote in remotes.items():
                    remote_us[name].append(await _round_us(remote, checkpoint.config, count))
            near = statistics.median(local_us)
            for name, remote in remotes.items():
                far = statistics.median(remote_us[name])
                sys.stdout.write(
                    f"| {num_workers} | {count} | {name} | {near:.0f} | {far:.0f} "
                    f"| {far - near:+.0f} | {_parts(remote.take_timings())} |\n"
                )
            sys.stdout.flush()
    finally:
        for remote in remotes.values():
            await remote.close()


def _remote(config: ModelConfig, endpoints: str, transport: str) -> RemoteExperts:
    settings = load_settings(dispatch_transport=transport)
    return RemoteExperts(
        config,
        registry=StaticRegistry(parse_endpoints(endpoints)),
        dtype=torch.bfloat16,
        transport=chosen_transport(
            settings.dispatch_transport, max_frame_bytes=settings.max_frame_bytes
        ),
    )


def _parts(timings: DispatchTimings) -> str:
    """Mean microseconds of a call's parts, as cells of the table."""
    parts = (
        timings.pack_ns,
        timings.wire_ns,
        timings.queue_ns,
        timings.expert_ns,
        timings.combine_ns,
    )
    return " | ".join(f"{part / timings.num_calls / 1000:.0f}" for part in parts)


async def _round_us(experts: ExpertBackend, config: ModelConfig, num_tokens: int) -> float:
    """Median microseconds of one call; calls go through the layers in turn, as a decoder's do."""
    hidden_states = torch.randn(num_tokens, config.hidden_size, dtype=torch.bfloat16)
    logits = torch.randn(num_tokens, config.num_local_experts)
    topk_weights, topk_ids = logits.softmax(-1).topk(config.num_experts_per_tok)
    times = []
    for call in range(CALLS_PER_ROUND):
        started = time.perf_counter()
        await experts.forward(
            call % config.num_hidden_layers, hidden_states, topk_ids, topk_weights, CONTEXT
        )
        times.append((time.perf_counter() - started) * 1e6)
    return statistics.median(times)


if __name__ == "__main__":
    main()
