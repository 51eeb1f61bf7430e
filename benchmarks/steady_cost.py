"""What it costs all the time to be watched and to survive failures: `make bench-steady-cost`.

The engine, with its experts in two worker processes, is loaded once for each of

    plain        no metric counts, no request is traced, nothing goes to a store
    metrics      metrics count, which is the least that the product does
    traced       metrics, and tracing as it is by default, to files
    checkpoints  metrics, and the KV of running requests goes to a store as it is computed
    everything   all of these

and these take turns on the same prompts. Deadlines are set in all: they are an argument of the
wait for the workers' answers. Prints ratios of tokens per second within a round, as median.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from benchmarks.machine import describe_machine
from benchmarks.random_checkpoint import write_named_checkpoint
from benchmarks.rounds import Rounds, Samples, workloads
from benchmarks.side_process import SideProcess, running_sides
from benchmarks.sides import Places, SideSpec
from benchmarks.targets import verdict
from benchmarks.termination import unwind_on_sigterm
from services.core.model_config import load_model_config
from services.core.store_server import start_server

MODEL = "bench-s"
NUM_WORKERS = 2
KV_CACHE_BYTES = 256 << 20
PLAIN, METRICS, TRACED, CHECKPOINTS, EVERYTHING = (
    "plain",
    "metrics",
    "traced",
    "checkpoints",
    "everything",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    text: str
    side: str
    other: str
    wanted: float | None = None


COMPARISONS = (
    Comparison(text="metrics / none", side=METRICS, other=PLAIN),
    Comparison(text="tracing by default / off", side=TRACED, other=METRICS, wanted=0.98),
    Comparison(text="checkpoints / none", side=CHECKPOINTS, other=METRICS),
    Comparison(text="everything / plain", side=EVERYTHING, other=PLAIN, wanted=0.97),
)


def main() -> None:
    arguments = _parser().parse_args()
    unwind_on_sigterm()
    batches = [int(text) for text in arguments.batches.split(",")]
    model = write_named_checkpoint(MODEL, Places.under(arguments.work_dir).models / MODEL)
    with _sides(model) as sides:
        rounds = Rounds(
            sides=sides,
            probe=None,
            workloads=workloads(batches, context=128, new_tokens=arguments.new_tokens),
            vocab_size=load_model_config(model).vocab_size,
            say=_say,
        )
        samples = rounds.run(arguments.rounds)
    text = report(samples, describe_machine(), " ".join(sys.argv[1:]))
    arguments.out.write_text(text)
    sys.stdout.write(text)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def report(samples: Samples, machine: str, arguments: str) -> str:
    """Markdown: tokens per second of each side, and the ratios."""
    labels = list(samples.rates)
    command = " ".join(["python -m benchmarks.steady_cost", arguments]).strip()
    lines = [
        f"Measured {date.today()} on {machine}, by `{command}`.",
        "",
        f"{MODEL}, {NUM_WORKERS} workers, prompts of 128 tokens; tokens/s of each round; ratios "
        "are medians of those within a round (lowest to highest).",
        "",
        *_table(["", *labels], [[side, *_rates(samples, side)] for side in _names(samples)]),
        "",
        *_table(
            ["ratio", *labels],
            [
                [each.text, *(_ratio(samples, label, each) for label in labels)]
                for each in COMPARISONS
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def _names(samples: Samples) -> list[str]:
    return list(next(iter(samples.rates.values())))


def _rates(samples: Samples, side: str) -> list[str]:
    return [" ".join(f"{rate:.4g}" for rate in by[side]) for by in samples.rates.values()]


def _ratio(samples: Samples, label: str, comparison: Comparison) -> str:
    rates = samples.rates[label]
    mine, theirs = rates[comparison.side], rates[comparison.other]
    pairs = sorted(one / other for one, other in zip(mine, theirs, strict=True))
    median = samples.ratio(label, comparison.side, comparison.other)
    return f"{verdict(median, comparison.wanted)} ({pairs[0]:.2f} to {pairs[-1]:.2f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


@contextlib.contextmanager
def _sides(model: Path) -> Iterator[list[SideProcess]]:
    """All of them, loaded and idle."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertfleet-")))
        store = start_server(folder / "store", maxmemory_bytes=1 << 30)
        stack.callback(store.stop)
        untraced = {"EXPERTFLEET_TRACE_SAMPLE_RATIO": "0"}
        traced = {"EXPERTFLEET_STATE_DIR": str(folder)}
        stored = {"REDIS_URL": store.url}
        environments = {
            PLAIN: untraced,
            METRICS: untraced,
            TRACED: traced,
            CHECKPOINTS: untraced | stored,
            EVERYTHING: traced | stored,
        }
        specs = []
        for name, environment in environments.items():
            command = [sys.executable, "-m", "benchmarks.side", "workers", str(model)]
            command += ["--workers", str(NUM_WORKERS)]
            if name == PLAIN:
                command.append("--uncounted")
            kv_cache = {"EXPERTFLEET_KV_CACHE_BYTES": str(KV_CACHE_BYTES)}
            spec = SideSpec(
                name=name,
                command=tuple(command),
                environment=environment | kv_cache,
                is_ours=True,
                exactly_as=PLAIN,
            )
            specs.append(spec)
        yield stack.enter_context(running_sides(specs, folder))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("docs/performance/steady-cost.md"))
    parser.add_argument(
        "--work-dir", type=Path, default=Path(".bench"), help="checkpoints, kept between runs"
    )
    return parser


if __name__ == "__main__":
    main()
