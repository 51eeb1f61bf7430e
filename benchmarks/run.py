"""`make bench`: expertfleet over gRPC, expertfleet in process and transformers, side by side.

Every side stays loaded in a process of its own; rounds alternate between them on the same weights
and the same fresh random prompts. Prints medians with their spread, and ratios, which are the
result. Before it measures, it checks that both expertfleet sides answer with the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.machine import ForeignLoad, describe_machine
from benchmarks.random_checkpoint import write_named_checkpoint
from services.core.checkpoints.hub import find_model
from services.core.model_config import load_model_config

SIDES = ("workers", "inprocess", "transformers")
PREFILL_TOKENS = 512
DEMO = Path("models/demo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    name: str
    folder: Path
    vocab_size: int
    context: int = 128
    new_tokens: int = 64


@dataclass(slots=True, kw_only=True)
class Samples:
    """Tokens per second of each side, one value a round, and foreign CPU beside them."""

    rates: dict[str, list[float]] = field(default_factory=dict)
    foreign: list[float] = field(default_factory=list)

    def add(self, side: str, rate: float) -> None:
        self.rates.setdefault(side, []).append(rate)

    def median(self, side: str) -> float:
        return statistics.median(self.rates[side])

    def ratio(self, side: str, other: str) -> float:
        """Median over rounds of the two sides' ratio within one round."""
        pairs = zip(self.rates[side], self.rates[other], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def cell(self, side: str) -> str:
        values = self.rates[side]
        return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


class Side:
    """The process that runs one side's jobs."""

    def __init__(self, name: str, workload: Workload, num_workers: int) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.side", name, str(workload.folder)]
        self.process = subprocess.Popen(
            [*command, "--workers", str(num_workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.isatty(2) else None,
            text=True,
        )

    def wait_ready(self) -> None:
        self._read()

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the side {self.name} ended with status {self.process.wait()}")
        return dict(json.loads(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="demo,bench-s", help="demo, bench-xs, bench-s")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("docs/performance"))
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batches.split(",")]
    text = f"Measured {date.today()} on {describe_machine()}.\n"
    figures: dict[str, Any] = {"machine": describe_machine(), "date": str(date.today())}
    with tempfile.TemporaryDirectory(prefix="expertfleet-bench-") as scratch:
        for name in arguments.models.split(","):
            workload = _workload(name, Path(scratch), arguments.new_tokens)
            samples = _measure(workload, batches, arguments.rounds, arguments.workers)
            text += "\n" + _table(workload, samples, arguments)
            figures[name] = {key: value.rates for key, value in samples.items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "bench.md").write_text(text)
    (arguments.out / "bench.json").write_text(json.dumps(figures, indent=1) + "\n")
    sys.stdout.write(text)


def _workload(name: str, scratch: Path, new_tokens: int) -> Workload:
    folder = DEMO
    if name != "demo":
        folder = write_named_checkpoint(name, scratch / name)
    vocab_size = load_model_config(find_model(str(folder)).folder).vocab_size
    return Workload(name=name, folder=folder, vocab_size=vocab_size, new_tokens=new_tokens)


def _measure(
    workload: Workload, batches: Sequence[int], rounds: int, num_workers: int
) -> dict[str, Samples]:
    sides = [Side(name, workload, num_workers) for name in SIDES]
    samples: dict[str, Samples] = {}
    try:
        for side in sides:
            side.wait_ready()
        generator = random.Random(20)
        _check_same_tokens(workload, sides, generator)
        for round_number in range(-1, rounds):
            for batch in [0, *batches]:
                prompts = _prompts(workload, generator, batch)
                foreign = ForeignLoad([os.getpid()])
                label = f"decode {batch}" if batch else f"prefill {PREFILL_TOKENS}"
                for side in sides:
                    rate = _rate(side, prompts, workload.new_tokens if batch else 1)
                    if round_number >= 0:
                        samples.setdefault(label, Samples()).add(side.name, rate)
                if round_number >= 0:
                    samples[label].foreign.append(foreign.stop())
            sys.stderr.write(f"{workload.name}: round {round_number + 1} of {rounds}\n")
    finally:
        for side in sides:
            side.close()
    return samples


def _prompts(workload: Workload, generator: random.Random, batch: int) -> list[list[int]]:
    """Fresh each time, so that no side can answer from its prefix cache. Batch 0 is the prefill."""
    length = workload.context if batch else PREFILL_TOKENS
    return [
        [generator.randrange(10, workload.vocab_size) for _ in range(length)]
        for _ in range(max(1, batch))
    ]


def _rate(side: Side, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
    result = side.run(prompts, max_tokens)
    if max_tokens == 1:
        return len(prompts[0]) / float(result["ttft_s"])
    return len(prompts) * (max_tokens - 1) / float(result["decode_s"])


def _check_same_tokens(workload: Workload, sides: Sequence[Side], generator: random.Random) -> None:
    prompts = _prompts(workload, generator, 4)
    answers = {side.name: side.run(prompts, 16)["tokens"] for side in sides}
    if answers["workers"] != answers["inprocess"]:
        raise SystemExit(f"{workload.name}: workers and in-process experts answer differently")


def _table(workload: Workload, samples: dict[str, Samples], arguments: argparse.Namespace) -> str:
    lines = [
        f"**{workload.name}**, bf16, {arguments.workers} workers, context {workload.context}, "
        f"{workload.new_tokens} new tokens, {arguments.rounds} rounds; "
        "tokens/s as median (lowest to highest)",
        "",
        "| | over gRPC | in process | transformers | gRPC / in process | "
        "gRPC / transformers | in process / transformers | foreign CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, row in samples.items():
        cells = [row.cell(side) for side in SIDES]
        ratios = [
            row.ratio("workers", "inprocess"),
            row.ratio("workers", "transformers"),
            row.ratio("inprocess", "transformers"),
        ]
        foreign = statistics.median(row.foreign)
        lines.append(
            f"| {label} | {' | '.join(cells)} | "
            f"{' | '.join(f'{ratio:.2f}' for ratio in ratios)} | {foreign:.0%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
