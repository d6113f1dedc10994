"""`figure`: a report as a matplotlib figure."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from torch_rmt.compare import Report
from torch_rmt.sinks.drawing import Drawing, draw

_BARS, _LAW, _OUTLIER = "#7aa6d8", "#d1495b", "#8f5fbf"


def figure(report: Report, drawing: Drawing | None = None) -> Any:
    """Draw the measured spectrum as bars and the law over it; returns a `matplotlib.figure.Figure`.

    The figure belongs to no window and no pyplot state; save it with `.savefig(path)`.

    Args:
        report: what to draw.
        drawing: what `draw(report)` returned, where it has been called already.

    Raises:
        ImportError: matplotlib is missing; it comes with the extra "plots".
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'torch-rmt[plots]'") from error
    made = Figure(figsize=(6.4, 4.0), dpi=110, layout="constrained")
    axes = made.subplots()
    paint(axes, draw(report) if drawing is None else drawing)
    axes.set_title(report.name, loc="left", fontweight="bold", fontsize=11)
    if report.verdict:
        made.supxlabel(textwrap.fill(report.verdict, 98), fontsize=8, x=0.01, ha="left")
    return made


def paint(axes: Any, drawing: Drawing) -> None:
    """Paint a drawing into matplotlib axes, the legend included."""
    axes.stairs(drawing.heights, drawing.edges, fill=True, color=_BARS, label="measured")
    if drawing.curve_x.size:
        axes.plot(drawing.curve_x, drawing.curve_y, color=_LAW, lw=1.8, label="law")
    ceiling = float(drawing.heights.max()) if drawing.heights.size else 1.0
    if drawing.curve_y.size and not drawing.logarithmic:
        # A hard edge may be infinite: never let it flatten the bars.
        ceiling = max(ceiling, min(float(np.nanmax(drawing.curve_y)), 3 * ceiling))
    for i, (place, mass) in enumerate(drawing.atoms):
        axes.axvline(place, color=_LAW, lw=1.2, ls="--", label="law's atoms" if i == 0 else None)
        axes.annotate(f"{mass:.2g}", (place, ceiling), color=_LAW, fontsize=8)
    for i, place in enumerate(drawing.outliers):
        axes.plot([place], [0.0], "v", transform=axes.get_xaxis_transform(), color=_OUTLIER, clip_on=False,
                  ms=6, label="outliers" if i == 0 else None)  # fmt: skip
    axes.set_xlim(drawing.low, drawing.high)
    if drawing.logarithmic:
        positive = drawing.heights[drawing.heights > 0]
        axes.set_yscale("log")
        axes.set_ylim(0.5 * positive.min(), 2 * max(ceiling, positive.max()))
    elif ceiling > 0:
        axes.set_ylim(0, 1.08 * ceiling)
    ticks = drawing.axis.ticks(drawing.low, drawing.high)
    axes.set_xticks([place for place, _ in ticks], [text for _, text in ticks])
    axes.set_xlabel("\n".join([drawing.label, *drawing.notes]), fontsize=9)
    axes.set_ylabel("density" if drawing.axis.scale == "linear" else "density on this axis")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
