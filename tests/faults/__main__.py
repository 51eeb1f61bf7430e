"""`make faults`: the reliability table, measured.

    python -m tests.faults [NAME ...] [--seed N] [--out FOLDER] [--list]

Starts the product once and runs the named faults (all, unless named) under load, one after the
other. With `--out` it writes faults.md, faults.json and faults.svg there. Ends with 1 where a
request failed, a token was wrong or lost, or the product did not recover; with `--strict` also
where a figure misses its bound.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults.catalogue import FAULTS
from tests.faults.fault import Fault
from tests.faults.lab import VOCAB_SIZE, Outcome, Pace, learn_answers, run_fault
from tests.faults.report import write_report
from tests.faults.scene import Scene, end_on_sigterm
from tests.support.load import Answers, Script, draw_scripts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults; default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--before", type=float, default=7.0, help="seconds of load before a fault")
    parser.add_argument("--out", type=Path, help="folder for the report")
    parser.add_argument("--keep", type=Path, help="folder for logs, which is then kept")
    parser.add_argument("--list", action="store_true", help="name the faults")
    parser.add_argument("--strict", action="store_true", help="a missed figure is a failure")
    arguments = parser.parse_args()
    if arguments.list:
        for fault in FAULTS.values():
            sys.stdout.write(f"{fault.name:20} {fault.what}\n")
        return 0
    if unknown := set(arguments.names) - set(FAULTS):
        parser.error(f"no such fault: {', '.join(sorted(unknown))} (see --list)")
    end_on_sigterm()
    chosen = [FAULTS[name] for name in arguments.names or FAULTS]
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        folder = arguments.keep or Path(scratch)
        outcomes = run_all(
            chosen, folder, seed=arguments.seed, pace=Pace(before_s=arguments.before)
        )
    report = write_report(outcomes, arguments.seed, arguments.out)
    sys.stdout.write(report)
    survived = all(outcome.is_survived for outcome in outcomes)
    met = not any(outcome.missed_bounds for outcome in outcomes)
    return 0 if survived and (met or not arguments.strict) else 1


def run_all(faults: Sequence[Fault], folder: Path, *, seed: int, pace: Pace) -> list[Outcome]:
    """A scene that did not recover from a fault is replaced before the next."""
    scripts = draw_scripts(seed, vocab_size=VOCAB_SIZE)
    answers: Answers | None = None
    outcomes: list[Outcome] = []
    scene: Scene | None = None
    try:
        for number, fault in enumerate(faults):
            if scene is None:
                scene = Scene(folder / f"scene-{number}").start()
                _say(f"started: {scene.state()}")
            answers = answers or asyncio.run(learn_answers(scene, scripts))
            outcome = asyncio.run(_run(scene, fault, scripts, answers, seed, pace))
            outcomes.append(outcome)
            _say(outcome.explain())
            if outcome.whole_s is None:
                scene.stop()
                scene = None
    finally:
        if scene is not None:
            scene.stop()
    return outcomes


async def _run(
    scene: Scene,
    fault: Fault,
    scripts: Sequence[Script],
    answers: Answers,
    seed: int,
    pace: Pace,
) -> Outcome:
    return await run_fault(scene, fault, scripts, answers, seed=seed, pace=pace)


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')}  {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
