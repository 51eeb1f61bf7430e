"""What a replica of a hot expert brings to one layer call, beside what the machine could give.

    python -m benchmarks.hot_dispatch [--model bench-s] [--tokens 8,32,96,480] [--hot 0.7]

Two worker processes of one thread each hold half of the experts. One expert per token; a share of
the tokens goes to the last expert, the others to the rest in turn. The same calls are timed with
the last expert on one worker and, loaded and unloaded in turn, on both. Predicted is what the
kernels' own times, measured alone in the same run, come to if both workers begin at once and share
the hot rows as well as can be. Prints the least and the median milliseconds of a call.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import uvloop

from benchmarks.machine import describe_machine
from benchmarks.random_checkpoint import SHAPES, write_random_checkpoint
from benchmarks.side import running_workers
from benchmarks.termination import unwind_on_sigterm
from router_service.dispatch.dispatcher import RemoteExperts
from router_service.dispatch.lane_choice import chosen_transport
from router_service.dispatch.local_experts import LocalExperts
from router_service.experts import ExpertBackend, StepContext
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.grpc_options import GRPC_ENVIRONMENT
from services.core.kernels.choice import set_num_threads
from services.core.static_registry import StaticRegistry, parse_endpoints
from services.core.worker_control import load_slots, unload_slots

NUM_LAYERS = 4
NUM_WORKERS = 2
CALLS_PER_ROUND = 24
ROUNDS = 6
CONTEXT = StepContext()
_TIMEOUT_S = 30.0


@dataclass(slots=True, kw_only=True)
class Times:
    """Seconds of calls with one replica of the hot expert and with two."""

    fixed: list[float] = field(default_factory=list)
    shared: list[float] = field(default_factory=list)


def main() -> None:
    if not GRPC_ENVIRONMENT.items() <= os.environ.items():
        command = [sys.executable, "-m", "benchmarks.hot_dispatch", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | GRPC_ENVIRONMENT)
    parser = argparse.ArgumentParser(description="Time a hot expert's layer with a replica.")
    parser.add_argument("--model", default="bench-s", help="bench-s or bench-xs")
    parser.add_argument("--tokens", default="8,32,96,480")
    parser.add_argument("--hot", type=float, default=0.7, help="share of the tokens")
    arguments = parser.parse_args()
    unwind_on_sigterm()
    tokens = [int(count) for count in arguments.tokens.split(",")]
    shape = replace(SHAPES[arguments.model], num_hidden_layers=NUM_LAYERS, num_experts_per_tok=1)
    with tempfile.TemporaryDirectory(prefix="expertfleet-bench-") as scratch:
        folder = Path(scratch) / arguments.model
        write_random_checkpoint(folder, shape)
        sys.stdout.write(
            f"{describe_machine()}\n{arguments.model}, one expert per token, "
            f"{arguments.hot:.0%} of the tokens on one; ms\n\n"
            "| tokens | one replica (median) | two replicas (median) | ratio (of medians) "
            "| predicted: one | two | ratio |\n|---|---|---|---|---|---|---|\n"
        )
        with running_workers(str(folder), "bfloat16", NUM_WORKERS) as endpoints:
            uvloop.run(_compare(str(folder), endpoints, tokens, arguments.hot))


async def _compare(model: str, endpoints: str, tokens: list[int], hot: float) -> None:
    checkpoint = Checkpoint.open(model)
    cpu = torch.device("cpu")
    local = LocalExperts.load(checkpoint, dtype=torch.bfloat16, device=cpu)
    addresses = parse_endpoints(endpoints)
    remote = RemoteExperts(
        checkpoint.config,
        registry=StaticRegistry(addresses),
        dtype=torch.bfloat16,
        transport=chosen_transport("auto", max_frame_bytes=256 << 20),
    )
    hot_expert = checkpoint.config.num_local_experts - 1
    slots = [(layer, hot_expert) for layer in range(NUM_LAYERS)]
    try:
        await remote.wait_ready()
        for count in tokens:
            call = _hot_call(checkpoint, count, hot)
            set_num_threads(1)
            predicted = await _predict(local, call)
            times = Times()
            for _ in range(ROUNDS):
                await _wait_replicas(remote, slots[0], 1)
                times.fixed += await _round(remote, *call)
                await load_slots(addresses[0], slots, timeout_s=_TIMEOUT_S)
                await _wait_replicas(remote, slots[0], 2)
                times.shared += await _round(remote, *call)
                await unload_slots(addresses[0], slots, timeout_s=_TIMEOUT_S)
            sys.stdout.write(_row(count, times, *predicted))
            sys.stdout.flush()
    finally:
        await remote.close()


def _hot_call(
    checkpoint: Checkpoint, num_tokens: int, hot: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden_states [T, H], topk_ids [T, 1] and topk_weights [T, 1]."""
    config = checkpoint.config
    hidden_states = torch.randn(num_tokens, config.hidden_size, dtype=torch.bfloat16)
    num_hot = round(hot * num_tokens)
    ids = torch.arange(num_tokens) % (config.num_local_experts - 1)
    ids[torch.randperm(num_tokens)[:num_hot]] = config.num_local_experts - 1
    return hidden_states, ids[:, None], torch.ones(num_tokens, 1)


async def _round(
    experts: ExpertBackend,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
) -> list[float]:
    """Seconds of each call; they go through the layers in turn, as a decoder's do."""
    times = []
    for call in range(CALLS_PER_ROUND):
        started = time.perf_counter()
        await experts.forward(call % NUM_LAYERS, hidden_states, topk_ids, topk_weights, CONTEXT)
        times.append(time.perf_counter() - started)
    return times


async def _predict(
    local: LocalExperts, call: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[float, float]:
    """Seconds with one replica and with two, from what experts take on one thread."""
    hidden_states, ids, weights = call
    rows = ids.flatten().bincount(minlength=local.expert_load().shape[1]).tolist()
    half = len(rows) // 2

    async def seconds(expert: int, num_rows: int) -> float:
        if num_rows == 0:
            return 0.0
        some = torch.full((num_rows, 1), expert)
        return min(await _round(local, hidden_states[:num_rows], some, weights[:num_rows]))

    first = sum([await seconds(expert, rows[expert]) for expert in range(half)])
    others = sum([await seconds(expert, rows[expert]) for expert in range(half, len(rows) - 1)])
    num_hot = rows[-1]
    alone = others + await seconds(len(rows) - 1, num_hot)
    together = alone
    for part in {num_hot * eighth // 8 for eighth in range(9)}:
        ends = (
            first + await seconds(len(rows) - 1, part),
            others + await seconds(len(rows) - 1, num_hot - part),
        )
        together = min(together, max(ends))
    return max(first, alone), together


async def _wait_replicas(remote: RemoteExperts, slot: tuple[int, int], count: int) -> None:
    """Until the shard has seen it, for which it reads the workers' leases."""
    give_up_at = time.monotonic() + _TIMEOUT_S
    while len((table := remote._pool.view.table).replicas(slot)) != count:
        if time.monotonic() > give_up_at:
            raise SystemExit(f"slot {slot} did not come to {count} replicas")
        await remote._pool.wait_changed(table.version, 1.0)


def _row(num_tokens: int, times: Times, alone_s: float, together_s: float) -> str:
    fixed, shared = min(times.fixed) * 1e3, min(times.shared) * 1e3
    middle_fixed = statistics.median(times.fixed) * 1e3
    middle_shared = statistics.median(times.shared) * 1e3
    return (
        f"| {num_tokens} | {fixed:.2f} ({middle_fixed:.2f}) | {shared:.2f} ({middle_shared:.2f}) "
        f"| {fixed / shared:.2f} ({middle_fixed / middle_shared:.2f}) "
        f"| {alone_s * 1e3:.2f} | {together_s * 1e3:.2f} | {alone_s / together_s:.2f} |\n"
    )


if __name__ == "__main__":
    main()
