"""The reliability table with its figures, and throughput over time with the fault marked."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import describe_machine
from benchmarks.svg import Drawing, colour
from tests.faults.lab import NUM_STREAMS, Outcome
from tests.faults.verdict import BIN_S

COLUMNS = 3
WIDTH, HEIGHT = 300.0, 120.0
MARGIN, HEADER = 50.0, 56.0
_HEAD = (
    "| fault | requests | failed | wrong or lost tokens | longest gap, ms (before) "
    "| tokens/s before | during/before | recovered after, s | resent | resubmitted "
    "| foreign CPU | seen |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def write_report(outcomes: Sequence[Outcome], seed: int, folder: Path | None) -> str:
    """The Markdown; with a folder also written there, beside the plot and the figures."""
    text = markdown(outcomes, seed)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "faults.md").write_text(text)
        (folder / "faults.svg").write_text(plot(outcomes))
        (folder / "faults.json").write_text(json.dumps([_figures(o) for o in outcomes], indent=1))
    return text


def markdown(outcomes: Sequence[Outcome], seed: int) -> str:
    lines = [_row(outcome) for outcome in outcomes]
    notes = [
        f"- {outcome.fault.name}: {'; '.join(told)}"
        for outcome in outcomes
        if (told := _told(outcome))
    ]
    whats = [f"- {outcome.fault.name}: {outcome.fault.what}." for outcome in outcomes]
    return (
        "# Faults under load\n\n"
        f'`make faults ARGS="--seed {seed}"`, {time.strftime("%Y-%m-%d")}. {describe_machine()}. '
        f"Demo model in bf16, {NUM_STREAMS} streams, two workers and a replica of each behind a "
        "proxy, two attention shards; every answer compared token by token with that of the "
        "undisturbed product. Bold figures miss their bound. Resent are dispatch frames, counted "
        "by the shards that were alive at the end; resubmitted are requests. "
        "Foreign CPU is what other processes used of the cores before the fault.\n\n"
        + _HEAD
        + "".join(lines)
        + "\n![throughput over time](faults.svg)\n\n"
        + "\n".join(whats)
        + "\n"
        + ("\nSeen besides:\n\n" + "\n".join(notes) + "\n" if notes else "")
    )


def _row(outcome: Outcome) -> str:
    fault, verdict = outcome.fault, outcome.verdict
    wrong = verdict.num_wrong_tokens + verdict.num_lost_tokens
    gap = f"{verdict.longest_gap_s * 1e3:.0f}"
    if fault.max_gap_s is not None and verdict.longest_gap_s > fault.max_gap_s:
        gap = f"**{gap}**"
    ratio = f"{verdict.throughput_ratio:.2f}"
    if fault.min_throughput is not None and verdict.throughput_ratio < fault.min_throughput:
        ratio = f"**{ratio}**"
    recovered = "never" if verdict.recovery_s is None else f"{verdict.recovery_s:.1f}"
    seen = "survived" if outcome.is_survived else "**not survived**"
    cells = (
        *(fault.name, verdict.num_requests, verdict.num_failed, wrong),
        *(f"{gap} ({verdict.longest_gap_before_s * 1e3:.0f})",),
        *(f"{verdict.tokens_per_s_before:.0f}", ratio, recovered),
        *(outcome.counts["retries"] + outcome.counts["hedges"],),
        *(outcome.counts["resubmissions"], f"{outcome.foreign_share:.0%}", seen),
    )
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _told(outcome: Outcome) -> list[str]:
    told = [f"{count} x {error}" for error, count in outcome.verdict.errors.items()]
    if outcome.verdict.num_refused:
        told.append(f"requests were refused {outcome.verdict.num_refused} times and came again")
    return [*told, *outcome.problems, *outcome.remarks]


def _figures(outcome: Outcome) -> dict[str, object]:
    return {
        "fault": outcome.fault.name,
        "seed": outcome.seed,
        "marks": dataclasses.asdict(outcome.marks),
        "verdict": dataclasses.asdict(outcome.verdict),
        "counts": outcome.counts,
        "whole_s": outcome.whole_s,
        "foreign_share": outcome.foreign_share,
        "problems": outcome.problems,
        "remarks": outcome.remarks,
        "is_survived": outcome.is_survived,
    }


def plot(outcomes: Sequence[Outcome]) -> str:
    """An SVG with one chart for each fault; its duration is shaded."""
    num_rows = -(-len(outcomes) // COLUMNS)
    cell_width, cell_height = WIDTH + MARGIN + 16, HEIGHT + HEADER
    drawing = Drawing(width=COLUMNS * cell_width, height=max(1, num_rows) * cell_height)
    for index, outcome in enumerate(outcomes):
        row, column = divmod(index, COLUMNS)
        _chart(drawing, column * cell_width + MARGIN, row * cell_height + 30, outcome)
    return drawing.text()


def _chart(drawing: Drawing, left: float, top: float, outcome: Outcome) -> None:
    marks, values = outcome.marks, outcome.verdict.throughput
    duration_s = max(marks.stopped_at - marks.started_at, BIN_S)
    highest = max(max(values, default=0.0), 1.0)
    bottom = top + HEIGHT

    def across(at: float) -> float:
        return left + WIDTH * min(1.0, (at - marks.started_at) / duration_s)

    def up(rate: float) -> float:
        return bottom - HEIGHT * rate / highest

    from_x, to_x = across(marks.injected_at), across(marks.undone_at)
    title = f"{outcome.fault.name}: fault"
    drawing.box((from_x, top), to_x - from_x, HEIGHT, "#fde0dd", title)
    drawing.label((left, top - 10), f"{outcome.fault.name}, tokens/s over seconds", bold=True)
    drawing.line([(left, top), (left, bottom), (left + WIDTH, bottom)], "#555555")
    for share in (0.5, 1.0):
        at = (left, up(highest * share))
        drawing.line([at, (left + WIDTH, at[1])], "#e5e5e5")
        drawing.label((left - 4, at[1] + 4), f"{highest * share:.0f}", anchor="end")
    for second in range(0, int(duration_s) + 1, 5):
        x = left + WIDTH * second / duration_s
        drawing.label((x, bottom + 13), str(second), anchor="middle")
    drawing.line([(from_x, top), (from_x, bottom)], colour(1), width=2)
    points = [
        (left + WIDTH * (index + 0.5) * BIN_S / duration_s, up(value))
        for index, value in enumerate(values)
    ]
    drawing.line(points, colour(0), width=1.5)
