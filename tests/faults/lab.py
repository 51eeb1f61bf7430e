"""Runs one fault under load and says what was seen."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from benchmarks.machine import ForeignLoad
from services.core import telemetry
from tests.faults.fault import Fault, Trial
from tests.faults.scene import Scene
from tests.faults.verdict import Marks, Verdict, judge
from tests.support.load import Answers, Script, SteadyLoad, ask_all

NUM_STREAMS = 32
NUM_ASKED_ALONE = 4
WIND_DOWN_TIMEOUT_S = 120.0
VOCAB_SIZE = 2048

COUNTED = {
    "retries": telemetry.METRIC_DISPATCH_RETRIES,
    "hedges": telemetry.METRIC_DISPATCH_HEDGES,
    "ejections": telemetry.METRIC_DISPATCH_EJECTIONS,
    "resubmissions": telemetry.METRIC_RESUBMISSIONS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds of load before the fault (at least), and after it was undone."""

    before_s: float = 7.0
    after_s: float = 3.0
    max_hold_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`counts` are what the metrics of all processes alive gained. `whole_s`: from the end of the
    load until every process was back; None: not in time. `foreign_share` is that of the machine's
    cores that others used in the time before the fault: figures are worth little where it is high.
    """

    fault: Fault
    seed: int
    verdict: Verdict
    marks: Marks
    counts: dict[str, int]
    whole_s: float | None
    foreign_share: float
    problems: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def is_survived(self) -> bool:
        """Nothing lost, nothing wrong, and recovered by itself."""
        return self.verdict.is_right and self.whole_s is not None and not self.problems

    @property
    def missed_bounds(self) -> tuple[str, ...]:
        fault, verdict = self.fault, self.verdict
        missed = []
        if fault.max_gap_s is not None and verdict.longest_gap_s > fault.max_gap_s:
            missed.append(f"longest gap {verdict.longest_gap_s:.2f} s > {fault.max_gap_s} s")
        if fault.min_throughput is not None and verdict.throughput_ratio < fault.min_throughput:
            missed.append(f"throughput {verdict.throughput_ratio:.2f} < {fault.min_throughput}")
        return tuple(missed)

    def explain(self) -> str:
        verdict = self.verdict
        return (
            f"{self.fault.name} (seed {self.seed}): {verdict.num_requests} requests, "
            f"{verdict.num_failed} failed {verdict.errors}, {verdict.num_refused} refused, "
            f"{verdict.num_wrong_tokens} wrong and {verdict.num_lost_tokens} lost tokens; "
            f"longest gap {verdict.longest_gap_s * 1e3:.0f} ms "
            f"(before {verdict.longest_gap_before_s * 1e3:.0f}), first token within "
            f"{verdict.longest_first_token_s * 1e3:.0f} ms; "
            f"{verdict.tokens_per_s_before:.0f} -> {verdict.tokens_per_s_during:.0f} tokens/s "
            f"({verdict.throughput_ratio:.2f}); recovered {_seconds(verdict.recovery_s)}, "
            f"whole {_seconds(self.whole_s)}; {self.counts}; foreign CPU "
            f"{self.foreign_share:.0%}; "
            f"problems {list(self.problems)}; {list(self.remarks)}"
            + "".join(f"; {wrong}" for wrong in verdict.wrong_answers[:20])
        )


async def learn_answers(
    scene: Scene, scripts: Sequence[Script]
) -> dict[tuple[int, int], tuple[int, ...]]:
    """The right answers, from the healthy product; some are asked for alone to compare."""
    answers = await ask_all(scene.url, scripts, num_streams=NUM_STREAMS)
    alone = await ask_all(scene.url, scripts[-NUM_ASKED_ALONE:], num_streams=1)
    differing = [key for key, answer in alone.items() if answers[key] != answer]
    assert not differing, f"not reproducible without any fault: {differing}"
    return answers


async def run_fault(
    scene: Scene,
    fault: Fault,
    scripts: Sequence[Script],
    answers: Answers,
    *,
    seed: int,
    pace: Pace,
    num_streams: int = NUM_STREAMS,
) -> Outcome:
    """The scene is whole before; whether it is afterwards is in the outcome."""
    trial = Trial(scene=scene, random=random.Random(f"{seed}-{fault.name}"))
    if fault.needs_no_replica:
        await asyncio.to_thread(scene.retire_replicas)
    before = await asyncio.to_thread(_read_counts, scene)
    load = SteadyLoad(
        url=scene.url,
        scripts=scripts,
        num_streams=num_streams,
        seed=seed,
        retries_refused=fault.is_refusal_right,
        name=fault.name,
    )
    foreign = ForeignLoad([os.getpid()])
    running = asyncio.create_task(load.run())
    started_at = time.perf_counter()
    try:
        await asyncio.sleep(pace.before_s + trial.random.uniform(0.0, 1.0))
        foreign_share = foreign.stop()
        injected_at = time.perf_counter()
        harm = fault.inject(trial)
        await _noting(trial, harm.__enter__)
        await asyncio.sleep(min(fault.hold_s, pace.max_hold_s))
        undone_at = time.perf_counter()
        await _noting(trial, lambda: harm.__exit__(None, None, None))
        await asyncio.sleep(pace.after_s)
    finally:
        stopped_at = time.perf_counter()
        load.stop()
        await _see_through(running, trial)
    whole_s = await asyncio.to_thread(_wait_whole, scene, trial, f"after-{fault.name}-{seed}")
    after = await asyncio.to_thread(_read_counts, scene)
    marks = Marks(
        started_at=started_at,
        injected_at=injected_at,
        undone_at=undone_at,
        stopped_at=stopped_at,
    )
    return Outcome(
        fault=fault,
        seed=seed,
        verdict=judge(load.exchanges, answers, marks),
        marks=marks,
        counts=_gains(before, after),
        whole_s=whole_s,
        foreign_share=foreign_share,
        problems=tuple(trial.problems),
        remarks=tuple(trial.remarks),
    )


async def _noting(trial: Trial, step: Callable[[], object]) -> None:
    """A fault that cannot be done or undone is a problem of this run, and does not end the lab."""
    try:
        await asyncio.to_thread(step)
    except Exception as error:  # noqa: BLE001 - the boundary of the harm: told in the report
        trial.problems.append(f"{type(error).__name__}: {error}")


async def _see_through(running: asyncio.Task[None], trial: Trial) -> None:
    try:
        await asyncio.wait_for(running, WIND_DOWN_TIMEOUT_S)
    except TimeoutError:
        trial.problems.append(f"requests without an end {WIND_DOWN_TIMEOUT_S:.0f} s after the load")


def _wait_whole(scene: Scene, trial: Trial, session_id: str) -> float | None:
    try:
        whole_s = scene.wait_whole()
        scene.wait_session_stored(session_id)
        return whole_s
    except AssertionError as error:
        trial.problems.append(str(error))
        return None


def _read_counts(scene: Scene) -> dict[tuple[str, str], float]:
    """Value by count and endpoint, of every endpoint that answers."""
    try:
        endpoints = [each["metrics_endpoint"] for each in scene.shards()]
    except httpx.HTTPError:
        endpoints = []
    found = {}
    for endpoint in [*filter(None, endpoints), f"127.0.0.1:{scene.product.port}"]:
        for name, metric in COUNTED.items():
            try:
                found[name, endpoint] = scene.product.metric(endpoint, metric)
            except httpx.HTTPError:
                continue
    return found


def _gains(
    before: dict[tuple[str, str], float], after: dict[tuple[str, str], float]
) -> dict[str, int]:
    gains = dict.fromkeys(COUNTED, 0)
    for (name, endpoint), value in after.items():
        earlier = before.get((name, endpoint), 0.0)
        # A process that was restarted at the same address counts from zero again.
        gains[name] += round(value - earlier if value >= earlier else value)
    return gains


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"after {value:.1f} s"
