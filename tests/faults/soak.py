"""`make soak`: faults drawn at random, one after the other, under load that never ends.

    python -m tests.faults.soak [--minutes 30] [--seed N] [--streams 16] [--out FOLDER]

Every answer is compared as in the fault lab. Between faults, when every process is back, memory,
threads, file descriptors and sockets of all processes are noted by role; at the end none may have
grown by more than `resources.ALLOWED` over the last three quarters. With `--out` it writes soak.md
there. Ends with 1 where something was lost, wrong, not recovered, or grew.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.machine import describe_machine
from tests.faults.catalogue import FAULTS
from tests.faults.lab import VOCAB_SIZE, Outcome, Pace, learn_answers, run_fault
from tests.faults.resources import ALLOWED, Growth, Sample, growths, sample_roles
from tests.faults.scene import Scene, end_on_sigterm
from tests.support.load import draw_scripts

PACE = Pace(before_s=3.0, after_s=2.0, max_hold_s=8.0)


@dataclass(slots=True, kw_only=True)
class Soak:
    """What has happened so far. `is_over` early: the product did not recover."""

    outcomes: list[Outcome] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    is_over: bool = False

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.is_survived]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for logs, which is then kept")
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to draw from")
    arguments = parser.parse_args()
    end_on_sigterm()
    names = arguments.names or [name for name, fault in FAULTS.items() if fault.is_for_soak]
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        scene = Scene(arguments.keep or Path(scratch)).start()
        try:
            soak = asyncio.run(
                _soak(scene, names, arguments.minutes * 60, arguments.seed, arguments.streams)
            )
        finally:
            scene.stop()
    found = growths(soak.samples)
    text = markdown(soak, found, arguments.minutes, arguments.seed, arguments.streams)
    sys.stdout.write(text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "soak.md").write_text(text)
    return 1 if soak.failed or any(growth.is_too_much for growth in found) else 0


async def _soak(
    scene: Scene, names: Sequence[str], duration_s: float, seed: int, num_streams: int
) -> Soak:
    scripts = draw_scripts(seed, vocab_size=VOCAB_SIZE)
    answers = await learn_answers(scene, scripts)
    generator = random.Random(seed)
    soak = Soak()
    started = time.monotonic()
    while not soak.is_over and time.monotonic() - started < duration_s:
        fault = FAULTS[generator.choice(names)]
        outcome = await run_fault(
            scene,
            fault,
            scripts,
            answers,
            seed=seed + len(soak.outcomes),
            pace=PACE,
            num_streams=num_streams,
        )
        soak.outcomes.append(outcome)
        soak.samples += sample_roles(scene.processes(), time.monotonic() - started)
        soak.is_over = outcome.whole_s is None
        sys.stderr.write(f"{time.monotonic() - started:6.0f} s  {outcome.explain()}\n")
        sys.stderr.flush()
    return soak


def markdown(
    soak: Soak, found: Sequence[Growth], minutes: float, seed: int, num_streams: int
) -> str:
    counts = Counter(outcome.fault.name for outcome in soak.outcomes)
    verdicts = [outcome.verdict for outcome in soak.outcomes]
    wrong = sum(v.num_wrong_tokens + v.num_lost_tokens for v in verdicts)
    lines = [
        f"| {growth.role} | {growth.name} | {_value(growth, growth.median)} "
        f"| {'**' if growth.is_too_much else ''}{_value(growth, growth.grown)}"
        f"{'**' if growth.is_too_much else ''} | {_value(growth, growth.allowed)} |\n"
        for growth in found
    ]
    failed = [f"- {outcome.explain()}\n" for outcome in soak.failed]
    return (
        "# Soak\n\n"
        f'`make soak ARGS="--minutes {minutes:g} --seed {seed}"`, {time.strftime("%Y-%m-%d")}. '
        f"{describe_machine()}. Demo model in bf16, {num_streams} streams, "
        f"{len(soak.outcomes)} faults drawn at random.\n\n"
        f"{sum(v.num_requests for v in verdicts)} requests, "
        f"{sum(v.num_failed for v in verdicts)} failed, {wrong} wrong or lost tokens; faults not "
        f"survived: {len(soak.failed)}.\n\n"
        + "".join(f"- {name}: {count}\n" for name, count in sorted(counts.items()))
        + ("\nNot survived:\n\n" + "".join(failed) if failed else "")
        + "\nBy role, sums over its processes when all were back after a fault: the median, and "
        "how far a robust line (Theil-Sen) rises over the last three quarters. Allowed are "
        f"{ALLOWED['memory'] / 2**20:.0f} MiB and a tenth of memory, {ALLOWED['threads']:.0f} "
        f"threads, {ALLOWED['fds']:.0f} descriptors, {ALLOWED['sockets']:.0f} sockets.\n\n"
        "| role | | median | grown | allowed |\n|---|---|---|---|---|\n" + "".join(lines)
    )


def _value(growth: Growth, value: float) -> str:
    return f"{round(value / 2**20)} MiB" if growth.name == "memory" else f"{round(value)}"


if __name__ == "__main__":
    sys.exit(main())
