"""Gaussian quadrature for s = phi'(h)^2 on a path beside the real axis, where 1 / (w - s) is not singular."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from jaxtyping import Complex, Float

from torch_rmt.theory.activation import Activation
from torch_rmt.theory.gaussian import _edges

Nodes = Complex[np.ndarray, " nodes"]

# The path leaves a kink or an extremum of s at this slope (22 degrees: s - s0 turns by 45) and stays within this
# distance; tanh has its poles at pi / 2. Found by tuning.
_RISE = 0.4
_FARTHEST = 0.6


def contour(
    activation: Activation, q: float, *, order: int, turns: list[float] | None = None
) -> tuple[Float[np.ndarray, " nodes"], Nodes, Nodes] | None:
    """(Re h, s, weights) along the path, or None if the derivative is not analytic on complex arrays.

    `turns` are the `corners`, where they are known. Im s <= 0 along the path, so that E[s / (w - s)] needs no care for
    Im w >= 0, on the axis included.
    """
    deviation = float(np.sqrt(q))
    # exp(t^2 / 2q) is what the weights cancel: half a deviation costs nothing.
    highest = min(_FARTHEST, 0.7 * deviation)
    turns = corners(activation, deviation) if turns is None else turns
    for height in (highest, highest / 3):
        path = _along(activation, q, turns, height, order)
        if path is not None:
            return path
    return None


def _slope_square(activation: Activation, h: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    return np.asarray(activation.derivative(h), dtype=np.float64) ** 2


def corners(activation: Activation, deviation: float) -> list[float]:
    """Kinks and extrema of s within reach, ascending."""
    reach = 9.2 * deviation
    grid = np.unique(np.concatenate([_edges(deviation, activation.kinks), np.linspace(-reach, reach, 801)]))
    grid = grid[np.abs(grid) > 1e-12 * deviation]
    step = 1e-5 * min(1.0, deviation)

    def rising(h: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
        return np.asarray(_slope_square(activation, h + step) - _slope_square(activation, h - step))

    slope = rising(grid)
    noise = 1e-15 * float(_slope_square(activation, grid).max())
    sign = np.where(np.abs(slope) <= noise, 0.0, np.sign(slope))
    # A flat stretch takes the sign of what comes before it: an extremum is where the sign truly turns.
    for i in range(1, len(sign)):
        sign[i] = sign[i] if sign[i] else sign[i - 1]
    turns = np.flatnonzero(sign[:-1] * sign[1:] < 0)
    low, high = grid[turns], grid[turns + 1]
    inside = np.arange(1, 17)[:, None] / 17
    for _ in range(9):
        middle = low + (high - low) * inside
        before = (np.sign(rising(middle)) == sign[turns]).cumprod(axis=0).sum(axis=0)
        low, high = low + (high - low) * before / 17, low + (high - low) * (before + 1) / 17
    extrema = [float(c) if abs(c) > 1e-9 * deviation else 0.0 for c in (low + high) / 2]
    kinks = [k for k in activation.kinks if abs(k) < reach]
    return sorted(kinks + [c for c in extrema if all(abs(c - k) > 4 * step for k in kinks)])


def _along(
    activation: Activation, q: float, turns: list[float], height: float, order: int
) -> tuple[Float[np.ndarray, " nodes"], Nodes, Nodes] | None:
    deviation = float(np.sqrt(q))
    reach = 9.2 * deviation
    plateau = height / _RISE
    ends = [-reach, *turns, reach]
    breaks = np.unique(np.concatenate([_edges(deviation, activation.kinks), ends]))
    bends = np.array([c + side * plateau for c in turns for side in (-1, 1)])
    middles = np.array([(a + b) / 2 for a, b in pairwise(turns)])
    # Towards a kink or an extremum s varies on ever smaller scales of w - s: geometric panels.
    # At a zero of phi' the law of s has a density like s^(-1/2): grade until 1e-7 of the mass is left.
    at_turns = _slope_square(activation, np.array(turns))
    zero = at_turns < 1e-12 * float(_slope_square(activation, np.linspace(-reach, reach, 101)).max())
    graded = np.array(
        [
            c + side * plateau * 0.25**k
            for c, last in zip(turns, np.where(zero, 13, 4), strict=True)
            for side in (-1, 1)
            for k in range(1, last)
        ]
    )
    breaks = np.unique(np.concatenate([breaks, bends, middles, graded]))
    breaks = breaks[(np.abs(breaks) <= reach)]
    # slivers bring nothing, but the path bends at the turns: those are never dropped
    breaks = breaks[np.concatenate([[True], np.diff(breaks) > 1e-7 * deviation]) | np.isin(breaks, ends)]
    unit, unit_weights = np.polynomial.legendre.leggauss(order)
    half = np.diff(breaks)[:, None] / 2
    x = (breaks[:-1, None] + half * (1 + unit)).ravel()
    mass = (half * unit_weights).ravel()
    t, turn = _height(activation, x, ends, height, deviation)
    h = x + 1j * t
    try:
        with np.errstate(all="ignore"):
            slope = np.asarray(activation.derivative(h))
            # Cauchy-Riemann: the derivative along the path and across it must be one number.
            step = 1e-6 * min(1.0, deviation)
            along = np.asarray(activation.derivative(h + step)) - np.asarray(activation.derivative(h - step))
            across = np.asarray(activation.derivative(h + 1j * step)) - np.asarray(activation.derivative(h - 1j * step))
    except TypeError:
        return None
    if not np.iscomplexobj(slope) or slope.shape != h.shape or not np.isfinite(slope).all():
        return None
    near = np.abs(x[:, None] - np.array([*activation.kinks, np.inf])).min(axis=1) < 2 * step
    if np.abs(across - 1j * along)[~near].max(initial=0.0) > 1e-7 * step * max(1.0, np.abs(slope).max()) / 1e-3:
        return None
    weights = mass * turn * np.exp(-(h**2) / (2 * q)) / np.sqrt(2 * np.pi * q)
    s = slope**2
    keep = np.abs(weights) > 1e-21
    if abs(weights.sum() - 1) > 1e-11 or s.imag[keep].max() > 1e-9 * np.abs(s).max():
        return None
    return x[keep], s[keep], weights[keep]


def _height(
    activation: Activation, x: Float[np.ndarray, " nodes"], ends: list[float], height: float, deviation: float
) -> tuple[Float[np.ndarray, " nodes"], Nodes]:
    """Imaginary part of the path over x, and dh/dx: rising from each corner, level in between, signed as -ds/dh."""
    corner = np.array(ends)
    low, high = corner[:-1, None], corner[1:, None]
    # all pieces at once, each by 64 points inside
    change = np.diff(_slope_square(activation, low + (high - low) * np.linspace(0.0, 1.0, 66)[1:-1]), axis=1)
    signs = np.where(np.abs(change).max(axis=1) < 1e-14, 0.0, -np.sign(change.sum(axis=1)))
    piece = np.clip(np.searchsorted(corner, x, side="right") - 1, 0, len(signs) - 1)
    left = np.where(piece == 0, np.inf, x - corner[piece])
    right = np.where(piece == len(signs) - 1, np.inf, corner[piece + 1] - x)
    nearest, sign = np.minimum(left, right), signs[piece]
    rising = _RISE * nearest < height
    t = sign * np.where(rising, _RISE * nearest, height)
    rate = np.where(rising, sign * np.where(left < right, _RISE, -_RISE), 0.0)
    return t, 1.0 + 1j * rate
