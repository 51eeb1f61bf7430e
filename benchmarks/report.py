"""The Markdown and the JSON of a run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from benchmarks.bound import Ceilings, decode_bound, prefill_bound
from benchmarks.rounds import Samples, Workload, pooled
from benchmarks.targets import BOUND, ELSEWHERE, TARGETS, verdict
from services.core.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """One model's samples, by group of sides that were loaded together, with `num_rounds` each.

    `skipped` are sides that were asked for and did not start: reasons.
    """

    name: str
    config: ModelConfig
    workloads: Sequence[Workload]
    num_rounds: int
    groups: Sequence[Samples]
    versions: Mapping[str, Mapping[str, str]]
    skipped: Mapping[str, str]

    @cached_property
    def samples(self) -> Samples:
        """Of all groups."""
        return pooled(self.groups)

    @property
    def labels(self) -> list[str]:
        return list(self.samples.rates)

    @property
    def sides(self) -> list[str]:
        """Those with figures, in the order in which they ran."""
        return list(next(iter(self.samples.rates.values())))

    def bounds(self) -> dict[str, float]:
        """Tokens per second by label that the machine's ceilings allow in bfloat16, as median."""
        bounds = self._bounds(self.samples)
        return {label: statistics.median(each) for label, each in bounds.items()}

    def ratio(self, label: str, side: str, other: str) -> float | None:
        """Of two sides, or of a side and the bound, as median of the rounds' ratios."""
        ratios = [
            ratio for group in self.groups for ratio in self._ratios(group, label, side, other)
        ]
        return statistics.median(ratios) if ratios else None

    def _ratios(self, group: Samples, label: str, side: str, other: str) -> list[float]:
        if other != BOUND:
            return group.ratios(label, side, other)
        rates = group.rates.get(label, {}).get(side)
        bounds = self._bounds(group).get(label)
        if not rates or not bounds:
            return []
        return [rate / bound for rate, bound in zip(rates, bounds, strict=True)]

    def _bounds(self, samples: Samples) -> dict[str, list[float]]:
        """Of each round."""
        return {
            workload.label: [self._bound(workload, ceilings) for ceilings in each]
            for workload in self.workloads
            if (each := samples.ceilings.get(workload.label))
        }

    def _bound(self, workload: Workload, ceilings: Ceilings) -> float:
        if workload.is_prefill:
            return prefill_bound(self.config, ceilings, num_tokens=workload.prompt_tokens)
        context = workload.prompt_tokens + workload.new_tokens // 2
        return decode_bound(self.config, ceilings, batch=workload.num_prompts, context=context)

    def splits(self) -> dict[str, dict[str, dict[str, float]]]:
        """Milliseconds of a step by part, medians over rounds, by label, then side."""
        return {
            label: {side: _medians(rounds) for side, rounds in by_side.items() if rounds}
            for label, by_side in self.samples.timings.items()
        }


def markdown(machine: str, date: str, command: str, models: Sequence[ModelReport]) -> str:
    parts = [f"Measured {date} on {machine}, by `{command}`.", _versions(models)]
    for model in models:
        parts += [_heading(model), _rates_table(model), _targets_table(model)]
        parts += [_agreement(model), _split_table(model), _skipped(model)]
    parts.append("![throughput over batch, and the time of a step](bench.svg)")
    parts.append(_elsewhere())
    return "\n\n".join(part for part in parts if part) + "\n"


def figures(machine: str, date: str, models: Sequence[ModelReport]) -> dict[str, Any]:
    """Everything measured, for other programs."""
    return {
        "machine": machine,
        "date": date,
        "models": {model.name: _figures(model) for model in models},
    }


def _figures(model: ModelReport) -> dict[str, Any]:
    samples = model.samples
    return {
        "rounds": model.num_rounds,
        "groups": [list(next(iter(group.rates.values()))) for group in model.groups],
        "seconds_a_round": samples.seconds_a_round,
        "tokens_per_s": samples.rates,
        "foreign_cpu": samples.foreign,
        "timings_ms": samples.timings,
        "ceilings": {
            label: [asdict(ceilings) for ceilings in each]
            for label, each in samples.ceilings.items()
        },
        "bound_tokens_per_s": model.bounds(),
        "ratios": [
            {
                "ratio": target.text,
                "measured": {
                    label: model.ratio(label, target.side, target.other) for label in model.labels
                },
                "wanted": dict(target.wanted),
            }
            for target in TARGETS
        ],
        "agreement": {side: asdict(each) for side, each in samples.agreement.items()},
        "idle_cores": samples.idle_cores,
        "versions": {side: dict(versions) for side, versions in model.versions.items()},
        "skipped": dict(model.skipped) | samples.failed,
    }


def _versions(models: Sequence[ModelReport]) -> str:
    """What the peers report of themselves; ours are in the machine's line."""
    found = {
        f"{side}: " + ", ".join(f"{name} {version}" for name, version in versions.items())
        for model in models
        for side, versions in model.versions.items()
        if versions
    }
    return "Peers' versions: " + "; ".join(sorted(found)) + "." if found else ""


def _heading(model: ModelReport) -> str:
    ceilings = [each for rounds in model.samples.ceilings.values() for each in rounds]
    reads = [each.read_bytes_per_s / 1e9 for each in ceilings]
    operations = [each.flop_per_s / 1e12 for each in ceilings]
    last = model.workloads[-1]
    return (
        f"## {model.name}\n\n"
        f"bf16 unless a side's name says otherwise; prompts of {last.prompt_tokens} tokens and "
        f"{last.new_tokens} new ones; {model.num_rounds} rounds of each of {len(model.groups)} "
        "groups of sides that are loaded together and take turns, in all "
        f"{model.samples.seconds_a_round:.0f} s a round; tokens/s as median (lowest to highest) of "
        "all groups, ratios within a round of one group. Ceilings, "
        f"measured before and after each job of a group's first side: {min(reads):.1f} to "
        f"{max(reads):.1f} GB/s read, {min(operations):.2f} to {max(operations):.2f} TFLOP/s in "
        "bf16; the bound follows from those of the same moment, by the "
        "formula in `benchmarks/bound.py`."
    )


def _rates_table(model: ModelReport) -> str:
    rows = [["", *model.labels, "foreign CPU"]]
    for side in model.sides:
        cells = [_cell(model.samples.rates[label].get(side, [])) for label in model.labels]
        rows.append([side, *cells, _foreign(model, side)])
    bounds = model.bounds()
    cells = [f"{bounds[label]:.0f}" if label in bounds else "" for label in model.labels]
    return _table([*rows, ["*bound*", *cells, ""]])


def _targets_table(model: ModelReport) -> str:
    rows = [["ratio", *model.labels]]
    for target in TARGETS:
        ratios = [model.ratio(label, target.side, target.other) for label in model.labels]
        cells = [
            verdict(ratio, target.wanted.get(label))
            for label, ratio in zip(model.labels, ratios, strict=True)
        ]
        rows.append([target.text, *cells])
    return _table(rows)


def _agreement(model: ModelReport) -> str:
    """One line: how far each side's greedy tokens go with ours."""
    parts = [
        f"{side} {each.first_share:.0%} / {each.prefix_share:.0%}"
        for side, each in model.samples.agreement.items()
        if side in model.sides
    ]
    return (
        "Greedy tokens beside ours in process, share of equal first tokens / share of tokens "
        f"before the first that differs: {', '.join(parts)}."
    )


def _split_table(model: ModelReport) -> str:
    splits = model.splits()
    names = list(
        dict.fromkeys(name for by in splits.values() for each in by.values() for name in each)
    )
    if not names:
        return ""
    rows = [["ms of a step", "side", *names, "together"]]
    for label, by_side in splits.items():
        for side, parts in by_side.items():
            cells = [f"{parts.get(name, 0.0):.2f}" for name in names]
            rows.append([label, side, *cells, f"{sum(parts.values()):.2f}"])
    return _table(rows)


def _skipped(model: ModelReport) -> str:
    reasons = dict(model.skipped) | model.samples.failed
    return "\n".join(f"- not measured: {side}: {reason}" for side, reason in reasons.items())


def _elsewhere() -> str:
    rows = [["other ratios that are aimed at", "printed by"]]
    return _table([*rows, *([text, f"`{command}`"] for text, command in ELSEWHERE)])


def _foreign(model: ModelReport, side: str) -> str:
    shares = [
        share for by_side in model.samples.foreign.values() for share in by_side.get(side, [])
    ]
    return f"{statistics.median(shares):.0%} ({max(shares):.0%})"


def _cell(rates: Sequence[float]) -> str:
    if not rates:
        return ""
    digits = 0 if statistics.median(rates) >= 100 else 1
    low, high = f"{min(rates):.{digits}f}", f"{max(rates):.{digits}f}"
    return f"{statistics.median(rates):.{digits}f} ({low} to {high})"


def _medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
