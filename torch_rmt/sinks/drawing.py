"""What there is to draw of a report, before any drawing library: bars, a curve, atoms, ticks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from torch_rmt.compare import Report, density_curve
from torch_rmt.compare.distances import numerical_zero
from torch_rmt.measures import SpectralMeasure

Scale = Literal["linear", "log", "symlog"]

_PIECES = 8  # a law with more intervals and atoms than this, a free sum of measured parts, is drawn in bins
_LINEAR_SPAN = 30.0  # a spectrum narrower than this factor is drawn on a linear axis; found by tuning


@dataclass(frozen=True)
class Axis:
    """A monotone coordinate of the eigenvalue x: x itself, log10 x, or asinh(x / (2 unit)) / log 10.

    Fields:
        scale: which of the three.
        unit: where the symmetric logarithm turns linear; 1 otherwise.
    """

    scale: Scale
    unit: float = 1.0

    def place(self, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return the coordinates of eigenvalues (positive ones for "log")."""
        if self.scale == "log":
            x = np.log10(x)
        elif self.scale == "symlog":
            x = np.arcsinh(x / (2 * self.unit)) / math.log(10)
        return np.asarray(x, dtype=np.float64)

    def value(self, u: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return the eigenvalues at coordinates: the inverse of `place`."""
        if self.scale == "log":
            u = 10.0**u
        elif self.scale == "symlog":
            u = 2 * self.unit * np.sinh(u * math.log(10))
        return np.asarray(u, dtype=np.float64)

    def stretch(self, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return dx/du, by which a density in x becomes one in the coordinate u."""
        if self.scale == "log":
            return x * math.log(10)
        if self.scale == "symlog":
            return np.sqrt(x**2 + 4 * self.unit**2) * math.log(10)
        return np.ones_like(x)

    def ticks(self, low: float, high: float) -> tuple[tuple[float, str], ...]:
        """Return up to nine `(coordinate, eigenvalue in print)` between two coordinates."""
        if self.scale == "linear":
            values = _round_steps(low, high)
            return tuple((min(max(v, low), high), f"{v:.6g}") for v in values)
        if self.scale == "log":
            step = max(1, math.ceil((high - low) / 7))
            first = math.ceil(low / step) * step
            exponents = range(first, math.floor(high) + 1, step)
            ticks = tuple((float(e), _power(e)) for e in exponents)
            if len(ticks) >= 2:
                return ticks
            values = [v for v in _round_steps(10**low, 10**high) if v > 0]
            return tuple((math.log10(v), f"{v:.3g}") for v in values)
        top = max(abs(low), abs(high))
        base = round(math.log10(self.unit))
        step = max(1, math.ceil(top / 3.5))
        out = [(0.0, "0")]
        for e in range(base + step, base + math.ceil(top) + 1, step):
            u = float(self.place(np.array([10.0**e]))[0])
            out += [(u, _power(e)), (-u, "−" + _power(e))]
        return tuple(sorted((u, text) for u, text in out if low <= u <= high))


@dataclass(frozen=True)
class Drawing:
    """Bars of the measured spectrum, the curve of its law, and what does not fit on the axis in words.

    Heights are mass per unit of the axis coordinate, so that areas are shares of the spectrum.

    Fields:
        axis: the coordinate in which all positions below are given.
        label: of the horizontal axis.
        low, high: its ends.
        edges, heights: bars of the measured spectrum, n + 1 and n numbers.
        curve_x, curve_y: continuous part of the law, NaN in the gaps of its support; empty without one.
        atoms: `(coordinate, mass)` of the law's point masses on the axis.
        outliers: coordinates of the significant eigenvalues beyond the law.
        logarithmic: whether heights span so much that they want a logarithmic axis.
        notes: mass that is not on the axis: zeros among squared singular values.
    """

    axis: Axis
    label: str
    low: float
    high: float
    edges: Float[np.ndarray, " n_plus_1"]
    heights: Float[np.ndarray, " n"]
    curve_x: Float[np.ndarray, " m"]
    curve_y: Float[np.ndarray, " m"]
    atoms: tuple[tuple[float, float], ...]
    outliers: tuple[float, ...]
    logarithmic: bool
    notes: tuple[str, ...]


def draw(report: Report, *, bins: int | None = None) -> Drawing:
    """Lay out the measured spectrum and the law of a report on one axis.

    A spectrum that spans more than a factor of 30 is laid out logarithmically: log10 where it is positive, a
    symmetric logarithm otherwise. Zeros among squared singular values are counted in `notes`, not drawn.

    Args:
        report: what to draw.
        bins: number of bars; None takes about 2 sqrt(n) of n eigenvalues, at least 13 and at most 61.
    """
    # A single eigenvalue weighs 1/dim; what weighs a thousandth of it is rounding.
    used = report.spectrum.weights > 1e-3 / report.spectrum.dim
    nodes = report.spectrum.nodes[used].astype(np.float64)
    weights = (report.spectrum.weights / report.spectrum.weights.shape[0])[used]
    law = None if report.prediction is None else report.prediction.measure
    positive = not report.spectrum.symmetric
    rounding = numerical_zero(report.spectrum)
    axis = _axis(nodes, weights, rounding if positive else None)
    notes: list[str] = []
    shown = np.ones(nodes.shape, dtype=bool)
    atoms = () if law is None else law.atoms()
    if positive and nodes.size:
        # Zeros of a rectangular matrix would dwarf all the rest.
        shown = nodes > rounding
        at_zero = float(weights[~shown].sum())
        law_at_zero = 0.0 if law is None else float(np.asarray(law.cdf(rounding)))
        atoms = tuple((place, mass) for place, mass in atoms if place > 0)
        if at_zero > 0 or law_at_zero > 0:
            said = "" if law is None else f"; the law puts {law_at_zero:.3g} there"
            notes.append(f"{at_zero:.3g} of the spectrum is 0 to rounding{said}")
    places = axis.place(nodes[shown])
    curve_x = curve_y = np.zeros(0)
    binned = law is not None and len(law.support()) + len(atoms) > _PIECES
    if law is not None and not binned:
        curve_x, curve_y = _curve(law, axis, rounding)
        if axis.scale == "log" and places.size:
            curve_x, curve_y = _without_tail(curve_x, curve_y, float(places.min()))
    atoms = () if binned else tuple((float(axis.place(np.array([place]))[0]), mass) for place, mass in atoms)

    ends = np.concatenate([places, curve_x[curve_y > 0], np.array([u for u, _ in atoms])])
    low, high = (float(ends.min()), float(ends.max())) if ends.size else (-1.0, 1.0)
    margin = 0.04 * (high - low) or 0.5
    low, high = low - margin, high + margin
    if bins is None:
        bins = int(np.clip(2 * math.sqrt(places.size), 12, 60)) | 1
    if axis.scale == "symlog":
        # Zero in the middle of a bar: what is zero to rounding on either side belongs together.
        low, high = -max(-low, high), max(-low, high)
        if ends.size and ends.min() >= -high / (2 * bins - 1):  # no eigenvalue is negative: no room for any
            low = -high / (2 * bins - 1)
    heights, edges = np.histogram(places, bins=bins, range=(low, high), weights=weights[shown])
    heights = heights / np.diff(edges)
    if law is not None and binned:
        curve_x, curve_y = _steps(law, axis, edges)
    filled = heights[heights > 0]
    beyond = axis.place(np.array([o.location for o in report.outliers if axis.scale != "log" or o.location > 0]))
    return Drawing(
        axis=axis,
        label="squared singular value" if not report.spectrum.symmetric else "eigenvalue",
        low=low,
        high=high,
        edges=edges,
        heights=heights,
        curve_x=curve_x,
        curve_y=curve_y,
        atoms=atoms,
        outliers=tuple(float(u) for u in beyond),
        logarithmic=bool(filled.size and filled.min() < 1e-3 * filled.max()),
        notes=tuple(notes),
    )


def _without_tail(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], smallest: float
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Cut the curve where less than a thousandth of the law lies further down and no eigenvalue was measured.

    The law of a deep ReLU network thins out over all decades down to zero, and would push the bars to the edge.
    """
    mass = np.nan_to_num(0.5 * (y[1:] + y[:-1]) * np.diff(x))
    below = np.append(0.0, np.cumsum(mass))
    keep = np.isnan(x) | (x >= smallest) | (below > 1e-3 * below[-1])
    return x[keep], y[keep]


def _steps(
    law: SpectralMeasure, axis: Axis, edges: Float[np.ndarray, " n_plus_1"]
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Mass of the law in the bars' own bins, as a staircase: for a law in very many pieces."""
    share = np.diff(np.asarray(law.cdf(axis.value(edges)), dtype=np.float64)) / np.diff(edges)
    return np.repeat(edges, 2)[1:-1], np.repeat(np.maximum(share, 0.0), 2)


def _curve(law: SpectralMeasure, axis: Axis, lowest: float) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Continuous part of the law in the axis coordinate, with NaN in the gaps of its support."""
    intervals = law.support()
    if axis.scale != "log":
        x, density = density_curve(law)
    elif intervals:
        # As far down as eigenvalues can be measured, closer towards the upper edge.
        top = intervals[-1][1]
        bottom = max(intervals[0][0], min(lowest, 1e-4 * top))
        x = np.unique(top * (bottom / top) ** (np.linspace(0.0, 1.0, 400) ** 2))
        density = np.asarray(law.density(x), dtype=np.float64)
        x, density = x[np.isfinite(density)], density[np.isfinite(density)]
    else:
        x = density = np.zeros(0)
    gaps = np.searchsorted(x, [high for _, high in intervals[:-1]], side="right")
    return np.insert(axis.place(x), gaps, np.nan), np.insert(density * axis.stretch(x), gaps, np.nan)


def _axis(nodes: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], rounding: float | None) -> Axis:
    """Choose the coordinate; `rounding` is None for a spectrum that may be negative."""
    size = np.abs(nodes)
    largest = float(size.max()) if size.size else 0.0
    if largest == 0.0:
        return Axis("linear")
    if rounding is not None:
        smallest = float(size[size > rounding].min())
        return Axis("log" if largest > _LINEAR_SPAN * smallest else "linear")
    order = np.argsort(size)
    middle = float(size[order][np.searchsorted(np.cumsum(weights[order]), 0.5 * weights.sum())])
    if largest < _LINEAR_SPAN * middle:
        return Axis("linear")
    # The unit is a power of ten at the bulk, at most four decades below the largest eigenvalue.
    return Axis("symlog", 10.0 ** math.floor(math.log10(max(middle, 1e-4 * largest))))


def _round_steps(low: float, high: float) -> list[float]:
    raw = (high - low) / 6 or 1.0
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = magnitude * next(m for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
    first = math.ceil(low / step)
    # Adding 0.0 turns a negative zero into zero.
    return [k * step + 0.0 for k in range(first, math.floor(high / step) + 1)]


def _power(exponent: int) -> str:
    if -2 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
