"""Rounds that alternate between sides on the same prompts, and what came out of them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from benchmarks.agreement import Agreement, check_agreement
from benchmarks.bound import Ceilings
from benchmarks.machine import ForeignLoad
from benchmarks.side_process import SideFailedError, SideProcess

_Value = TypeVar("_Value")

PREFILL_TOKENS = 512
IDLE_S = 1.0
IDLE_CORES = 0.01
"""A side that uses more than this share of a core while idle is stopped between jobs."""
CHECK_PROMPTS, CHECK_TOKENS = 16, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`num_prompts` prompts of `prompt_tokens`, each continued by `new_tokens`.

    Measured as a prefill (prompt tokens until the first answer), or as decoding (tokens while all
    are being decoded) and, when `with_total`, as served (new tokens until the last, with prefill).
    """

    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    with_total: bool = False

    @property
    def is_prefill(self) -> bool:
        return self.new_tokens == 1

    @property
    def label(self) -> str:
        if self.is_prefill:
            return f"prefill {self.prompt_tokens}"
        return f"decode {self.num_prompts}"

    def rates(self, result: dict[str, Any]) -> dict[str, float]:
        """Tokens per second by label."""
        if self.is_prefill:
            return {self.label: self.num_prompts * self.prompt_tokens / result["ttft_s"]}
        if not result["decode_s"]:
            raise SideFailedError(
                f"{self.label}: the first request ended before the last began; use more new tokens"
            )
        rates = {self.label: result["decode_tokens"] / result["decode_s"]}
        if self.with_total:
            served = self.num_prompts * self.new_tokens / result["total_s"]
            rates[f"serve {self.num_prompts}"] = served
        return rates


@dataclass(slots=True, kw_only=True)
class Samples:
    """Of one model: one value a round by label, then side. Sides that failed are in `failed`.

    `ceilings`, by label, are those of the moments at which the first side ran.
    """

    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    foreign: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    timings: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)
    ceilings: dict[str, list[Ceilings]] = field(default_factory=dict)
    agreement: dict[str, Agreement] = field(default_factory=dict)
    idle_cores: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds_a_round: float = 0.0

    def ratio(self, label: str, side: str, other: str) -> float | None:
        """Median over rounds of the two sides' ratio within one round; None without both."""
        ratios = self.ratios(label, side, other)
        return statistics.median(ratios) if ratios else None

    def ratios(self, label: str, side: str, other: str) -> list[float]:
        """One a round; none without both sides."""
        rates = self.rates.get(label, {})
        if side not in rates or other not in rates:
            return []
        pairs = zip(rates[side], rates[other], strict=True)
        return [mine / theirs for mine, theirs in pairs]

    def drop(self, side: str, reason: str) -> None:
        """Forget a side that failed, for its rounds have no partners any more."""
        self.failed[side] = reason
        for by_label in (self.rates, self.foreign, self.timings):
            for by_side in by_label.values():
                by_side.pop(side, None)

    def add(self, workload: Workload, side: str, result: dict[str, Any], foreign: float) -> None:
        for label, rate in workload.rates(result).items():
            self.rates.setdefault(label, {}).setdefault(side, []).append(rate)
        self.foreign.setdefault(workload.label, {}).setdefault(side, []).append(foreign)
        if "timings" in result:
            parts = self.timings.setdefault(workload.label, {}).setdefault(side, [])
            parts.append(result["timings"])


def pooled(groups: Sequence[Samples]) -> Samples:
    """The rounds of all groups, one after the other. A side that is in several groups has more of
    them than its peers, so ratios come from the groups, each by itself."""
    whole = Samples()
    for group in groups:
        _extend(whole.rates, group.rates)
        _extend(whole.foreign, group.foreign)
        _extend(whole.timings, group.timings)
        for label, ceilings in group.ceilings.items():
            whole.ceilings.setdefault(label, []).extend(ceilings)
        whole.agreement |= group.agreement
        whole.idle_cores |= group.idle_cores
        whole.failed |= group.failed
        whole.seconds_a_round += group.seconds_a_round
    return whole


def _extend(
    whole: dict[str, dict[str, list[_Value]]], group: dict[str, dict[str, list[_Value]]]
) -> None:
    for label, by_side in group.items():
        for side, values in by_side.items():
            whole.setdefault(label, {}).setdefault(side, []).extend(values)


def workloads(batches: Sequence[int], *, context: int, new_tokens: int) -> list[Workload]:
    """The prefill, then decoding at each batch; the largest is also measured with its prefill."""
    decoding = [
        Workload(
            num_prompts=batch,
            prompt_tokens=context,
            new_tokens=new_tokens,
            with_total=batch == max(batches),
        )
        for batch in batches
    ]
    return [Workload(num_prompts=1, prompt_tokens=PREFILL_TOKENS, new_tokens=1), *decoding]


@dataclass(slots=True, kw_only=True)
class Rounds:
    """`sides` are ready; one that fails is closed and left out, one of ours ends everything.

    Without a `probe` no ceilings are measured.
    """

    sides: list[SideProcess]
    probe: SideProcess | None
    workloads: Sequence[Workload]
    vocab_size: int
    say: Callable[[str], None]
    samples: Samples = field(default_factory=Samples)
    _generator: random.Random = field(default_factory=lambda: random.Random(20))

    def run(self, num_rounds: int) -> Samples:
        """Check that sides agree, warm each up by one round that does not count, measure."""
        self._measure_idle()
        self._check_agreement()
        for number in range(num_rounds + 1):
            started = time.monotonic()
            self._round(counts=number > 0)
            self.samples.seconds_a_round = time.monotonic() - started
            self.say(f"round {number} of {num_rounds}: {self.samples.seconds_a_round:.0f} s")
        return self.samples

    def _round(self, *, counts: bool) -> None:
        for workload in self.workloads:
            job = {
                "prompts": self._prompts(workload.num_prompts, workload.prompt_tokens),
                "max_tokens": workload.new_tokens,
            }
            before = self._measure_ceilings()
            for number, side in enumerate(list(self.sides)):
                # What idle sides use is foreign too.
                load = ForeignLoad([side.pid])
                result = self._run(side, job)
                if result is not None and counts:
                    self.samples.add(workload, side.name, result, load.stop())
                if number == 0 and counts and before is not None:
                    after = self._measure_ceilings()
                    assert after is not None
                    ceilings = self.samples.ceilings.setdefault(workload.label, [])
                    ceilings.append(before.mean(after))

    def _measure_ceilings(self) -> Ceilings | None:
        return None if self.probe is None else Ceilings(**self.probe.run({}))

    def _run(self, side: SideProcess, job: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return side.run(job)
        except SideFailedError as error:
            if side.spec.is_ours:
                raise
            self._leave_out(side, str(error))
            return None

    def _leave_out(self, side: SideProcess, reason: str) -> None:
        self.say(f"{side.name} is left out: {reason}")
        self.samples.drop(side.name, reason.splitlines()[0])
        self.sides.remove(side)
        side.close()

    def _measure_idle(self) -> None:
        before = {side.name: side.cpu_s() for side in self.sides}
        time.sleep(IDLE_S)
        for side in self.sides:
            cores = (side.cpu_s() - before[side.name]) / IDLE_S
            self.samples.idle_cores[side.name] = cores
            side.pauses = cores > IDLE_CORES

    def _check_agreement(self) -> None:
        """Prompts one by one: what shares a batch is for each side to choose, and may round."""
        jobs = [
            {"prompts": [prompt], "max_tokens": CHECK_TOKENS}
            for prompt in self._prompts(CHECK_PROMPTS, self.workloads[-1].prompt_tokens)
        ]
        answers: dict[str, list[list[int]]] = {}
        for side in list(self.sides):
            results = [self._run(side, job) for job in jobs if side in self.sides]
            if side in self.sides:
                answers[side.name] = [result["tokens"][0] for result in results if result]
                self.say(f"{side.name} has answered {CHECK_PROMPTS} prompts")
        specs = [side.spec for side in self.sides]
        self.samples.agreement = check_agreement(specs, answers)

    def _prompts(self, num_prompts: int, length: int) -> list[list[int]]:
        """Fresh each time, so that no side can answer from its prefix cache."""
        return [
            [self._generator.randrange(10, self.vocab_size) for _ in range(length)]
            for _ in range(num_prompts)
        ]
