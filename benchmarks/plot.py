"""The plot of a run: throughput over batch, and where the time of a step goes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report import ModelReport
from benchmarks.svg import Drawing, LogAxis, colour

CHART_WIDTH, CHART_HEIGHT = 340.0, 300.0
LEGEND_WIDTH = 190.0
MARGIN = 60.0
HEADER = 40.0
GREY, LIGHT = "#555555", "#e5e5e5"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Tokens per second by batch."""

    name: str
    points: Mapping[int, float]


def plot(models: Sequence[ModelReport]) -> str:
    """An SVG with a row for each model: its throughput left, its step times right."""
    row_height = CHART_HEIGHT + HEADER + MARGIN
    width = 2 * (CHART_WIDTH + LEGEND_WIDTH + MARGIN)
    drawing = Drawing(width=width, height=row_height * len(models))
    for row, model in enumerate(models):
        top = row * row_height + HEADER
        _throughput(drawing, MARGIN, top, model.name, curves(model))
        _step_times(drawing, width / 2 + MARGIN, top, model)
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
    for index, line in enumerate(lines):
        is_bound = line is lines[-1]
        stroke = GREY if is_bound else colour(index)
        points = [(across(batch), up(value)) for batch, value in sorted(line.points.items())]
        drawing.line(points, stroke, width=2, dash="5 4" if is_bound else "")
        for point in points:
            drawing.dot(point, stroke)
        _legend(drawing, left + CHART_WIDTH + 14, top + 16 * index, stroke, line.name)


def _step_times(drawing: Drawing, left: float, top: float, model: ModelReport) -> None:
    """Stacked bars, one for each side at each batch, of the share of the step's time by part.

    Shares, because steps of different batches differ tenfold; the milliseconds are written above.
    """
    bars = [
        (label, side, parts)
        for label, by_side in model.splits().items()
        for side, parts in by_side.items()
        if sum(parts.values())
    ]
    if not bars:
        return
    names = list(dict.fromkeys(name for _, _, parts in bars for name in parts))
    drawing.label((left, top - 26), f"{model.name}: time of a step by part, ms above", bold=True)
    pitch = CHART_WIDTH / len(bars)
    bottom = top + CHART_HEIGHT
    for index, (label, side, parts) in enumerate(bars):
        whole = sum(parts.values())
        x, y = left + index * pitch, bottom
        for name, part in parts.items():
            height = CHART_HEIGHT * part / whole
            y -= height
            title = f"{side}, {label}: {name} {part:.2f} ms"
            drawing.box((x, y), pitch * 0.8, height, colour(names.index(name)), title)
        drawing.label((x + pitch * 0.4, top - 6), f"{whole:.1f}", anchor="middle")
        drawing.label((x + pitch * 0.4, bottom + 14), str(index + 1), anchor="middle")
    right = left + CHART_WIDTH + 14
    for index, name in enumerate(names):
        _legend(drawing, right, top + 16 * index, colour(index), name)
    for index, (label, side, _) in enumerate(bars):
        y = top + 16 * (len(names) + 1 + index)
        drawing.label((right, y + 9), f"{index + 1}: {side}, {label}")


def _legend(drawing: Drawing, x: float, y: float, fill: str, text: str) -> None:
    drawing.box((x, y), 10, 10, fill, text)
    drawing.label((x + 16, y + 9), text)
