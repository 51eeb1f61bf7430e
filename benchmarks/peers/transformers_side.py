"""The sides of transformers: `generate`, continuous batching, and its own expert parallelism.

    python -m benchmarks.peers.transformers_side MODEL [--batching | --expert-parallel 2]

Runs in the project's own environment. Expert parallelism starts a process for each rank, joined
by gloo; rank 0 takes the jobs and broadcasts them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import transformers

from benchmarks.jobs import Job, Result, claim_results, result_of, serve_jobs

CACHE_PAGE_TOKENS = 64
CACHE_BLOCKS = 512
"""Room for 32768 tokens in the KV cache of continuous batching."""
VERSIONS = {"transformers": transformers.__version__, "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batching", action="store_true", help="its continuous batching")
    parser.add_argument("--expert-parallel", type=int, default=1, help="processes")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--join", help="host:port of rank 0")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    if arguments.expert_parallel > 1:
        torch.set_num_threads(max(1, cores // arguments.expert_parallel))
        _expert_parallel(arguments.model, arguments.expert_parallel, arguments.rank, arguments.join)
        return
    results = claim_results()
    torch.set_num_threads(cores)
    network = _load(arguments.model)
    if arguments.batching:
        with ContinuousBatching.running(network) as batching:
            serve_jobs(batching.run, results, VERSIONS)
    else:
        serve_jobs(lambda job: _generate(network, job), results, VERSIONS)


def _load(model: str, **options: Any) -> Any:
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, **options
    )
    network.eval()
    # No token ends a request early.
    network.generation_config.eos_token_id = None
    return network


class StepTimes(transformers.StoppingCriteria):  # type: ignore[misc]
    """When each step of `generate` ended; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def _generate(network: Any, job: Job) -> Result:
    """One padded batch of prompts of equal length, greedy."""
    steps = StepTimes()
    input_ids = torch.tensor(job["prompts"])
    started = time.perf_counter()
    with torch.inference_mode():
        output = network.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=job["max_tokens"],
            min_new_tokens=job["max_tokens"],
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[steps],
        )
    tokens = output[:, input_ids.shape[1] :].tolist()
    return result_of(started, [steps.times] * len(tokens), tokens)


class ContinuousBatching:
    """Requests streamed through transformers' own manager, which stays up between jobs."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    @classmethod
    @contextlib.contextmanager
    def running(cls, network: Any) -> Iterator[ContinuousBatching]:
        config = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        # Left to itself it takes nine tenths of the free memory for its cache.
        cache = transformers.ContinuousBatchingConfig(
            num_blocks=CACHE_BLOCKS, page_size=CACHE_PAGE_TOKENS
        )
        with network.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=cache
        ) as manager:
            yield cls(manager)

    def run(self, job: Job) -> Result:
        started = time.perf_counter()
        names: list[str] = self._manager.add_requests(
            job["prompts"], max_new_tokens=job["max_tokens"], streaming=True
        )
        times: dict[str, list[float]] = {name: [] for name in names}
        tokens: dict[str, list[int]] = {name: [] for name in names}
        running = set(names)
        while running:
            output = self._manager.get_result(timeout=600)
            if output is None:
                raise SystemExit("transformers' continuous batching stopped answering")
            now = time.perf_counter()
            name, ids = output.request_id, list(output.generated_tokens)
            times[name] += [now] * (len(ids) - len(tokens[name]))
            tokens[name] = ids
            if output.is_finished():
                running.discard(name)
        return result_of(started, list(times.values()), list(tokens.values()))


def _expert_parallel(model: str, num_ranks: int, rank: int, join: str | None) -> None:
    results = claim_results()
    address = join or f"127.0.0.1:{_free_port()}"
    command = [sys.executable, "-m", "benchmarks.peers.transformers_side", model]
    command += ["--expert-parallel", str(num_ranks), "--join", address]
    others: Sequence[subprocess.Popen[bytes]] = [
        subprocess.Popen([*command, "--rank", str(other)], stdin=subprocess.DEVNULL)
        for other in range(1, num_ranks)
        if join is None
    ]
    host, _, port = address.rpartition(":")
    os.environ.update(
        MASTER_ADDR=host,
        MASTER_PORT=port,
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
    )
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    parallel = transformers.distributed.DistributedConfig(tp_size=num_ranks, ep_size=num_ranks)
    network = _load(model, distributed_config=parallel)
    if rank:
        while (job := _broadcast(None)) is not None:
            _generate(network, job)
    else:
        serve_jobs(lambda job: _generate(network, _broadcast(job) or job), results, VERSIONS)
        _broadcast(None)
    dist.destroy_process_group()
    for other in others:
        other.wait(timeout=60)


def _broadcast(job: Job | None) -> Job | None:
    """Rank 0's job on every rank."""
    box = [job]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    main()
