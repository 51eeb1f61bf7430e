"""Just enough SVG for the plots: shapes in a text, and a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

COLOURS = (
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#ff7f0e",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#17becf",
    "#bcbd22",
    "#7f7f7f",
    "#393b79",
    "#637939",
    "#843c39",
    "#7b4173",
)
Point = tuple[float, float]


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogAxis:
    """Maps positive values in [low, high] to pixels [start, end] by their logarithm."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = math.log(self.high / self.low) or 1.0
        return self.start + (self.end - self.start) * math.log(value / self.low) / span

    def ticks(self) -> list[float]:
        """1, 2 and 5 times the powers of ten within the axis."""
        first = math.floor(math.log10(self.low))
        last = math.ceil(math.log10(self.high))
        steps = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
        return [step for step in steps if self.low <= step <= self.high]


@dataclass(slots=True, kw_only=True)
class Drawing:
    """Shapes drawn in order; `text()` is the whole file. Pixels from the upper left."""

    width: float
    height: float
    _shapes: list[str] = field(default_factory=list)

    def line(
        self, points: Sequence[Point], stroke: str, *, width: float = 1, dash: str = ""
    ) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self._shapes.append(
            f'<polyline points="{path}" fill="none" stroke="{stroke}" '
            f'stroke-width="{width}"{dashes}/>'
        )

    def dot(self, at: Point, fill: str) -> None:
        self._shapes.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="3" fill="{fill}"/>')

    def box(self, at: Point, width: float, height: float, fill: str, title: str) -> None:
        self._shapes.append(
            f'<rect x="{at[0]:.1f}" y="{at[1]:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{fill}"><title>{escape(title)}</title></rect>'
        )

    def label(self, at: Point, text: str, *, anchor: str = "start", bold: bool = False) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self._shapes.append(
            f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor={quoteattr(anchor)}{weight}>'
            f"{escape(text)}</text>"
        )

    def text(self) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width:.0f}" '
            f'height="{self.height:.0f}" font-family="sans-serif" font-size="11">\n'
            '<rect width="100%" height="100%" fill="white"/>\n'
            + "\n".join(self._shapes)
            + "\n</svg>\n"
        )
