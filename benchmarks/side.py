"""One side of a comparison that is ours, in a process of its own: jobs in, results out.

    python -m benchmarks.side inprocess|workers MODEL [--workers N] [--weights int8|int4]

`benchmarks.jobs` states what a job and a result are. Sides that are not running a job are idle, so
that alternating rounds measure one side at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.jobs import Job, Result, Run, claim_results, result_of, serve_jobs
from benchmarks.uncounted import stop_counting
from benchmarks.workers import start_workers
from services.core.generation import GenerateRequest, SamplingParams
from services.core.model_config import load_model_config
from services.core.settings import Settings, load_settings

WEIGHT_SETTINGS = ("expert_weights", "shard_weights")
"""Settings that choose how weights are held; `--weights` is for each of them that there is."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("inprocess", "workers"))
    parser.add_argument("model")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--weights", choices=("int8", "int4"))
    parser.add_argument("--uncounted", action="store_true", help="metrics count nothing")
    arguments = parser.parse_args()
    results = claim_results()
    cores = len(os.sched_getaffinity(0))
    weights = weight_settings(arguments.weights)
    worker_module = ["expert_service"]
    if arguments.uncounted:
        stop_counting()
        worker_module.insert(0, "benchmarks.uncounted")
    with contextlib.ExitStack() as stack:
        endpoints = ""
        if arguments.side == "workers":
            endpoints = stack.enter_context(
                running_workers(
                    arguments.model,
                    arguments.dtype,
                    arguments.workers,
                    module=worker_module,
                    **weights,
                )
            )
        settings = load_settings(
            model=arguments.model,
            dtype=arguments.dtype,
            workers=endpoints,
            device="cpu",
            num_threads=cores,
            **weights,
        )
        serve_jobs(stack.enter_context(_engine(settings)), results)


def weight_settings(weights: str | None) -> dict[str, str]:
    """The settings that make shard and workers hold weights in this format; none for None."""
    if weights is None:
        return {}
    return {name: weights for name in WEIGHT_SETTINGS if name in Settings.model_fields}


@contextlib.contextmanager
def running_workers(
    model: str,
    dtype: str,
    num_workers: int,
    *,
    module: Sequence[str] = ("expert_service",),
    **settings: Any,
) -> Iterator[str]:
    """Real expert workers on loopback; yields their endpoints as `host:port,host:port`."""
    config = load_model_config(Path(model))
    loaded = load_settings(model=model, dtype=dtype, **settings)
    with start_workers(Path(model), config, num_workers, loaded, module=module) as workers:
        for worker in workers:
            worker.wait_ready()
        yield ",".join(worker.endpoint for worker in workers)


def split_step(
    parts: Mapping[str, float], calls: Mapping[str, float], num_steps: int
) -> dict[str, float]:
    """Milliseconds of one step by part, from seconds of all steps.

    `experts` of `parts` is replaced by the parts of the layer calls and a `rest`. Calls of several
    micro-batches overlap; they are then scaled to the time in which the step waited for them.
    """
    step_ms = {name: 1e3 * part_s / num_steps for name, part_s in parts.items()}
    calls_ms = {name: 1e3 * part_s / num_steps for name, part_s in calls.items()}
    together = sum(calls_ms.values())
    if not together:
        return step_ms
    experts = step_ms.pop("experts")
    scale = min(1.0, experts / together)
    split = {name: part * scale for name, part in calls_ms.items()}
    return step_ms | split | {"rest": experts - sum(split.values())}


@contextlib.contextmanager
def _engine(settings: Settings) -> Iterator[Run]:
    """The engine called directly, with experts in process or on the workers of the settings."""
    from router_service.shard import AttentionShard

    shard = AttentionShard.start(settings, in_process_experts=not settings.workers)
    numbers = itertools.count()

    async def one(
        prompt: Sequence[int], max_tokens: int, session_id: str | None, begun: Callable[[], None]
    ) -> tuple[list[float], list[int]]:
        request = GenerateRequest(
            request_id=f"bench-{next(numbers)}",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
            session_id=session_id,
        )
        times: list[float] = []
        tokens: list[int] = []
        async for deltas in shard.generate(request):
            now = time.perf_counter()
            if not times:
                begun()
            for delta in deltas:
                times += [now] * len(delta.token_ids)
                tokens += delta.token_ids
        return times, tokens

    async def batch(job: Job) -> Result:
        """Its timings are of the steps after every request has its first token, or of all."""
        prompts, max_tokens = job["prompts"], job["max_tokens"]
        waiting = len(prompts)

        def begun() -> None:
            nonlocal waiting
            waiting -= 1
            if not waiting and max_tokens > 1:
                shard.take_timings()

        shard.take_timings()
        started = time.perf_counter()
        session_id = job.get("session_id")
        done = await asyncio.gather(
            *(one(prompt, max_tokens, session_id, begun) for prompt in prompts)
        )
        timings = shard.take_timings()
        num_steps = max(1, timings.num_steps)
        return result_of(
            started,
            [times for times, _ in done],
            [tokens for _, tokens in done],
            split_step(timings.parts(), timings.calls(), num_steps),
        )

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(shard.check_ready())
        yield lambda job: loop.run_until_complete(batch(job))
    finally:
        shard.stop_now()
        loop.close()


if __name__ == "__main__":
    main()
