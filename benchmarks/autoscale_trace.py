"""A compressed day of demand: worker-seconds with the autoscaler and without.

    python -m benchmarks.autoscale_trace            # a simulation, in seconds
    python -m benchmarks.autoscale_trace --real     # real processes, 20 minutes

The demand is at 0.4 of its peak for 14 hours, rises for 3, stays at the peak for 4 and falls for 3.
In the simulation, labelled as such, the policy is the real one; workers and their times are on
paper (`benchmarks/autoscale_simulation.py`) and the fixed deployment is the smallest whose p99 is
no worse. `--real` is benchmarks/autoscale_real.py and writes docs/performance/autoscale-trace.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.autoscale_real import run_real
from benchmarks.autoscale_simulation import (
    Costs,
    Demand,
    SimulatedAutoscaler,
    SimulatedFleet,
    even,
    scaled,
)
from benchmarks.termination import unwind_on_sigterm
from services.autoscaler.options import PolicyOptions

LAYERS, EXPERTS = 8, 8
PEAK_STEPS_PER_S = 350.0
ROWS_PER_STEP = 64.0
LOW = 0.4
SLOTS = [(layer, expert) for expert in range(EXPERTS) for layer in range(LAYERS)]
MAX_WORKERS = 16
OUT = Path(__file__).parents[1] / "docs" / "performance"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`p99_ms` is over ticks of the slowest worker's mean time for a frame, waiting included."""

    name: str
    worker_seconds: float
    p99_ms: float
    fewest: int
    most: int


def day(period_s: float) -> Callable[[float], Demand]:
    peak = even(
        num_layers=LAYERS, num_experts=EXPERTS, rows=ROWS_PER_STEP, steps_per_s=PEAK_STEPS_PER_S
    )
    return lambda now: scaled(peak, share_of_peak(now / period_s))


def share_of_peak(days: float) -> float:
    """Demand at a time of the day: LOW for 14 of 24 hours, 3 hours of rise, 4 hours at the peak and
    3 hours of fall; 57.5 % of the peak on average."""
    hour = 24 * (days % 1)
    if hour < 14:
        return LOW
    if hour < 17:
        return LOW + (1 - LOW) * (hour - 14) / 3
    if hour < 21:
        return 1.0
    return 1.0 - (1 - LOW) * (hour - 21) / 3


def fixed(num_workers: int, *, period_s: float, num_days: int) -> Outcome:
    fleet = _fleet(num_workers)
    return _run(f"fixed, {num_workers} workers", fleet, None, period_s, num_days)


def autoscaled(
    *, period_s: float, num_days: int, start_workers: int, options: PolicyOptions
) -> Outcome:
    fleet = _fleet(start_workers)
    return _run("autoscaled", fleet, SimulatedAutoscaler(fleet, options), period_s, num_days)


def compare(*, period_s: float = 1200.0, num_days: int = 1) -> tuple[Outcome, Outcome]:
    """The autoscaled fleet, and the smallest fixed one whose p99 is no worse."""
    options = PolicyOptions(
        min_workers=4,
        max_workers=MAX_WORKERS,
        max_replicas=MAX_WORKERS,
        idle_after_s=10,
        scale_cool_down_s=10,
    )
    scaled_outcome = autoscaled(
        period_s=period_s, num_days=num_days, start_workers=4, options=options
    )
    for num_workers in range(6, MAX_WORKERS + 1):
        outcome = fixed(num_workers, period_s=period_s, num_days=num_days)
        if outcome.p99_ms <= scaled_outcome.p99_ms:
            return scaled_outcome, outcome
    raise RuntimeError("no fixed fleet meets the autoscaled one's p99")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A compressed day of demand.")
    parser.add_argument("--period-s", type=float, help="one compressed day; 1200, real 360")
    parser.add_argument("--days", type=int, default=1, help="of the simulation")
    parser.add_argument("--real", action="store_true", help="real processes on this machine")
    parser.add_argument("--max-workers", type=int, default=4, help="of the real fleets")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the real run's report")
    given = parser.parse_args(arguments)
    unwind_on_sigterm()
    if given.real:
        # It begins at noon, so that rise, peak and fall lie in one day.
        text = run_real(
            lambda days: share_of_peak(days + 0.5),
            day_s=given.period_s or 360.0,
            max_workers=given.max_workers,
            out=given.out,
        )
        print(text)
        return
    period_s = given.period_s or 1200.0
    scaled_outcome, fixed_outcome = compare(period_s=period_s, num_days=given.days)
    print(f"Simulation (no process was measured): demand 1 : {LOW}, period {period_s:.0f} s")
    print("| fleet | workers | worker-seconds | p99 of the slowest worker's frame, ms |")
    print("|---|---|---|---|")
    for one in (fixed_outcome, scaled_outcome):
        workers = f"{one.fewest} to {one.most}" if one.most > one.fewest else f"{one.most}"
        print(f"| {one.name} | {workers} | {one.worker_seconds:.0f} | {one.p99_ms:.2f} |")
    saving = 1 - scaled_outcome.worker_seconds / fixed_outcome.worker_seconds
    print(f"\nworker-seconds saved: {saving:.1%}")


def _fleet(num_workers: int) -> SimulatedFleet:
    fleet = SimulatedFleet(Costs(start_s=5.0), tick_s=0.5)
    for index in range(num_workers):
        slots = {slot for position, slot in enumerate(SLOTS) if position % num_workers == index}
        fleet.add(f"w{index}", slots, capacity=len(SLOTS))
    return fleet


def _run(
    name: str,
    fleet: SimulatedFleet,
    autoscaler: SimulatedAutoscaler | None,
    period_s: float,
    num_days: int,
) -> Outcome:
    demand = day(period_s)
    times: list[float] = []
    counts: list[int] = []
    while fleet.now < period_s * num_days:
        now_demand = demand(fleet.now)
        fleet.tick(now_demand)
        if autoscaler is not None:
            autoscaler.step()
        times.append(_slowest_frame_ms(fleet, now_demand))
        counts.append(len(fleet.workers))
    times.sort()
    return Outcome(
        name=name,
        worker_seconds=fleet.worker_seconds,
        p99_ms=times[int(0.99 * len(times))],
        fewest=min(counts),
        most=max(counts),
    )


def _slowest_frame_ms(fleet: SimulatedFleet, demand: Demand) -> float:
    """Mean service and waiting of an M/D/1 queue at the busiest worker: s (1 + u / (2 (1 - u)));
    past 99 % busy, the time at 99 %."""
    slowest = 0.0
    for worker in fleet.workers.values():
        num_layers = len({layer for layer, _ in worker.slots}) or 1
        service_s = worker.offered / (demand.steps_per_s * num_layers)
        busy = min(0.99, worker.offered)
        slowest = max(slowest, service_s * (1 + busy / (2 * (1 - busy))))
    return slowest * 1000


if __name__ == "__main__":
    main()
