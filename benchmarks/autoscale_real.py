"""A compressed day of demand on real processes: worker-seconds with the autoscaler and without.

The product serves a random checkpoint in which the experts are most of the work, as `up --workers
N`, as `up --workers M --autoscale --max-workers N`, and with one worker less than N, under the same
requests at the same times. Every worker is held to a share of a core once it serves, as a pod
with a CPU limit is, so that N of them fit beside shard, gateway and clients. Peak demand is a share
of what N workers were seen to take. Worker-seconds are those of the workers' leases.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cpu_quota import CpuQuotas, cpu_quotas
from benchmarks.fleet_watch import POLL_S, FleetWatch, StreamLoad
from benchmarks.hot_checkpoint import ORDINARY_TOKENS, write_hot_checkpoint
from benchmarks.hot_checkpoint import SHAPE as HOT_SHAPE
from benchmarks.machine import describe_machine
from benchmarks.time_plot import Series, draw_over_time
from services.cli.state_folder import RunningInstance
from services.core.redis_registry import RedisRegistry
from tests.support.product import Product

PROMPT_TOKENS = 240
MAX_TOKENS = 4
"""Mostly prompts, whose work grows with their tokens. A step that only decodes takes a worker as
long for one row as for eight, so that with few requests it is as busy as with many."""
WORKER_CORES = 0.25
SHAPE = dataclasses.replace(HOT_SHAPE, intermediate_size=3584, num_hidden_layers=4)
CALIBRATION_STREAMS = 8
CALIBRATION_S = 10.0
PEAK_SHARE = 0.75
"""Of what the largest fleet takes: what one with a worker less (3 of 4) takes at its very most."""
IDLE_AFTER_S = 5.0
WARM_UP_S = 2.0
NUM_PARTS = 12
SETTLE_S = 12.0
"""Until the launcher has the spare process that it keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RealDay:
    """`curve` has (second of the day, workers), `parts_p99_ms` the p99 of an answer in each of
    `NUM_PARTS` equal parts of the day."""

    name: str
    worker_seconds: float
    p99_answer_ms: float
    fewest: int
    most: int
    num_requests: int
    errors: Sequence[str]
    curve: Sequence[tuple[float, float]]
    parts_p99_ms: Sequence[float]


def run_real(
    share_of_peak: Callable[[float], float], *, day_s: float, max_workers: int, out: Path
) -> str:
    """Run three fleets through one day, `share_of_peak` given in days; writes the report to `out`
    and returns it."""
    out.mkdir(parents=True, exist_ok=True)
    scaling = ["--autoscale", "--max-workers", str(max_workers), "--no-shadow-copies"]
    scaling += ["--idle-after-s", str(IDLE_AFTER_S)]
    fleets: list[tuple[str, int, list[str]]] = [
        (f"fixed, {max_workers}", max_workers, []),
        ("autoscaled", max(1, max_workers // 2), scaling),
        (f"fixed, {max_workers - 1}", max_workers - 1, []),
    ]
    peak: float | None = None
    days = []
    with tempfile.TemporaryDirectory() as name, cpu_quotas() as quotas:
        folder = Path(name)
        model = write_hot_checkpoint(folder / "model", SHAPE)
        for number, fleet in enumerate(fleets):
            state = folder / f"state-{number}"
            running = _running(quotas, model, state, fleet)
            day, peak = asyncio.run(_day(fleet[0], running, share_of_peak, day_s, peak))
            days.append(day)
            told = f"{day.worker_seconds:.0f} worker-s, p99 {day.p99_answer_ms:.0f} ms, by parts "
            told += ", ".join(f"{each:.0f}" for each in day.parts_p99_ms)
            print(f"{day.name}: {told}", *day.errors, sep="\n  ", flush=True)
    assert peak is not None
    text = _report(days, peak, day_s)
    (out / "autoscale-trace.md").write_text(text)
    fixed_day, scaled_day, _ = days
    demand = [(step / 100 * day_s, share_of_peak(step / 100)) for step in range(100)]
    series = [
        Series(name="demand, of the peak", points=demand),
        Series(name="workers, autoscaled", points=scaled_day.curve),
        Series(name="workers, fixed", points=fixed_day.curve),
    ]
    (out / "autoscale-trace.svg").write_text(draw_over_time(series, {}, "workers and demand"))
    return text


async def _day(
    name: str,
    running: contextlib.AbstractAsyncContextManager[tuple[Product, FleetWatch]],
    share_of_peak: Callable[[float], float],
    day_s: float,
    peak: float | None,
) -> tuple[RealDay, float]:
    """The day, and the requests per second at its peak: `peak`, or what is measured first."""
    async with running as (product, watch):
        warm = _load(product, seed=1)
        started = time.perf_counter()
        if peak is None:
            await warm.streams([ORDINARY_TOKENS] * CALIBRATION_STREAMS, CALIBRATION_S)
            tokens_per_s = warm.computed_per_s(started + CALIBRATION_S / 4, started + CALIBRATION_S)
            peak = PEAK_SHARE * tokens_per_s / (PROMPT_TOKENS + MAX_TOKENS)
        else:
            await warm.streams([ORDINARY_TOKENS], WARM_UP_S)
        await asyncio.sleep(SETTLE_S)
        load = _load(product, seed=2)
        begin = time.perf_counter()
        at_peak = peak
        await load.arrivals(
            ORDINARY_TOKENS, lambda second: at_peak * share_of_peak(second / day_s), day_s
        )
        end = begin + day_s
        fewest, most = watch.num_workers(begin, end)
        curve = [(at - begin, float(len(s.workers))) for at, s in watch.seen if begin <= at < end]
        day = RealDay(
            name=name,
            worker_seconds=watch.worker_seconds(begin, end),
            p99_answer_ms=load.p99_answer_ms(begin, end),
            fewest=fewest,
            most=most,
            num_requests=len(load.records),
            errors=[record.error for record in load.records if record.error is not None],
            curve=curve,
            parts_p99_ms=[
                load.p99_answer_ms(
                    begin + part * day_s / NUM_PARTS, begin + (part + 1) * day_s / NUM_PARTS
                )
                for part in range(NUM_PARTS)
            ],
        )
        return day, peak


def _load(product: Product, *, seed: int) -> StreamLoad:
    return StreamLoad(
        url=product.url, prompt_tokens=PROMPT_TOKENS, max_tokens=MAX_TOKENS, seed=seed
    )


@contextlib.asynccontextmanager
async def _running(
    quotas: CpuQuotas, model: Path, folder: Path, fleet: tuple[str, int, Sequence[str]]
) -> AsyncIterator[tuple[Product, FleetWatch]]:
    _, num_workers, arguments = fleet
    product = Product(
        folder,
        *("--no-ray", "--dtype", "bfloat16", "--workers", str(num_workers), *arguments),
        model=model,
        environment={"EXPERTFLEET_NUM_THREADS": "1"},
    )
    await asyncio.to_thread(product.start)
    store = RunningInstance.find(folder).run_folder / "store.sock"
    registry = RedisRegistry(f"unix://{store}", fleet="default")
    watch = FleetWatch(registry=registry, seen=[])
    tasks = [asyncio.create_task(watch.run()), asyncio.create_task(_limit(watch, quotas))]
    try:
        yield product, watch
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await registry.close()
        await asyncio.to_thread(product.stop)


async def _limit(watch: FleetWatch, quotas: CpuQuotas) -> None:
    """Until cancelled: hold workers to their share from when they serve on."""
    while True:
        for worker in watch.seen[-1][1].workers if watch.seen else ():
            if worker.state == "ready" and worker.pid not in quotas.pids:
                quotas.limit(worker.pid, WORKER_CORES)
        await asyncio.sleep(POLL_S)


def _report(days: Sequence[RealDay], peak: float, day_s: float) -> str:
    fixed, scaled, fewer = days
    lines = [
        "# A compressed day",
        "",
        f"{datetime.date.today()}, {describe_machine()}. `python -m benchmarks.autoscale_trace "
        f"--real`: a day of {day_s:.0f} s whose demand rises and falls by 1 : 0.4, at most "
        f"{peak:.1f} requests of {PROMPT_TOKENS} + {MAX_TOKENS} tokens a second; workers of one "
        f"thread, held to {WORKER_CORES} of a core.",
        "",
        "![workers and demand over the day](autoscale-trace.svg)",
        "",
        "| fleet | workers | worker-seconds | p99 of an answer, ms | requests | failed |",
        "|---|---|---|---|---|---|",
    ]
    for one in days:
        workers = f"{one.fewest} to {one.most}" if one.most > one.fewest else f"{one.most}"
        lines.append(
            f"| {one.name} | {workers} | {one.worker_seconds:.0f} | {one.p99_answer_ms:.0f} "
            f"| {one.num_requests} | {len(one.errors)} |"
        )
    saving = 1 - scaled.worker_seconds / fixed.worker_seconds
    lines += [
        "",
        f"Worker-seconds saved: {saving:.1%} of those of {fixed.name}, at "
        f"{_ratio(scaled, fixed):.2f} times its p99; {fewer.name}, has "
        f"{_ratio(fewer, fixed):.2f} times that p99.",
        "",
        f"p99 by parts of {day_s / NUM_PARTS:.0f} s, ms:",
        "",
        "| fleet | "
        + " | ".join(str(round(part * day_s / NUM_PARTS)) for part in range(NUM_PARTS))
        + " |",
        "|---" * (NUM_PARTS + 1) + "|",
    ]
    for one in days:
        lines.append(
            f"| {one.name} | " + " | ".join(f"{p99:.0f}" for p99 in one.parts_p99_ms) + " |"
        )
    return "\n".join(lines) + "\n"


def _ratio(day: RealDay, other: RealDay) -> float:
    return day.p99_answer_ms / other.p99_answer_ms if other.p99_answer_ms else float("nan")
