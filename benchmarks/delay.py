"""`make bench-delay`: what micro-batches in flight bring when the network is slow to answer.

    python -m benchmarks.delay [--model narrow] [--workers 4] [--delays-ms 0,1,5] [--size 32]

A proxy between the shard and its workers holds all bytes back for D ms in each direction, so every
layer's round trip takes 2 D ms longer. Rounds alternate between shards that keep 1, 2 and 3
micro-batches in flight and one that chooses for itself. Two questions are asked:

- Micro-batches of a fixed size (`--size` sequences each): how much more does the fleet decode when
  two or three of them are in flight, with two or three times the streams? This is what pipelining
  is for: the wait of one is filled by the others.
- A fixed number of streams: is splitting them up worth it? All of a step's layers still wait for
  the network one after the other, so a split can only hide computing, not the delay.

Prints medians of tokens per second, ratios within a round, and where the time of a step went.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.delay_proxy import DelayedNetwork
from benchmarks.machine import ForeignLoad, describe_machine
from benchmarks.random_checkpoint import SHAPES, RandomShape, write_random_checkpoint
from benchmarks.side import running_workers
from benchmarks.termination import unwind_on_sigterm
from benchmarks.workers import lanes_of
from router_service.engine.step_timings import StepTimings
from router_service.shard import AttentionShard
from services.core.generation import GenerateRequest, SamplingParams
from services.core.model_config import load_model_config
from services.core.settings import load_settings

Count = int | Literal["auto"]
COUNTS: tuple[Count, ...] = (1, 2, 3, "auto")
CONTEXT = 16
NARROW = RandomShape(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=2048,
)
"""So little to compute that a machine with few cores shows the network and not its cores."""
TARGETS = {0.5: 1.4, 1.0: 1.4, 2.5: 1.7, 5.0: 1.7}
"""Two micro-batches over one, by ms in each direction: 1.4 at 1 ms and 1.7 at 5 ms, whether that is
said of one way or of the round trip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`streams` decoded at once by the shard with so many micro-batches in flight."""

    count: Count
    streams: int


@dataclass(slots=True, kw_only=True)
class Measured:
    """Of one job: tokens per second of every round, and the steps' time in all of them."""

    rates: list[float] = field(default_factory=list)
    timings: StepTimings = field(default_factory=StepTimings)


class Decoding:
    """Runs jobs on its shards, one at a time."""

    def __init__(
        self, shards: dict[Count, AttentionShard], vocab_size: int, new_tokens: int
    ) -> None:
        self._shards = shards
        self._vocab_size = vocab_size
        self._new_tokens = new_tokens
        self._random = random.Random(7)
        self._number = 0

    async def run(self, job: Job) -> tuple[float, StepTimings]:
        """Tokens per second from the last stream's first token on, and the steps' time."""
        shard = self._shards[job.count]
        firsts: list[asyncio.Future[float]] = []
        streams = [self._stream(shard, firsts) for _ in range(job.streams)]
        running = asyncio.gather(*streams)
        await asyncio.sleep(0)
        started = max(await asyncio.gather(*firsts))
        shard.take_timings()
        ended = await running
        timings = shard.take_timings()
        num_tokens = job.streams * (self._new_tokens - 1)
        return num_tokens / (max(ended) - started), timings

    async def _stream(self, shard: AttentionShard, firsts: list[asyncio.Future[float]]) -> float:
        first: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        firsts.append(first)
        self._number += 1
        prompt = [self._random.randrange(10, self._vocab_size) for _ in range(CONTEXT)]
        request = GenerateRequest(
            request_id=f"delay-{self._number}",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=self._new_tokens, temperature=0.0, ignore_eos=True),
        )
        async for _ in shard.generate(request):
            if not first.done():
                first.set_result(time.perf_counter())
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="narrow", help="narrow, bench-xs or bench-s")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--delays-ms", default="0,0.5,1,2.5,5", help="in each direction")
    parser.add_argument("--size", type=int, default=32, help="sequences of a micro-batch")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    unwind_on_sigterm()
    sys.stdout.write(
        f"{describe_machine()}\n{arguments.model}, bf16, {arguments.workers} workers, "
        f"{arguments.new_tokens} new tokens, {arguments.rounds} rounds\n"
    )
    with tempfile.TemporaryDirectory(prefix="expertfleet-bench-") as scratch:
        folder = Path(scratch) / arguments.model
        write_random_checkpoint(folder, (SHAPES | {"narrow": NARROW})[arguments.model])
        with (
            running_workers(str(folder), "bfloat16", arguments.workers) as endpoints,
            contextlib.closing(DelayedNetwork(endpoints, lanes_of(endpoints))) as network,
            _running_shards(str(folder), network.endpoints) as shards,
        ):
            vocab_size = load_model_config(folder).vocab_size
            decoding = Decoding(shards, vocab_size, arguments.new_tokens)
            for delay_ms in map(float, arguments.delays_ms.split(",")):
                network.set_delay(delay_ms / 1e3)
                _measure(decoding, delay_ms, arguments.size, arguments.rounds)


@contextlib.contextmanager
def _running_shards(model: str, endpoints: str) -> Iterator[dict[Count, AttentionShard]]:
    """A shard for every count, over the same workers; those that have nothing to do are idle."""
    settings = load_settings(
        model=model,
        dtype="bfloat16",
        device="cpu",
        workers=endpoints,
        num_threads=len(os.sched_getaffinity(0)),
        max_num_seqs=1024,
        max_num_batched_tokens=4096,
        kv_cache_bytes=1 << 28,
    )
    shards: dict[Count, AttentionShard] = {}
    try:
        for count in COUNTS:
            shards[count] = AttentionShard.start(
                settings.override(num_micro_batches=count), in_process_experts=False
            )
        yield shards
    finally:
        for shard in shards.values():
            shard.stop_now()


def _measure(decoding: Decoding, delay_ms: float, size: int, rounds: int) -> None:
    fixed_size = [Job(count=count, streams=count * size) for count in (1, 2, 3)]
    fixed_streams = [Job(count=count, streams=2 * size) for count in COUNTS]
    jobs = list(dict.fromkeys([*fixed_size, *fixed_streams]))
    results = {job: Measured() for job in jobs}
    foreign = ForeignLoad([os.getpid()])
    for round_number in range(-1, rounds):
        for job in jobs:
            rate, timings = asyncio.run(decoding.run(job))
            if round_number >= 0:
                results[job].rates.append(rate)
                results[job].timings.add(timings)
    sys.stdout.write(
        f"\n{delay_ms:g} ms each way (round trip +{2 * delay_ms:g} ms), foreign CPU "
        f"{foreign.stop():.0%}\n\n"
        "| streams | micro-batches | tokens/s | / one | step ms | "
        "schedule + prepare + emit | attention + head + sample | experts, not hidden |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    for title, group in (("of a fixed size", fixed_size), ("of fixed streams", fixed_streams)):
        sys.stdout.write(f"| *{title}* |\n")
        for job in group:
            sys.stdout.write(_row(job, results[job], results[group[0]]))
    if (target := TARGETS.get(delay_ms)) is not None:
        ratio = _ratio(results[fixed_size[1]], results[fixed_size[0]])
        sys.stdout.write(f"\nTwo micro-batches of {size} / one: {ratio:.2f} (target {target})\n")
    sys.stdout.flush()


def _row(job: Job, measured: Measured, one: Measured) -> str:
    timings = measured.timings
    bookkeeping_s = timings.schedule_s + timings.prepare_s + timings.emit_s
    parts = (timings.step_s, bookkeeping_s, timings.shard_s, timings.experts_s)
    cells = " | ".join(f"{seconds / timings.num_steps * 1e3:.2f}" for seconds in parts)
    count = str(job.count)
    if job.count == "auto":
        count += f" ({timings.num_micro_batches / timings.num_steps:.1f})"
    return (
        f"| {job.streams} | {count} | {statistics.median(measured.rates):.0f} | "
        f"{_ratio(measured, one):.2f} | {cells} |\n"
    )


def _ratio(mine: Measured, theirs: Measured) -> float:
    """Median over rounds of the ratio within one round."""
    pairs: Sequence[tuple[float, float]] = list(zip(mine.rates, theirs.rates, strict=True))
    return statistics.median(rate / other for rate, other in pairs)


if __name__ == "__main__":
    main()
