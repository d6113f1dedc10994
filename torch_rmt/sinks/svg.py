"""A drawing as SVG that takes its colours from the page around it; no library needed."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from torch_rmt.sinks.drawing import Drawing

_WIDTH, _HEIGHT = 620, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 14, 46


def svg(drawing: Drawing, *, title: str) -> str:
    """Return an inline `<svg>` element; its classes are `bar`, `law`, `atom`, `outlier`, `axis` and `grid`.

    Args:
        drawing: what to draw.
        title: what a screen reader says in place of the picture.
    """
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    floor, ceiling = _vertical_range(drawing)

    def across(u: float) -> float:
        return _LEFT + (u - drawing.low) / (drawing.high - drawing.low) * (right - _LEFT)

    def up(height: float) -> float:
        if drawing.logarithmic:
            height = max(height, floor)
            share = math.log(height / floor) / math.log(ceiling / floor)
        else:
            share = height / ceiling
        return bottom - min(max(share, 0.0), 1.0) * (bottom - _TOP)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for height, text in _vertical_ticks(drawing, floor, ceiling):
        y = up(height)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for left_edge, right_edge, height in zip(drawing.edges[:-1], drawing.edges[1:], drawing.heights, strict=True):
        if height > 0:
            x, y = across(float(left_edge)), up(float(height))
            wide = max(across(float(right_edge)) - x - 0.5, 0.5)
            parts.append(f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{bottom - y:.1f}"/>')
    breaks = np.flatnonzero(np.isnan(drawing.curve_x))
    for xs, heights in zip(np.split(drawing.curve_x, breaks), np.split(drawing.curve_y, breaks), strict=True):
        points = " ".join(
            f"{across(float(u)):.1f},{up(float(h)):.1f}"
            for u, h in zip(xs, heights, strict=True)
            if drawing.low <= u <= drawing.high
        )
        parts.append(f'<polyline class="law" points="{points}"/>' if points else "")
    for place, mass in drawing.atoms:
        x = across(place)
        parts.append(f'<line class="atom" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{_TOP}"/>')
        parts.append(f'<text x="{x + 4:.1f}" y="{_TOP + 9}">{mass:.2g}</text>')
    for place in drawing.outliers:
        x = across(place)
        parts.append(f'<path class="outlier" d="M{x - 4:.1f},{bottom - 8}h8l-4,8z"><title>outlier</title></path>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    for place, text in drawing.axis.ticks(drawing.low, drawing.high):
        x = across(place)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{escape(text)}</text>')
    label = drawing.label + (f" ({'; '.join(drawing.notes)})" if drawing.notes else "")
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(label)}</text>')
    parts.append("</svg>")
    return "".join(parts)


def _vertical_range(drawing: Drawing) -> tuple[float, float]:
    positive = drawing.heights[drawing.heights > 0]
    if not positive.size:
        return 0.0, 1.0
    highest = float(positive.max())
    if drawing.logarithmic:
        return 0.5 * float(positive.min()), 2 * highest
    if drawing.curve_y.size:
        highest = max(highest, min(float(np.nanmax(drawing.curve_y)), 3 * highest))
    return 0.0, 1.08 * highest


def _vertical_ticks(drawing: Drawing, floor: float, ceiling: float) -> list[tuple[float, str]]:
    if drawing.logarithmic:
        first, last = math.ceil(math.log10(floor)), math.floor(math.log10(ceiling))
        step = max(1, math.ceil((last - first) / 5))
        return [(10.0**e, f"{10.0**e:.0e}" if abs(e) > 2 else f"{10.0**e:g}") for e in range(first, last + 1, step)]
    magnitude = 10.0 ** math.floor(math.log10(ceiling / 4))
    spacing = magnitude * next(m for m in (1.0, 2.0, 5.0, 10.0) if m * magnitude >= ceiling / 5)
    return [(k * spacing, f"{k * spacing:.3g}") for k in range(int(ceiling / spacing) + 1)]
