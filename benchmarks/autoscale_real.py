"""A compressed day of demand on real processes: worker-seconds with the autoscaler and without.

The product serves a random checkpoint in which the experts are most of the work, first as
`up --workers 1 --autoscale --max-workers N`, then as `up --workers N`, under the same requests at
the same times. Peak demand is a share of what one worker was seen to take. Worker-seconds are those
of the workers' leases.

What can be shown on one machine is workers that need not be held, not throughput beyond its cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fleet_watch import FleetWatch, StreamLoad
from benchmarks.hot_checkpoint import ORDINARY_TOKENS, write_hot_checkpoint
from benchmarks.machine import describe_machine
from benchmarks.time_plot import Series, draw_over_time
from services.cli.state_folder import RunningInstance
from services.core.redis_registry import RedisRegistry
from tests.support.eventually import eventually
from tests.support.product import Product

PROMPT_TOKENS = 240
MAX_TOKENS = 4
"""Mostly prompts, whose work grows with their tokens. A step that only decodes takes a worker as
long for one row as for eight, so that with few requests it is as busy as with many."""
CALIBRATION_STREAMS = 8
CALIBRATION_S = 8.0
PEAK_SHARE = 0.9
"""Of what one worker takes: more than it can be trusted with, less than brings a backlog."""
IDLE_AFTER_S = 5.0
SETTLE_S = 15.0
"""Longer than from the load that asks for a worker until that has a lease."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RealDay:
    """`curve` has (second of the day, workers)."""

    name: str
    worker_seconds: float
    p99_answer_ms: float
    fewest: int
    most: int
    num_requests: int
    num_failed: int
    curve: Sequence[tuple[float, float]]


def run_real(
    share_of_peak: Callable[[float], float], *, day_s: float, max_workers: int, out: Path
) -> str:
    """Run both fleets through one day, `share_of_peak` given in days; writes the report to `out`
    and returns it."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_hot_checkpoint(folder / "model")
        scaling = ["--autoscale", "--max-workers", str(max_workers)]
        scaling += ["--idle-after-s", str(IDLE_AFTER_S)]
        scaled_day, peak = asyncio.run(
            _day("autoscaled", model, folder / "scaled", 1, scaling, share_of_peak, day_s, None)
        )
        fixed_day, _ = asyncio.run(
            _day(
                f"fixed, {max_workers}",
                model,
                folder / "fixed",
                max_workers,
                [],
                share_of_peak,
                day_s,
                peak,
            )
        )
    text = _report(fixed_day, scaled_day, peak, day_s)
    (out / "autoscale-trace.md").write_text(text)
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
    model: Path,
    folder: Path,
    num_workers: int,
    arguments: Sequence[str],
    share_of_peak: Callable[[float], float],
    day_s: float,
    peak: float | None,
) -> tuple[RealDay, float]:
    """The day, begun with `num_workers`, and the requests per second at its peak: `peak`, or what
    is measured first."""
    arguments = ["--workers", str(num_workers), *arguments]
    async with _running(model, folder, arguments) as (product, watch):
        if peak is None:
            warm = _load(product)
            started = time.perf_counter()
            await warm.streams([ORDINARY_TOKENS] * CALIBRATION_STREAMS, CALIBRATION_S)
            first = started + CALIBRATION_S / 4
            alone = await _alone_until(watch, started, started + CALIBRATION_S)
            tokens_per_s = warm.computed_per_s(first, max(first + 1, alone))
            peak = PEAK_SHARE * tokens_per_s / (PROMPT_TOKENS + MAX_TOKENS)
        await _until_few(watch, num_workers)
        load = _load(product)
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
            num_failed=load.num_failed,
            curve=curve,
        )
        return day, peak


def _load(product: Product) -> StreamLoad:
    return StreamLoad(url=product.url, prompt_tokens=PROMPT_TOKENS, max_tokens=MAX_TOKENS)


async def _alone_until(watch: FleetWatch, begin: float, end: float) -> float:
    """Until when one worker did it all."""
    return next((at for at, s in watch.seen if begin <= at < end and len(s.workers) > 1), end)


async def _until_few(watch: FleetWatch, num_workers: int, timeout_s: float = 90.0) -> None:
    """Workers started for the calibration are waited out, also those that are still to come: the
    day begins with the fewest."""
    settled_at = time.perf_counter() + SETTLE_S

    def is_settled() -> bool:
        now = time.perf_counter()
        recent = [len(snapshot.workers) for at, snapshot in watch.seen if at > now - SETTLE_S]
        return now > settled_at and set(recent) == {num_workers}

    with contextlib.suppress(TimeoutError):
        await eventually(is_settled, timeout_s=timeout_s)


@contextlib.asynccontextmanager
async def _running(
    model: Path, folder: Path, arguments: Sequence[str]
) -> AsyncIterator[tuple[Product, FleetWatch]]:
    product = Product(
        folder,
        *("--no-ray", "--dtype", "bfloat16", *arguments),
        model=model,
        environment={"EXPERTFLEET_NUM_THREADS": "1"},
    )
    await asyncio.to_thread(product.start)
    store = RunningInstance.find(folder).run_folder / "store.sock"
    registry = RedisRegistry(f"unix://{store}", fleet="default")
    watch = FleetWatch(registry=registry, seen=[])
    watching = asyncio.create_task(watch.run())
    try:
        yield product, watch
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await registry.close()
        await asyncio.to_thread(product.stop)


def _report(fixed: RealDay, scaled: RealDay, peak: float, day_s: float) -> str:
    lines = [
        "# A compressed day",
        "",
        f"{datetime.date.today()}, {describe_machine()}. `python -m benchmarks.autoscale_trace "
        f"--real`: a day of {day_s:.0f} s whose demand rises and falls by 1 : 0.4, at most "
        f"{peak:.1f} requests of {PROMPT_TOKENS} + {MAX_TOKENS} tokens a second; workers of one "
        "thread.",
        "",
        "![workers and demand over the day](autoscale-trace.svg)",
        "",
        "| fleet | workers | worker-seconds | p99 of an answer, ms | requests | failed |",
        "|---|---|---|---|---|---|",
    ]
    for one in (fixed, scaled):
        workers = f"{one.fewest} to {one.most}" if one.most > one.fewest else f"{one.most}"
        lines.append(
            f"| {one.name} | {workers} | {one.worker_seconds:.0f} | {one.p99_answer_ms:.0f} "
            f"| {one.num_requests} | {one.num_failed} |"
        )
    saving = 1 - scaled.worker_seconds / fixed.worker_seconds
    ratio = scaled.p99_answer_ms / fixed.p99_answer_ms if fixed.p99_answer_ms else float("nan")
    lines += [
        "",
        f"Worker-seconds saved: {saving:.1%}, at {ratio:.2f} times the fixed fleet's p99.",
    ]
    return "\n".join(lines) + "\n"
