"""Measures what the engine adds to a step: steps of a model so small that it hardly computes."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path
from typing import Any

import torch

from router_service.sampling.sampler import Sampler, SamplingRow
from router_service.shard import AttentionShard
from services.cli.calibration.random_weights import random_config, write_checkpoint
from services.cli.calibration.timing import time_s, typical_s
from services.core.errors import ExpertfleetError
from services.core.generation import GenerateRequest, SamplingParams
from services.core.kernels.choice import set_num_threads
from services.core.settings import load_settings

WIDTH = (64, 64)
NUM_SEQUENCES = (1, 8, 32)
NUM_STEPS = 150
SAMPLED_ROWS = (1, 8, 32)
VOCAB_SIZE = 32000
MAX_TRIES = 5


def measure_engine(num_cores: int, scratch: Path) -> dict[str, Any]:
    """Typical seconds of a decode step by number of sequences, and of sampling by rows."""
    torch.manual_seed(0)
    set_num_threads(num_cores)
    sample_s = [_sample_s(rows) for rows in SAMPLED_ROWS]
    folder = scratch / "engine"
    write_checkpoint(folder, random_config(*WIDTH, num_layers=1))
    settings = load_settings(
        model=str(folder), device="cpu", num_threads=num_cores, kv_cache_bytes=64 << 20
    )
    shard = AttentionShard.start(settings, in_process_experts=True)
    try:
        step_s = [asyncio.run(_step_s(shard, count)) for count in NUM_SEQUENCES]
    finally:
        shard.stop_now()
    return {
        "engine_width": WIDTH,
        "engine_sequences": NUM_SEQUENCES,
        "engine_s": step_s,
        "sampled_rows": SAMPLED_ROWS,
        "sampled_vocab": VOCAB_SIZE,
        "sample_s": sample_s,
    }


async def _step_s(shard: AttentionShard, num_sequences: int) -> float:
    """Between two tokens of the first stream while all of them decode."""

    async def one(index: int) -> list[tuple[int, float]]:
        """How many tokens there were, and when; several come together where this loop is late."""
        request = GenerateRequest(
            request_id=f"calibrate-{num_sequences}-{index}",
            prompt_token_ids=tuple(range(3, 11)),
            sampling=SamplingParams(max_tokens=NUM_STEPS, temperature=0.0, ignore_eos=True),
        )
        arrivals, num_tokens = [], 0
        async for deltas in shard.generate(request):
            num_tokens += sum(len(delta.token_ids) for delta in deltas)
            arrivals.append((num_tokens, time.perf_counter()))
        return arrivals

    for _ in range(MAX_TRIES):
        arrivals = (await asyncio.gather(*(one(index) for index in range(num_sequences))))[0]
        # The streams start one after the other, and the first may end before the last.
        first, last = NUM_STEPS // 4, NUM_STEPS - NUM_STEPS // 4
        middle = [arrival for arrival in arrivals if first < arrival[0] <= last]
        steps = [
            (after - before) / (tokens - tokens_before)
            for (tokens_before, before), (tokens, after) in itertools.pairwise(middle)
        ]
        if steps:
            return typical_s(steps)
    raise ExpertfleetError("this machine is too busy to be measured; end what else runs, try again")


def _sample_s(num_rows: int) -> float:
    logits = torch.randn(num_rows, VOCAB_SIZE)
    rows = [
        SamplingRow(
            params=SamplingParams(max_tokens=64, temperature=0.0),
            prompt_token_ids=(3, 4, 5),
            output_token_ids=(6, 7),
            seed=0,
            position=2,
            eos_token_ids=(2,),
        )
        for _ in range(num_rows)
    ]
    sampler = Sampler()
    with torch.inference_mode():
        return time_s(lambda: sampler.sample(logits, rows))
