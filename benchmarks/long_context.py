"""One long sequence through the real engine: time per token at growing contexts, and memory.

    python -m benchmarks.long_context [--contexts 1024,4096,16384,65536]

A narrow random Mixtral (hidden 256, 2 layers, 4 heads, 2 key-value heads) has its experts in
process. Each context continues the one before it, whose blocks are still cached. The block pool is
given what the longest context takes and nothing more; memory beyond it is what the steps needed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.machine import describe_machine
from benchmarks.random_checkpoint import RandomShape, write_random_checkpoint
from router_service.shard import AttentionShard
from services.core.generation import GenerateRequest, SamplingParams
from services.core.model_config import ModelConfig, load_model_config
from services.core.settings import load_settings

SHAPE = RandomShape(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=2000,
)
NEW_TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="1024,4096,16384,65536")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prefill step")
    options = parser.parse_args()
    contexts = [int(length) for length in options.contexts.split(",")]
    with tempfile.TemporaryDirectory(prefix="expertfleet-bench-") as scratch:
        folder = Path(scratch) / "narrow"
        write_random_checkpoint(folder, SHAPE)
        config = load_model_config(folder)
        token_bytes = config.kv_bytes_per_token(2)
        longest = max(contexts) + NEW_TOKENS + 16
        settings = load_settings(
            model=str(folder),
            dtype="bfloat16",
            device="cpu",
            max_model_len=longest,
            kv_cache_bytes=longest * token_bytes,
            max_num_batched_tokens=options.chunk,
        )
        shard = AttentionShard.start(settings, in_process_experts=True)
        try:
            asyncio.run(_measure(shard, config, contexts))
        finally:
            shard.stop_now()


async def _measure(shard: AttentionShard, config: ModelConfig, contexts: Sequence[int]) -> None:
    numbers = random.Random(0)
    prompt = [numbers.randrange(3, config.vocab_size) for _ in range(max(contexts))]
    token_bytes = config.kv_bytes_per_token(2)
    await _generate(shard, prompt[:64], "warm-up")
    start_mib = _peak_mib()
    sys.stdout.write(f"{describe_machine()}\n\n")
    sys.stdout.write("| context | prefill tokens | prefill tok/s | ms per token | KV MiB ")
    sys.stdout.write("| KV GB/s beyond the first row | peak memory above start MiB |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|\n")
    before = first_ms = 0.0
    for context in contexts:
        times = await _generate(shard, prompt[:context], f"context-{context}")
        prefill_s = times[1] - times[0]
        gaps = [(later - earlier) * 1e3 for earlier, later in pairwise(times[1:])]
        token_ms = statistics.median(gaps)
        kv_bytes = context * token_bytes
        first_ms = first_ms or token_ms
        beyond = kv_bytes - contexts[0] * token_bytes
        speed = f"{beyond / (token_ms - first_ms) / 1e6:.1f}" if token_ms > first_ms else "-"
        sys.stdout.write(
            f"| {context} | {context - before:.0f} | {(context - before) / prefill_s:.0f} "
            f"| {token_ms:.2f} | {kv_bytes / 2**20:.0f} | {speed} "
            f"| {_peak_mib() - start_mib:.0f} |\n"
        )
        sys.stdout.flush()
        before = context
    sys.stdout.write(f"\nmemory read by all threads: {_memory_speed():.1f} GB/s\n")


async def _generate(shard: AttentionShard, prompt: Sequence[int], name: str) -> list[float]:
    """When the request began and when each of its tokens came."""
    request = GenerateRequest(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True),
    )
    times = [time.perf_counter()]
    async for _ in shard.generate(request):
        times.append(time.perf_counter())
    return times


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _memory_speed() -> float:
    """GB/s of summing 256 MiB with all threads, the best of five."""
    values = torch.ones(64 << 20)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        values.sum()
        best = max(best, values.nbytes / (time.perf_counter() - started) / 1e9)
    return best


if __name__ == "__main__":
    main()
