"""Plots of a report as SVG text: one figure of quality over density or seconds, with intervals."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from vdit_sparse.eval.report import Mean

WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 30, 46
# Okabe and Ito's colours, which colour-blind readers can tell apart, darkest first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A6A00", "#555555")


@dataclass(frozen=True)
class Point:
    """A setting of a method: its number in the table, the method's colour, and the two means."""

    number: int
    series: str
    label: str
    x: Mean
    y: Mean


def colour_of(series: str, all_series: Sequence[str]) -> str:
    """The colour of a method, the same in all plots of a report."""
    return COLOURS[list(all_series).index(series) % len(COLOURS)]


def plot(
    points: Sequence[Point],
    x_title: str,
    y_title: str,
    all_series: Sequence[str],
    dense: float | None = None,
) -> str:
    """An SVG element. dense: where on the x axis the dense baseline stands, for a dashed line."""
    xs = [point.x.value for point in points] + ([] if dense is None else [dense])
    ys = [point.y.value + side * (point.y.half or 0) for point in points for side in (-1, 0, 1)]
    x_ticks, y_ticks = _ticks(xs), _ticks(ys)
    across = _Scale(x_ticks, LEFT, WIDTH - RIGHT)
    along = _Scale(y_ticks, HEIGHT - BOTTOM, TOP)
    parts = [*_axes(across, along, x_title, y_title)]
    if dense is not None:
        x = across(dense)
        parts.append(f'<line class="dense" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        anchor = "end" if x > WIDTH / 2 else "start"
        parts.append(_text(x + (-4 if anchor == "end" else 4), TOP + 10, "dense", anchor, "small"))
    for series in dict.fromkeys(point.series for point in points):
        own = sorted((p for p in points if p.series == series), key=lambda p: p.x.value)
        parts += _series(own, across, along, colour_of(series, all_series))
    parts += _numbers([(across(p.x.value), along(p.y.value), p.number) for p in points])
    label = html.escape(f"{y_title} over {x_title}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


class _Scale:
    """From values between the first and last tick to pixels, one digit after the point."""

    def __init__(self, ticks: Sequence[float], first: float, last: float):
        self.ticks, self.first, self.last = ticks, first, last

    def __call__(self, value: float) -> float:
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return round(self.first + share * (self.last - self.first), 1)


def _series(points: Sequence[Point], across: _Scale, along: _Scale, colour: str) -> list[str]:
    places = [(across(point.x.value), along(point.y.value)) for point in points]
    path = " ".join(f"{x},{y}" for x, y in places)
    parts = [f'<polyline class="way" stroke="{colour}" points="{path}"/>'] if places[1:] else []
    for point, (x, y) in zip(points, places, strict=True):
        half = point.y.half or 0
        low, high = along(point.y.value - half), along(point.y.value + half)
        parts.append(f'<line class="interval" stroke="{colour}" x1="{x}" x2="{x}" y1="{low}" ')
        parts.append(f'y2="{high}"/><circle cx="{x}" cy="{y}" r="5" fill="{colour}">')
        parts.append(f"<title>{html.escape(f'{point.number}: {point.label}')}</title></circle>")
    return parts


def _numbers(places: Sequence[tuple[float, float, int]]) -> list[str]:
    """The points' numbers, to the left of those that have another close by on the right."""
    parts = []
    for x, y, number in places:
        crowded = any(0 < other - x < 24 and abs(above - y) < 16 for other, above, _ in places)
        where, anchor = (x - 8, "end") if crowded else (x + 8, "start")
        parts.append(_text(where, y - 5, str(number), anchor, "mark"))
    return parts


def _axes(across: _Scale, along: _Scale, x_title: str, y_title: str) -> list[str]:
    bottom, parts = HEIGHT - BOTTOM, []
    for tick in along.ticks:
        y = along(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(_text(LEFT - 7, y + 4, f"{tick:g}", "end", "small"))
    for tick in across.ticks:
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(_text(x, bottom + 17, f"{tick:g}", "middle", "small"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_title, "middle", "title"))
    parts.append(_text(LEFT, TOP - 12, y_title, "start", "title"))
    return parts


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _ticks(values: Sequence[float]) -> list[float]:
    """Four to seven round numbers that hold all values between the first and the last."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    low, high = low - 0.04 * span, high + 0.04 * span
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 12) for number in range(first, last + 1)]
