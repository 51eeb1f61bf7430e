"""`make bench`: expertfleet and what else could serve the same weights, side by side.

    python -m benchmarks.run [--models bench-s,demo] [--batches 1,8,32] [--rounds 2] [--sides ...]

Sides are measured in groups that fit in memory together, one group after the other; a ratio is
between two sides of a group. There, every side stays loaded in a process of its own; rounds
alternate between them on the same weights and the same fresh random prompts. Sides that are not
installed (`python -m benchmarks.peers install`) or do not fit in memory are skipped with a word.
Before it measures, it checks that sides answer alike. Writes bench.md, bench.json and bench.svg;
ratios are the result. On two cores each of the four groups takes about six minutes with bench-s,
of which a round is one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import psutil

from benchmarks.agreement import DisagreementError
from benchmarks.machine import describe_machine
from benchmarks.plot import plot
from benchmarks.random_checkpoint import SHAPES, write_named_checkpoint
from benchmarks.report import ModelReport, figures, markdown
from benchmarks.rounds import Rounds, Samples, Workload, workloads
from benchmarks.side_process import SideFailedError, SideProcess
from benchmarks.sides import (
    GROUPS,
    SIDES,
    Places,
    SideSpec,
    SideUnavailableError,
    is_side,
    side_spec,
)
from benchmarks.termination import unwind_on_sigterm
from services.core.model_config import ModelConfig, load_model_config

DEMO = Path("models/demo").resolve()
PROBE = SideSpec(name="ceilings", command=(sys.executable, "-m", "benchmarks.ceilings"))
WEIGHTS_FACTOR, RUNTIME_BYTES = 1.25, 3 << 30
"""Free memory asked for before a side is started: weights times this, its libraries, and what sides
that are loaded already will still take when they run."""


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    if unknown := {*arguments.models.split(",")} - {"demo", *SHAPES}:
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    groups = [group.split(",") for group in arguments.sides.split("/")]
    if unknown := {name for group in groups for name in group if not is_side(name)}:
        parser.error(f"no such side: {', '.join(sorted(unknown))}; there are {', '.join(SIDES)}")
    unwind_on_sigterm()
    places = Places.under(arguments.work_dir)
    batches = sorted(int(batch) for batch in arguments.batches.split(","))
    try:
        models = [
            _measure(name, groups, batches, places, arguments)
            for name in arguments.models.split(",")
        ]
    except (DisagreementError, SideFailedError) as error:
        _say(f"error: {error}")
        return 1
    machine, today = describe_machine(), str(date.today())
    command = " ".join(["python -m benchmarks.run", *sys.argv[1:]])
    text = markdown(machine, today, command, models)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "bench.md").write_text(text)
    (arguments.out / "bench.svg").write_text(plot(models))
    written = json.dumps(figures(machine, today, models), indent=1)
    (arguments.out / "bench.json").write_text(written + "\n")
    sys.stdout.write(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="bench-s", help=f"demo, {', '.join(SHAPES)}")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--sides",
        default="/".join(",".join(group) for group in GROUPS),
        help="groups of them, a slash between two; default: %(default)s",
    )
    parser.add_argument("--context", type=int, default=128, help="prompt tokens when decoding")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("docs/performance"))
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path(".bench"),
        help="environments of the peers, checkpoints and compiled code, kept between runs",
    )
    return parser


def _measure(
    name: str,
    groups: Sequence[Sequence[str]],
    batches: Sequence[int],
    places: Places,
    arguments: argparse.Namespace,
) -> ModelReport:
    folder = DEMO
    if name != "demo":
        folder = write_named_checkpoint(name, places.models / name)
    run = _ModelRun(
        folder=folder,
        config=load_model_config(folder),
        workloads=workloads(batches, context=arguments.context, new_tokens=arguments.new_tokens),
        num_rounds=arguments.rounds,
    )
    for group in groups:
        run.measure(group, places)
    return run.report(name)


@dataclass(slots=True, kw_only=True)
class _ModelRun:
    """All groups of sides with one model."""

    folder: Path
    config: ModelConfig
    workloads: Sequence[Workload]
    num_rounds: int
    _groups: list[Samples] = field(default_factory=list)
    _measured: list[set[str]] = field(default_factory=list)
    _versions: dict[str, dict[str, str]] = field(default_factory=dict)
    _skipped: dict[str, str] = field(default_factory=dict)

    def measure(self, group: Sequence[str], places: Places) -> None:
        """Those that can be started; nothing if they have been measured together before."""
        specs = []
        for name in group:
            try:
                specs.append(side_spec(name, self.folder, places))
            except SideUnavailableError as error:
                self._skip(name, error)
        if any({spec.name for spec in specs} <= measured for measured in self._measured):
            return
        with contextlib.ExitStack() as stack:
            logs = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="expertfleet-bench-"))
            )
            sides = []
            for spec in specs:
                try:
                    sides.append(_start(spec, self.folder, logs, stack))
                except (SideUnavailableError, SideFailedError) as error:
                    self._skip(spec.name, error)
            if not sides:
                return
            probe = SideProcess(PROBE, logs / "ceilings.log")
            stack.callback(probe.close)
            probe.wait_ready()
            self._versions |= {side.name: side.versions for side in sides}
            self._measured.append({side.name for side in sides})
            rounds = Rounds(
                sides=sides,
                probe=probe,
                workloads=self.workloads,
                vocab_size=self.config.vocab_size,
                say=lambda text: _say(f"{self.folder.name}: {text}"),
            )
            self._groups.append(rounds.run(self.num_rounds))

    def report(self, name: str) -> ModelReport:
        if not self._groups:
            raise SideFailedError("no side could be started")
        return ModelReport(
            name=name,
            config=self.config,
            workloads=self.workloads,
            num_rounds=self.num_rounds,
            groups=self._groups,
            versions=self._versions,
            skipped=self._skipped,
        )

    def _skip(self, name: str, error: Exception) -> None:
        self._skipped[name] = str(error).splitlines()[0]
        _say(f"{self.folder.name}: {name} is skipped: {error}")


def _start(spec: SideSpec, folder: Path, logs: Path, stack: contextlib.ExitStack) -> SideProcess:
    """One side after the other, so that each loads with all the cores to itself."""
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    needed = WEIGHTS_FACTOR * weights + RUNTIME_BYTES
    free = psutil.virtual_memory().available
    if free < needed:
        raise SideUnavailableError(
            f"{needed / 1e9:.1f} GB of memory are needed, {free / 1e9:.1f} GB are free; "
            "give fewer --sides"
        )
    side = SideProcess(spec, logs / f"{spec.name}.log")
    stack.callback(side.close)
    try:
        side.wait_ready()
    except SideFailedError:
        if spec.is_ours:
            raise
        side.close()
        raise
    _say(f"{folder.name}: {spec.name} is ready")
    return side


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
