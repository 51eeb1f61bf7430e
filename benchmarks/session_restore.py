"""A session's KV taken from the store, beside computing it again: `make bench-session-restore`.

Two engines serve bench-s and share a store. In each round the first answers a prompt of a session,
whose KV goes to the store, and the second is asked for the session's next turn, which is the same
prompt and a few tokens more:

    restored    the next turn on the second engine, which has never seen the session
    recomputed  a fresh prompt of the same length on the second engine
    cached      the next turn on the first engine, whose own memory holds the KV

Prints the median time to the first token of each. The restored answer has to be that of the first
engine, token by token.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path

from benchmarks.machine import describe_machine
from benchmarks.random_checkpoint import write_named_checkpoint
from benchmarks.side_process import SideFailedError, SideProcess, running_sides
from benchmarks.sides import Places, SideSpec
from benchmarks.termination import unwind_on_sigterm
from services.core.model_config import load_model_config
from services.core.store_server import start_server

MODEL = "bench-s"
TURN_TOKENS = 16
ANSWER_TOKENS = 8
WRITE_BEHIND_S = 1.0
"""For the store to have what was computed: writing is behind answering."""
TARGET = 0.25
RESTORED, RECOMPUTED, CACHED = "restored", "recomputed", "cached"
KV_CACHE_BYTES = 256 << 20


def main() -> None:
    arguments = _parser().parse_args()
    # So that a run that is terminated ends its sides.
    unwind_on_sigterm()
    model = write_named_checkpoint(MODEL, Places.under(arguments.work_dir).models / MODEL)
    vocab_size = load_model_config(model).vocab_size
    lengths = [int(text) for text in arguments.lengths.split(",")]
    generator = random.Random(time.time_ns())
    times: dict[int, dict[str, list[float]]] = {}
    with _engines(model, arguments.workers) as (first, second):
        for number in range(-1, arguments.rounds):
            for length in lengths:
                prompts = [
                    [generator.randrange(10, vocab_size) for _ in range(length + TURN_TOKENS)]
                    for _ in range(2)
                ]
                seconds = _round(first, second, prompts[0], prompts[1], length)
                if number >= 0:  # the first round fills caches and rates
                    for name, value in seconds.items():
                        times.setdefault(length, {}).setdefault(name, []).append(value)
    text = report(times, arguments.workers, describe_machine(), " ".join(sys.argv[1:]))
    arguments.out.write_text(text)
    sys.stdout.write(text)


def report(
    times: Mapping[int, Mapping[str, Sequence[float]]], workers: int, machine: str, arguments: str
) -> str:
    """Markdown, with a row for each length of a session."""
    command = " ".join(["python -m benchmarks.session_restore", arguments]).strip()
    place = f"experts in {workers} workers" if workers else "experts in process"
    lines = [
        f"Measured {date.today()} on {machine}, by `{command}`.",
        "",
        f"{MODEL}, {place}; milliseconds to the first token as median (lowest to highest); the "
        "ratio is the median of those within a round.",
        "",
        f"| tokens of the session | {RECOMPUTED} | {RESTORED} | {CACHED} | {RESTORED} / "
        f"{RECOMPUTED} (target at 2048: {TARGET:g}) |",
        "|---|---|---|---|---|",
    ]
    for length, by_name in times.items():
        pairs = zip(by_name[RESTORED], by_name[RECOMPUTED], strict=True)
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        cells = [_cell(by_name[name]) for name in (RECOMPUTED, RESTORED, CACHED)]
        lines.append(f"| {length} | {' | '.join(cells)} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def _cell(seconds: Sequence[float]) -> str:
    low, high = min(seconds) * 1e3, max(seconds) * 1e3
    return f"{statistics.median(seconds) * 1e3:.0f} ({low:.0f} to {high:.0f})"


def _round(
    first: SideProcess,
    second: SideProcess,
    conversation: Sequence[int],
    fresh: Sequence[int],
    length: int,
) -> dict[str, float]:
    """Seconds to the first token. Raises `SideFailedError` where the restored answer differs."""
    session = f"session-{time.time_ns()}"
    turn = {"max_tokens": ANSWER_TOKENS, "session_id": session}
    first.run({"prompts": [conversation[:length]], **turn})
    time.sleep(WRITE_BEHIND_S)
    recomputed = second.run({"prompts": [fresh], "max_tokens": ANSWER_TOKENS})
    restored = second.run({"prompts": [conversation], **turn})
    cached = first.run({"prompts": [conversation], **turn})
    if restored["tokens"] != cached["tokens"]:
        raise SideFailedError("the restored session answers with other tokens")
    return {
        RECOMPUTED: float(recomputed["ttft_s"]),
        RESTORED: float(restored["ttft_s"]),
        CACHED: float(cached["ttft_s"]),
    }


@contextlib.contextmanager
def _engines(model: Path, workers: int) -> Iterator[tuple[SideProcess, SideProcess]]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertfleet-")))
        store = start_server(folder / "store", maxmemory_bytes=4 << 30)
        stack.callback(store.stop)
        command = [sys.executable, "-m", "benchmarks.side"]
        command += ["workers" if workers else "inprocess", str(model)]
        command += ["--workers", str(workers)] if workers else []
        specs = []
        for name in ("first", "second"):
            environment = {
                "REDIS_URL": store.url,
                "EXPERTFLEET_KV_CACHE_BYTES": str(KV_CACHE_BYTES),
                "EXPERTFLEET_TRACE_SAMPLE_RATIO": "0",
            }
            spec = SideSpec(
                name=name, command=tuple(command), environment=environment, is_ours=True
            )
            specs.append(spec)
        first, second = stack.enter_context(running_sides(specs, folder))
        yield first, second


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="512,2048", help="tokens of the first turn")
    parser.add_argument("--workers", type=int, default=0, help="0: experts in process")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("docs/performance/session-restore.md"))
    parser.add_argument(
        "--work-dir", type=Path, default=Path(".bench"), help="checkpoints, kept between runs"
    )
    return parser


if __name__ == "__main__":
    main()
