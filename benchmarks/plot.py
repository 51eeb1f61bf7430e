"""The plot of a run: throughput over batch, and where the time of a step goes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report import ModelReport
from benchmarks.sides import is_ours
from benchmarks.svg import Drawing, LogAxis, colour

CHART_WIDTH, CHART_HEIGHT = 340.0, 300.0
LEGEND_WIDTH, LEGEND_PITCH = 150.0, 16.0
NAMES_WIDTH, MS_WIDTH = 190.0, 40.0
BAR_PITCH, BAR_HEIGHT = 15.0, 11.0
MARGIN = 50.0
HEADER, FOOTER = 40.0, 30.0
GREY, LIGHT = "#555555", "#e5e5e5"
THICK, THIN = 3.0, 1.5
"""Lines of ours, and of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Tokens per second by batch."""

    name: str
    points: Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Milliseconds of a step by part."""

    label: str
    parts: Mapping[str, float]

    @property
    def whole(self) -> float:
        return sum(self.parts.values())


def plot(models: Sequence[ModelReport]) -> str:
    """An SVG with a row for each model: its throughput left, its step times right."""
    steps_left = MARGIN + CHART_WIDTH + LEGEND_WIDTH + NAMES_WIDTH
    steps = [step_times(model) for model in models]
    num_rows = [sum(len(times) + 1 for times in each) for each in steps]
    heights = [max(CHART_HEIGHT, BAR_PITCH * rows) for rows in num_rows]
    drawing = Drawing(
        width=steps_left + CHART_WIDTH + MS_WIDTH + LEGEND_WIDTH / 2,
        height=sum(heights) + (HEADER + FOOTER) * len(models),
    )
    top = HEADER
    for model, times, height in zip(models, steps, heights, strict=True):
        _throughput(drawing, MARGIN, top, model.name, curves(model))
        _step_times(drawing, steps_left, top, model.name, times)
        top += height + HEADER + FOOTER
    return drawing.text()


def curves(model: ModelReport) -> list[Curve]:
    """Decoding by batch of each side, and of the bound, which comes last."""
    decoding = {
        workload.num_prompts: workload.label
        for workload in model.workloads
        if not workload.is_prefill
    }
    bounds = model.bounds()
    found = []
    for side in model.sides:
        points = {
            batch: statistics.median(model.samples.rates[label][side])
            for batch, label in decoding.items()
            if model.samples.rates[label].get(side)
        }
        found.append(Curve(name=side, points=points))
    bound = {batch: bounds[label] for batch, label in decoding.items()}
    return [*found, Curve(name="bound", points=bound)]


def step_times(model: ModelReport) -> list[list[StepTime]]:
    """Of the sides that tell it, workload by workload."""
    found = [
        [
            StepTime(label=f"{label}, {side}", parts=parts)
            for side, parts in by_side.items()
            if sum(parts.values())
        ]
        for label, by_side in model.splits().items()
    ]
    return [times for times in found if times]


def _throughput(
    drawing: Drawing, left: float, top: float, name: str, lines: Sequence[Curve]
) -> None:
    values = [value for line in lines for value in line.points.values()]
    batches = sorted({batch for line in lines for batch in line.points})
    bottom = top + CHART_HEIGHT
    across = LogAxis(low=batches[0], high=max(batches[-1], 2), start=left, end=left + CHART_WIDTH)
    up = LogAxis(low=min(values) / 1.2, high=max(values) * 1.2, start=bottom, end=top)
    drawing.label((left, top - 12), f"{name}: decoded tokens/s over batch", bold=True)
    for tick in up.ticks():
        drawing.line([(left, up(tick)), (left + CHART_WIDTH, up(tick))], LIGHT)
        drawing.label((left - 6, up(tick) + 4), f"{tick:g}", anchor="end")
    for batch in batches:
        drawing.line([(across(batch), top), (across(batch), bottom)], LIGHT)
        drawing.label((across(batch), bottom + 16), str(batch), anchor="middle")
    strokes = {line.name: colour(index) for index, line in enumerate(lines[:-1])}
    for line in lines:
        stroke = strokes.get(line.name, GREY)
        points = [(across(batch), up(value)) for batch, value in sorted(line.points.items())]
        width = THICK if is_ours(line.name) else THIN
        drawing.line(points, stroke, width=width, dash="" if line.name in strokes else "5 4")
        for point in points:
            drawing.dot(point, stroke)
    fastest_first = sorted(lines, key=lambda line: -line.points.get(batches[-1], 0.0))
    for index, line in enumerate(fastest_first):
        y = top + LEGEND_PITCH * index
        _legend(drawing, left + CHART_WIDTH + 14, y, strokes.get(line.name, GREY), line.name)


def _step_times(
    drawing: Drawing, left: float, top: float, name: str, steps: Sequence[Sequence[StepTime]]
) -> None:
    """Bars of a side at a workload, as long as its step beside the longest of that workload."""
    if not steps:
        return
    parts = list(dict.fromkeys(part for times in steps for time in times for part in time.parts))
    drawing.label((left, top - 12), f"{name}: ms of a step by part", bold=True)
    y = top
    for times in steps:
        scale = CHART_WIDTH / max(time.whole for time in times)
        for time in times:
            drawing.label((left - 6, y + BAR_HEIGHT - 2), time.label, anchor="end")
            x = left
            for part, ms in time.parts.items():
                title = f"{time.label}: {part} {ms:.2f} ms"
                drawing.box((x, y), ms * scale, BAR_HEIGHT, colour(parts.index(part)), title)
                x += ms * scale
            drawing.label((x + 5, y + BAR_HEIGHT - 2), f"{time.whole:.1f}")
            y += BAR_PITCH
        y += BAR_PITCH
    for index, part in enumerate(parts):
        right = left + CHART_WIDTH + MS_WIDTH
        _legend(drawing, right, top + LEGEND_PITCH * index, colour(index), part)


def _legend(drawing: Drawing, x: float, y: float, fill: str, text: str) -> None:
    drawing.box((x, y), 10, 10, fill, text)
    drawing.label((x + 16, y + 9), text)
