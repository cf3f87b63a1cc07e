"""Line charts as SVG: small, without scripts, in the page's own colours (`currentColor` and classes)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 34


@dataclass(frozen=True)
class Line:
    """A named line of (x, y) points; `kind` is a class of the page's style sheet."""

    name: str
    points: Sequence[tuple[float, float]]
    kind: str = "a"
    dots: bool = False


def chart(
    lines: Sequence[Line], x_label: str, title: str, marks: Sequence[tuple[float, str]] = (), log: bool = False
) -> str:
    """An SVG chart; points that are not finite are left out. `marks` are labelled verticals."""
    shown = [Line(line.name, _finite(line.points, log), line.kind, line.dots) for line in lines]
    points = [point for line in shown for point in line.points]
    if not points:
        return '<p class="note">nothing to show</p>'
    xs, ys = [x for x, _ in points], [math.log10(y) if log else y for _, y in points]
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    y_low, y_high = _padded(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        value = math.log10(y) if log else y
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in ticks(y_low, y_high):
        _, y = place(x_low, 10**tick if log else tick)
        label = f"{10**tick:.2g}" if log else f"{tick:.4g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{label}</text>')
    for tick in ticks(x_low, x_high):
        x, _ = place(tick, 10**y_low if log else y_low)
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for at, label in marks:
        if x_low <= at <= x_high:
            x, _ = place(at, 10**y_high if log else y_high)
            parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            anchor = "end" if x > WIDTH * 0.8 else "start"
            parts.append(
                f'<text class="mark" x="{x + (-4 if anchor == "end" else 4)}" y="{TOP + 10}" text-anchor="{anchor}">{escape(label)}</text>'
            )
    for line in shown:
        placed = [place(x, y) for x, y in line.points]
        path = " ".join(f"{x},{y}" for x, y in placed)
        parts.append(f'<polyline class="line {line.kind}" points="{path}"/>')
        if line.dots:
            parts += [f'<circle class="dot {line.kind}" cx="{x}" cy="{y}" r="3"/>' for x, y in placed]
    parts.append("</svg>")
    if len(shown) > 1:
        keys = "".join(f'<span class="key {line.kind}">{escape(line.name)}</span>' for line in shown)
        parts.append(f'<p class="keys">{keys}</p>')
    return "".join(parts)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between low and high."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    for factor in (1, 2, 5, 10):
        if (high - low) / (step * factor) <= about:
            step *= factor
            break
    first = math.ceil(low / step)
    return [round(index * step, 12) for index in range(first, math.floor(high / step) + 1)]


def _finite(points: Sequence[tuple[float, float]], log: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]


def _padded(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.06 or abs(low) * 0.1 or 1.0
    return low - room, high + room
