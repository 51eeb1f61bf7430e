"""A model of real width on expert workers: what each reads, holds and needs at its peak.

    python -m benchmarks.wide [--model wide-22b] [--layers 1] [--workers 8] [--folder DIR]

Writes a random checkpoint in the hub's sharded layout (5.8 GB for one layer of wide-22b), starts
real worker processes and an attention shard, and has fixed prompts answered twice. It checks that
the answers are the same, that every worker computed, and that workers and shard count the same
tokens per expert. The table goes to standard output and, as `MODEL.md`, to `--out`. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

from benchmarks.machine import ForeignLoad, describe_machine
from benchmarks.random_checkpoint import SHAPES, write_named_checkpoint
from benchmarks.termination import unwind_on_sigterm
from benchmarks.workers import MeasuredWorker, peak_rss_bytes, start_workers
from router_service.shard import AttentionShard
from services.core.generation import GenerateRequest, SamplingParams
from services.core.model_config import ModelConfig, load_model_config
from services.core.registry_json import format_ranges
from services.core.settings import Settings, load_settings

NUM_PROMPTS = 4
PROMPT_TOKENS = 48
NEW_TOKENS = 8
ALLOWED_RATIO, ALLOWED_BYTES = 1.15, 300e6
"""A worker's peak memory may be this times its own weights plus this many bytes."""

Tokens = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="wide-22b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here; default: delete it")
    parser.add_argument("--out", type=Path, default=Path("docs/performance"))
    options = parser.parse_args()
    unwind_on_sigterm()
    with _checkpoint(options.model, options.layers, options.folder) as folder:
        text = _measure(folder, options.model, options.workers)
    command = f"python -m benchmarks.wide --model {options.model} --layers {options.layers}"
    text = f"{text}\nPrinted by `{command} --workers {options.workers}`.\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.model}.md").write_text(text)
    sys.stdout.write(text)


@contextlib.contextmanager
def _checkpoint(model: str, num_layers: int, folder: Path | None) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        if folder is None:
            scratch = tempfile.TemporaryDirectory(prefix="expertfleet-wide-")
            folder = Path(stack.enter_context(scratch)) / model
        _say(f"writing {model} with {num_layers} layers")
        yield write_named_checkpoint(model, folder, num_layers=num_layers)


def _measure(folder: Path, model: str, num_workers: int) -> str:
    config = load_model_config(folder)
    # One prompt after the other and no memory of the first run, so that both compute the same.
    settings = load_settings(
        model=str(folder), device="cpu", kv_cache_bytes=64 << 20, max_model_len=512
    )
    with start_workers(folder, config, num_workers, settings) as workers:
        foreign = ForeignLoad([os.getpid()])
        for worker in workers:
            worker.wait_ready()
            _say(f"{worker.worker_id} ready after {worker.ready_s:.1f} s")
        foreign_share = foreign.stop()
        first, second, expert_load = _answer_twice(settings, config, workers)
        for worker in workers:
            worker.read_figures()
    _check(workers, first, second, expert_load)
    return _report(folder, model, config, workers, first, foreign_share)


def _answer_twice(
    settings: Settings, config: ModelConfig, workers: Sequence[MeasuredWorker]
) -> tuple[Tokens, Tokens, dict[tuple[int, int], int]]:
    """The tokens of two runs, and the shard's count of tokens per (layer, expert)."""
    endpoints = ",".join(worker.endpoint for worker in workers)
    cores = len(os.sched_getaffinity(0))
    shard = AttentionShard.start(
        settings.override(workers=endpoints, num_threads=cores),
        in_process_experts=False,
    )
    try:
        answers = [asyncio.run(_answer(shard, config, tenant)) for tenant in ("first", "second")]
        load = {
            (layer, expert): int(count)
            for layer, row in enumerate(shard.stats().expert_load.tolist())
            for expert, count in enumerate(row)
        }
    finally:
        shard.stop_now()
    return answers[0], answers[1], load


async def _answer(shard: AttentionShard, config: ModelConfig, tenant: str) -> Tokens:
    generator = random.Random(22)
    answers: Tokens = []
    for number in range(NUM_PROMPTS):
        prompt = [generator.randrange(10, config.vocab_size) for _ in range(PROMPT_TOKENS)]
        request = GenerateRequest(
            request_id=f"{tenant}-{number}",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True),
            tenant=tenant,
        )
        answers.append([])
        async for deltas in shard.generate(request):
            answers[-1] += [token for delta in deltas for token in delta.token_ids]
        _say(f"{tenant} run, prompt {number}: {answers[-1]}")
    return answers


def _check(
    workers: Sequence[MeasuredWorker],
    first: Tokens,
    second: Tokens,
    expert_load: dict[tuple[int, int], int],
) -> None:
    if first != second or any(len(tokens) != NEW_TOKENS for tokens in first):
        raise SystemExit(f"the second run answers differently: {first} and {second}")
    for worker in workers:
        gated = sum(expert_load[slot] for slot in worker.placement.slots())
        if not worker.num_rows or worker.num_rows != gated:
            raise SystemExit(
                f"{worker.worker_id} computed {worker.num_rows} rows, the shard sent it {gated}"
            )


def _report(
    folder: Path,
    model: str,
    config: ModelConfig,
    workers: Sequence[MeasuredWorker],
    tokens: Tokens,
    foreign_share: float,
) -> str:
    files = sorted(folder.glob("*.safetensors"))
    total_bytes = sum(file.stat().st_size for file in files)
    lines = [
        f"Measured {date.today()} on {describe_machine()}.",
        "",
        f"**{model}**, {config.num_hidden_layers} layer(s), bf16: {_mb(total_bytes)} MB in "
        f"{len(files)} shards, {len(workers)} workers. Sizes are in MB (10^6 bytes). "
        "`read` is what the worker says it read of the checkpoint, `read by the process` is the "
        "kernel's count of all its reads, Python's modules included. `rows` are the (token, "
        "expert) pairs it computed, as many as the shard sent it. Allowed is "
        f"{ALLOWED_RATIO} x own weights + {ALLOWED_BYTES / 1e6:.0f} MB.",
        "",
        "| worker | experts | layers | own weights | read | read by the process "
        "| peak RSS when ready | peak RSS | allowed | peak / allowed | start to ready, s "
        "| loading, s | rows |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for worker in workers:
        allowed = ALLOWED_RATIO * worker.weight_bytes + ALLOWED_BYTES
        experts = ", ".join(map(str, worker.placement.experts))
        layers = format_ranges(worker.placement.layers)
        lines.append(
            f"| {worker.worker_id} | {experts} | {layers} "
            f"| {_mb(worker.weight_bytes)} | {_mb(worker.checkpoint_bytes_read)} "
            f"| {_mb(worker.process_bytes_read)} | {_mb(worker.ready_peak_bytes)} "
            f"| {_mb(worker.peak_bytes)} | {_mb(allowed)} | {worker.peak_bytes / allowed:.2f} "
            f"| {worker.ready_s:.1f} | {worker.load_s:.1f} | {worker.num_rows} |"
        )
    lines += [
        "",
        f"While the workers loaded, together, other processes used {foreign_share:.0%} of the "
        "cores. "
        f"The shard's process peaked at {_mb(peak_rss_bytes(os.getpid()))} MB. "
        f"{NUM_PROMPTS} random prompts of {PROMPT_TOKENS} tokens were answered twice, with the "
        "same greedy tokens:",
        "",
        *(f"- {' '.join(map(str, row))}" for row in tokens),
    ]
    return "\n".join(lines) + "\n"


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.0f}"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
