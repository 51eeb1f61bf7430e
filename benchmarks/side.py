"""One side of a comparison, in a process of its own: reads jobs, prints results, as JSON lines.

    python -m benchmarks.side {inprocess,workers,transformers} MODEL [--workers N] [--dtype D]

A job is {"prompts": [[ids]...], "max_tokens": n}; the result has seconds to the first token of the
batch, seconds from the first to the last token, and the tokens themselves. Sides that are not
running a job are idle, so that alternating rounds measure one side at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from benchmarks.workers import start_workers
from services.core.generation import GenerateRequest, SamplingParams
from services.core.model_config import load_model_config
from services.core.settings import load_settings

Job = dict[str, Any]
Result = dict[str, Any]
Runner = Callable[[Sequence[Sequence[int]], int], Result]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("inprocess", "workers", "transformers"))
    parser.add_argument("model")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    # Results go where standard output was; whatever a library prints goes to standard error.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cores = len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        if arguments.side == "transformers":
            runner = _transformers(arguments.model, arguments.dtype, cores)
        elif arguments.side == "inprocess":
            runner = stack.enter_context(_engine(arguments.model, arguments.dtype, "", cores))
        else:
            endpoints = stack.enter_context(
                running_workers(arguments.model, arguments.dtype, arguments.workers)
            )
            # One core is left for I/O, as in the launched product.
            runner = stack.enter_context(
                _engine(arguments.model, arguments.dtype, endpoints, max(1, cores - 1))
            )
        _serve(runner, results)


def _serve(runner: Runner, results: TextIO) -> None:
    results.write('{"ready": true}\n')
    results.flush()
    for line in sys.stdin:
        job: Job = json.loads(line)
        results.write(json.dumps(runner(job["prompts"], job["max_tokens"])) + "\n")
        results.flush()


@contextlib.contextmanager
def _engine(model: str, dtype: str, endpoints: str, num_threads: int) -> Iterator[Runner]:
    """The engine called directly, with experts in process or on the workers at `endpoints`."""
    from router_service.shard import AttentionShard

    settings = load_settings(
        model=model, dtype=dtype, workers=endpoints, num_threads=num_threads, device="cpu"
    )
    shard = AttentionShard.start(settings, in_process_experts=not endpoints)
    numbers = iter(range(1 << 60))

    async def one(prompt: Sequence[int], max_tokens: int) -> tuple[list[int], float, float]:
        request = GenerateRequest(
            request_id=f"bench-{next(numbers)}",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        )
        tokens: list[int] = []
        first = last = 0.0
        async for deltas in shard.generate(request):
            last = time.perf_counter()
            first = first or last
            tokens += [token for delta in deltas for token in delta.token_ids]
        return tokens, first, last

    async def batch(prompts: Sequence[Sequence[int]], max_tokens: int) -> Result:
        started = time.perf_counter()
        done = await asyncio.gather(*(one(prompt, max_tokens) for prompt in prompts))
        first, last = max(first for _, first, _ in done), max(last for _, _, last in done)
        return {
            "ttft_s": first - started,
            "decode_s": last - first,
            "tokens": [tokens for tokens, _, _ in done],
        }

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(shard.check_ready())
        yield lambda prompts, max_tokens: loop.run_until_complete(batch(prompts, max_tokens))
    finally:
        shard.stop_now()
        loop.close()


@contextlib.contextmanager
def running_workers(model: str, dtype: str, num_workers: int) -> Iterator[str]:
    """Real expert workers on loopback; yields their endpoints as `host:port,host:port`."""
    config = load_model_config(Path(model))
    settings = load_settings(model=model, dtype=dtype)
    with start_workers(Path(model), config, num_workers, settings) as workers:
        for worker in workers:
            worker.wait_ready()
        yield ",".join(worker.endpoint for worker in workers)


def _transformers(model: str, dtype: str, cores: int) -> Runner:
    """`generate` of transformers with its default experts implementation."""
    import torch
    import transformers

    torch.set_num_threads(cores)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    network.eval()

    class Steps(transformers.StoppingCriteria):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            self.times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def run(prompts: Sequence[Sequence[int]], max_tokens: int) -> Result:
        steps = Steps()
        input_ids = torch.tensor([list(prompt) for prompt in prompts])
        started = time.perf_counter()
        with torch.inference_mode():
            output = network.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=[steps],
            )
        return {
            "ttft_s": steps.times[0] - started,
            "decode_s": steps.times[-1] - steps.times[0],
            "tokens": output[:, input_ids.shape[1] :].tolist(),
        }

    return run


if __name__ == "__main__":
    main()
