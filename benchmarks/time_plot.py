"""Lines over seconds, with marked moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.svg import Drawing, Point, colour

_WIDTH, _HEIGHT = 760.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 60.0, 740.0, 50.0, 280.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points are (seconds, value); values are zero or more."""

    name: str
    points: Sequence[Point]


def draw_over_time(series: Sequence[Series], marks: Mapping[str, float], unit: str) -> str:
    """An SVG with linear axes; `marks` are seconds by their names. Needs at least one point."""
    times = [at for one in series for at, _ in one.points] + list(marks.values())
    low, high = min(times), max(times)
    top = max(value for one in series for _, value in one.points) * 1.1 or 1.0

    def x(at: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (at - low) / ((high - low) or 1.0)

    def y(value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * value / top

    drawing = Drawing(width=_WIDTH, height=_HEIGHT)
    for part in range(6):
        value = top * part / 5
        drawing.line([(_LEFT, y(value)), (_RIGHT, y(value))], "#dddddd")
        drawing.label((_LEFT - 6, y(value) + 4), f"{value:.3g}", anchor="end")
        at = low + (high - low) * part / 5
        drawing.label((x(at), _BOTTOM + 16), f"{at:.0f} s", anchor="middle")
    drawing.label((_LEFT, 16), unit, bold=True)
    for index, one in enumerate(series):
        drawing.line([(x(at), y(value)) for at, value in one.points], colour(index), width=2)
        drawing.label((_LEFT + 160 * index + 14, 34), one.name)
        drawing.box((_LEFT + 160 * index, 25), 10, 10, colour(index), one.name)
    for index, (name, at) in enumerate(sorted(marks.items(), key=lambda mark: mark[1])):
        drawing.line([(x(at), _TOP), (x(at), _BOTTOM)], "#555555", dash="4 3")
        drawing.label((x(at) + 3, _TOP + 10 + 12 * (index % 2)), name)
    return drawing.text()
