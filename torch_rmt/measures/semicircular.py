"""Sums with a semicircle: one complex unknown, and a curve that is known before the points are asked for.

w = z - v G(w), G of the other law, sends the closed upper half-plane to the points w = u + i y on or above the curve

    y(u) = inf {y >= 0: v a(u, y) <= 1},   a(u, y) = integral of rho(dt) / ((u - t)^2 + y^2) = -Im G(u + i y) / y,

so that the axis is x(u) = u + v Re G(u + i y(u)), increasing, with density y(u) / (pi v). For each u the height is one
root of a monotone, in y^2 concave function 1/a, which Newton finds from below without a bracket. Nothing is continued.
Source: Biane 1997, "On the free convolution with a semi-circular distribution".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Complex, Float

from torch_rmt.measures.base import SpectralMeasure
from torch_rmt.measures.classical import Semicircle
from torch_rmt.measures.discrete import Discrete
from torch_rmt.measures.geometry import Geometry, LogGeometry

Settle = Callable[[Geometry, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

_LOWEST = 1e-12  # of the variance: y^2 from which on down the curve counts as on the axis
_HEIGHT_STEPS = 30
_POLISH_STEPS = 60  # at a cusp, a triple root, each takes off a third until the root is resolved
_ROUGH = 1e-3  # relative error of y^2 on the curve: it only gives guesses
_SETTLED = 1e-8  # size of the last Newton step but one
_LIFTS = 20  # Newton steps that may start again from higher up
_CURVES = 3  # times that the curve is drawn, finer where points are still missing
_GRID, _STRIDE, _PIECES, _FEW_NODES = 64, 8, 8, 64  # points of the curve; found by tuning


def boundary_curve(
    law: SpectralMeasure, variance: float, u: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Heights y(u) of the curve, roughly, and the points x(u) of the axis that it stands for."""
    square = np.full(u.shape, variance)
    lowest = _LOWEST * variance
    todo = np.arange(u.size)
    for step in range(_HEIGHT_STEPS):
        s = square[todo]
        y = np.sqrt(s)
        g, slope = law.stieltjes_and_slope(u[todo] + 1j * y)
        a = -g.imag / y
        b = np.maximum(0.5 * (slope.real + a) / s, a * a)  # integral of ((u - t)^2 + y^2)^-2, at least a^2
        new = s + a * (variance * a - 1.0) / b
        # from above Newton may fall below 0; y = -v Im G is then nearer, where the other law has a density
        rescue = s * (variance * a) ** 2 if step < 2 else lowest
        new = np.maximum(np.where(new > lowest, new, rescue), lowest)
        square[todo] = new
        todo = todo[np.abs(new - s) > _ROUGH * new]
        if not todo.size:
            break
    height = np.where(square > lowest, np.sqrt(square), 0.0)
    with np.errstate(all="ignore"):
        place = u + variance * law.stieltjes(u + 1j * height).real
    return height, np.maximum.accumulate(np.where(np.isfinite(place), place, u))


def first_abscissae(law: SpectralMeasure, variance: float, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    """Points u whose curve covers the sorted points x: |x(u) - u| <= sqrt(v), and y = 0 that far outside the law."""
    reach = np.sqrt(variance)
    low, high = law.bounds()
    first, last = float(x[0] - reach), float(x[-1] + reach)
    start, stop = np.clip(low - reach, first, last), np.clip(high + reach, first, last)
    if isinstance(law, Discrete) and law.nodes.size <= _FEW_NODES:  # each may have an arc of its own
        width = np.sqrt(variance * law.weights)[:, None]
        arcs = (law.nodes[:, None] + width * np.linspace(-1.05, 1.05, 8)).ravel()
    else:
        arcs = np.zeros(0)
    return np.unique(np.concatenate([[first, last], np.linspace(start, stop, _GRID), x[::_STRIDE], arcs]))


def finer_abscissae(
    u: Float[np.ndarray, " m"], place: Float[np.ndarray, " m"], x: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " k"]:
    """The cells between neighbours u, and those beside them, into which points x fall, each cut in pieces."""
    right = np.searchsorted(place, x)
    cells = np.unique(np.clip(right[:, None] + np.arange(-2, 1), 0, u.size - 2))
    share = np.linspace(0.0, 1.0, _PIECES + 1)
    return np.unique(u[cells, None] + share * (u[cells + 1] - u[cells])[:, None])


def polish(
    law: SpectralMeasure, variance: float, x: Float[np.ndarray, " n"], w: Complex[np.ndarray, " n"]
) -> tuple[Complex[np.ndarray, " n"], Complex[np.ndarray, " n"]]:
    """Newton steps on w + v G(w) = x, kept in the upper half-plane: candidates w, to be certified, and G there."""
    w = w.copy()
    g = np.zeros_like(w)
    todo = np.arange(x.size)
    reach = np.sqrt(variance)
    for round_ in range(_POLISH_STEPS):
        here = w[todo]
        value, slope = law.stieltjes_and_slope(here)
        with np.errstate(all="ignore"):
            stretch = 1.0 + variance * slope
            step = (x[todo] - here - variance * value) / stretch
            size = np.abs(step) / (np.abs(here) + reach)
            step = np.where(size > 0.3, step * (0.3 / size), step)
            if round_ < _LIFTS:  # on the curve and above it Re dx/dw >= 1 - v a >= 0
                under = stretch.real < -1e-10
                step = np.where(under, 1j * reach * np.sqrt(np.minimum(np.abs(stretch.real), 1.0)), step)
                size = np.where(under, 1.0, size)
            g[todo] = value + slope * step  # the rest is of second order in a step below 1e-8
        w[todo] = here.real + step.real + 1j * np.abs(here.imag + step.imag)
        todo = todo[~(size < _SETTLED)]
        if not todo.size:
            break
    return w, g


def semicircle_row(geometry: Geometry) -> int | None:
    """Row of a semicircle that is added to one other law, else None."""
    if isinstance(geometry, LogGeometry) or len(geometry.factors) != 2 or geometry.total != 2.0:
        return None
    rows = (i for i, f in enumerate(geometry.factors) if isinstance(f.law, Semicircle) and f.law.mean == 0.0)
    return next(rows, None)


def solve_beside_semicircle(
    geometry: Geometry, z: Complex[np.ndarray, " n"], row: int, settle: Settle
) -> tuple[Complex[np.ndarray, "2 n"], Bool[np.ndarray, " n"]]:
    """Coordinates at points of the axis, in order, and which of them `settle` has certified."""
    variance, law = geometry.factors[row].law.variance, geometry.factors[1 - row].law
    x = z.real
    w = np.zeros((2, z.size), dtype=complex)
    done = np.zeros(z.shape, dtype=bool)
    u = first_abscissae(law, variance, x)
    for _ in range(_CURVES):
        todo = np.flatnonzero(~done)
        height, place = boundary_curve(law, variance, u)
        guess = np.interp(x[todo], place, u) + 1j * np.interp(x[todo], place, height)
        found, g = polish(law, variance, x[todo], guess)
        pair = np.empty((2, todo.size), dtype=complex)
        with np.errstate(all="ignore"):
            pair[1 - row], pair[row] = found, np.where(g == 0, 0.0, variance * g + 1.0 / g)  # infinite: left to others
        w[:, todo], done[todo] = settle(geometry, z[todo], pair)
        if done.all():
            break
        u = finer_abscissae(u, place, x[~done])
    return w, done
