"""Throw 70 % of the tokens onto one expert of a running product and watch its replicas.

    python -m benchmarks.hot_expert [--load decode|prefill]

`expertfleet up --workers 2` serves a random checkpoint whose prompts choose whether the last expert
is hot in every layer (`benchmarks/hot_checkpoint.py`). The same load shifts onto it twice: on a
fixed fleet, then with `--autoscale`. Shadow copies are off: with them the replica would mostly be
there already. Writes docs/performance/hot-expert.md and .svg; takes about four minutes for each
of two loads.

On two cores a decoding load has no core to spare: clients and gateway take what the colder worker
leaves, so that the replica can only bring what the two cores' whole time allows. A load of long
prompts and short answers is nearly all experts, and shows what a replica brings where a core is
free.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fleet_watch import FleetWatch, StreamLoad
from benchmarks.hot_checkpoint import (
    HOT_EXPERT,
    HOT_TOKENS,
    ORDINARY_TOKENS,
    SHAPE,
    write_hot_checkpoint,
)
from benchmarks.machine import describe_machine
from benchmarks.termination import unwind_on_sigterm
from benchmarks.time_plot import Series, draw_over_time
from services.cli.state_folder import RunningInstance
from services.core.redis_registry import RedisRegistry
from services.core.registry import FleetSnapshot
from tests.support.product import Product

HOT_STREAMS_SHARE = 0.66
"""With an eighth of the ordinary ones' tokens about 70 % of all go to the hot expert."""
CALM_S = 12.0
SETTLE_S = 3.0
GIVE_BACK_TIMEOUT_S = 60.0
OUT = Path(__file__).parents[1] / "docs" / "performance"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Clients that ask again and again, each for `max_tokens` after a prompt of so many."""

    num_streams: int
    prompt_tokens: int
    max_tokens: int

    @property
    def num_hot(self) -> int:
        return round(HOT_STREAMS_SHARE * self.num_streams)


LOADS = {
    "decode": Load(num_streams=96, prompt_tokens=8, max_tokens=32),
    "prefill": Load(num_streams=32, prompt_tokens=240, max_tokens=4),
}


ONE_CORE_EACH = {"EXPERTFLEET_NUM_THREADS": "1"}
"""As if each process had a machine of its own: a hot expert's worker must not take its neighbour's
cores, for then there is nothing that a replica could win."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What was seen between two times of `time.perf_counter`; tokens are those of prompts too."""

    name: str
    tokens_per_s: float
    p99_gap_ms: float
    hot_share: float
    busy_share: float
    """Of the machine's cores."""


@dataclass(slots=True, kw_only=True)
class Run:
    load: StreamLoad
    watch: FleetWatch
    onset: float = 0.0
    replicated: float | None = None
    hot_end: float = 0.0
    given_back: float | None = None

    def phase(self, name: str, begin: float, end: float) -> Phase:
        return Phase(
            name=name,
            tokens_per_s=self.load.computed_per_s(begin, end),
            p99_gap_ms=self.load.p99_gap_ms(begin, end),
            hot_share=_hot_share(self.watch, begin, end),
            busy_share=self.watch.busy_share(begin, end),
        )


async def measure(model: Path, folder: Path, asked: Load, hot_s: float, *, autoscale: bool) -> Run:
    """Ordinary load for a while, then the hot one, then (with `autoscale`) none until the replicas
    have gone."""
    options = ["--autoscale", "--no-shadow-copies"] if autoscale else []
    async with _running(model, folder, asked, options) as run:
        ordinary = [ORDINARY_TOKENS] * asked.num_streams
        hot = [HOT_TOKENS] * asked.num_hot + ordinary[asked.num_hot :]
        await run.load.streams(ordinary, CALM_S if autoscale else SETTLE_S)
        run.onset = time.perf_counter()
        await run.load.streams(hot, hot_s)
        run.hot_end = time.perf_counter()
        if autoscale:
            run.replicated = _first(run.watch, run.onset, lambda counts: min(counts) >= 2)
        while autoscale and time.perf_counter() - run.hot_end < GIVE_BACK_TIMEOUT_S:
            await asyncio.sleep(0.5)
            run.given_back = _first(run.watch, run.hot_end, lambda counts: max(counts) == 1)
            if run.given_back is not None:
                break
        return run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Watch a hot expert get its replica.")
    parser.add_argument("--hot-s", type=float, default=30.0, help="seconds of hot load")
    parser.add_argument("--load", choices=tuple(LOADS), help="default: both, one after the other")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the report")
    given = parser.parse_args(arguments)
    unwind_on_sigterm()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_hot_checkpoint(folder / "model")
        given.out.mkdir(parents=True, exist_ok=True)
        text = heading()
        for name in [given.load] if given.load else LOADS:
            asked = LOADS[name]
            fixed, scaled = (
                asyncio.run(
                    measure(
                        model, folder / f"{name}-{scales}", asked, given.hot_s, autoscale=scales
                    )
                )
                for scales in (False, True)
            )
            drawing = f"hot-expert-{name}.svg"
            (given.out / drawing).write_text(_drawing(fixed, scaled))
            text += report(name, asked, drawing, fixed, scaled)
    print(text)
    (given.out / "hot-expert.md").write_text(text)


def heading() -> str:
    return (
        f"# A hot expert\n\n{datetime.date.today()}, {describe_machine()}. "
        f"`python -m benchmarks.hot_expert`: {SHAPE.num_hidden_layers} layers x "
        f"{SHAPE.num_local_experts} experts of {SHAPE.hidden_size} x {SHAPE.intermediate_size}, "
        f"random, {SHAPE.num_experts_per_tok} expert per token; `up --workers 2`. Tokens are those "
        "of prompts and answers.\n"
    )


def report(name: str, asked: Load, drawing: str, fixed: Run, scaled: Run) -> str:
    lines = [
        "",
        f"## {name}",
        "",
        f"{asked.num_streams} streams of {asked.prompt_tokens} + {asked.max_tokens} tokens, of "
        f"which {asked.num_hot} move onto expert {HOT_EXPERT}.",
        "",
        f"![tokens per second over time]({drawing})",
        "",
        "| phase | tokens/s | p99 between tokens, ms | tokens on the hot expert | cores busy |",
        "|---|---|---|---|---|",
    ]
    fixed_hot = fixed.phase("fixed fleet, hot", fixed.onset + SETTLE_S, fixed.hot_end)
    phases = [
        fixed_hot,
        scaled.phase("autoscaled, before the load shifts", scaled.onset - 8, scaled.onset),
    ]
    ends = scaled.replicated
    if ends is not None:
        phases.append(scaled.phase("autoscaled, hot, before the replica", scaled.onset, ends))
        phases.append(
            scaled.phase("autoscaled, hot, with the replica", ends + SETTLE_S, scaled.hot_end)
        )
    lines += [
        f"| {one.name} | {one.tokens_per_s:.0f} | {one.p99_gap_ms:.0f} | {one.hot_share:.0%} "
        f"| {one.busy_share:.0%} |"
        for one in phases
    ]
    gain = f"{phases[-1].tokens_per_s / fixed_hot.tokens_per_s:.2f}" if ends else "no replica"
    lines += [
        "",
        f"- From the onset to a replica in every layer: {_seconds(scaled.onset, ends)}",
        f"- Throughput with the replicas over the fixed fleet's: {gain}. With all of the time that "
        f"its cores were idle it would be {1 / fixed_hot.busy_share:.2f}",
        f"- Failed requests: {fixed.load.num_failed + scaled.load.num_failed} of "
        f"{len(fixed.load.records) + len(scaled.load.records)}",
        "- From the end of the hot load until all replicas were given back: "
        f"{_seconds(scaled.hot_end, scaled.given_back)}",
    ]
    return "\n".join(lines) + "\n"


@contextlib.asynccontextmanager
async def _running(
    model: Path, folder: Path, asked: Load, options: Sequence[str]
) -> AsyncIterator[Run]:
    arguments = ["--workers", "2", "--no-ray", "--dtype", "bfloat16", *options]
    product = Product(folder, *arguments, model=model, environment=ONE_CORE_EACH)
    await asyncio.to_thread(product.start)
    store = RunningInstance.find(folder).run_folder / "store.sock"
    registry = RedisRegistry(f"unix://{store}", fleet="default")
    watch = FleetWatch(registry=registry)
    watching = asyncio.create_task(watch.run())
    load = StreamLoad(
        url=product.url, prompt_tokens=asked.prompt_tokens, max_tokens=asked.max_tokens
    )
    try:
        yield Run(load=load, watch=watch)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await registry.close()
        await asyncio.to_thread(product.stop)


def _num_holders(snapshot: FleetSnapshot) -> list[int]:
    """Replicas of the hot expert, layer by layer."""
    return [
        sum((layer, HOT_EXPERT) in worker.slots for worker in snapshot.workers)
        for layer in range(SHAPE.num_hidden_layers)
    ]


def _first(watch: FleetWatch, after: float, holds: Callable[[list[int]], bool]) -> float | None:
    """When it was first seen to hold of the hot expert's replicas."""
    for at, snapshot in watch.seen:
        if at >= after and len(snapshot.workers) == 2 and holds(_num_holders(snapshot)):
            return at
    return None


def _hot_share(watch: FleetWatch, begin: float, end: float) -> float:
    """Of the rows the workers counted between, those of the hot expert."""
    seen = [snapshot for at, snapshot in watch.seen if begin <= at < end]
    if not seen:
        return 0.0
    hot, every = (
        [
            sum(
                rows
                for worker in snapshot.workers
                for (_, expert), rows in worker.tokens.items()
                if expert == HOT_EXPERT or not hot_only
            )
            for snapshot in (seen[0], seen[-1])
        ]
        for hot_only in (True, False)
    )
    return (hot[1] - hot[0]) / max(1, every[1] - every[0])


def _seconds(begin: float, end: float | None) -> str:
    return "not seen" if end is None else f"{end - begin:.1f} s"


def _drawing(fixed: Run, scaled: Run) -> str:
    def series(name: str, run: Run) -> Series:
        last = max(at for record in run.load.records for at, _ in record.arrivals)
        begin = run.onset - SETTLE_S
        return Series(
            name=name,
            points=[
                (
                    second - SETTLE_S + 0.5,
                    run.load.computed_per_s(begin + second, begin + second + 1),
                )
                for second in range(int(last - begin))
            ],
        )

    marks = {"load shifts": 0.0, "hot load ends": scaled.hot_end - scaled.onset}
    if scaled.replicated is not None:
        marks["replica"] = scaled.replicated - scaled.onset
    if scaled.given_back is not None:
        marks["given back"] = scaled.given_back - scaled.onset
    return draw_over_time(
        [series("fixed fleet", fixed), series("autoscaled", scaled)], marks, "tokens per second"
    )


if __name__ == "__main__":
    main()
