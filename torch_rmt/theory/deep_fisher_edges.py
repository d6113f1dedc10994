"""Outer edges of the deep Fisher law: off the support everything is real, and z is explicit in one parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from torch_rmt.theory.slope_law import NodeLaw

Reals = Float[np.ndarray, " points"]

_SPAN = 28.0  # log distance from the support of D^2 at which a sweep ends: rounding
_POINTS = 41  # a sweep; three sweeps, each within the two intervals beside the turn, leave 1e-4 of log distance


@dataclass(frozen=True)
class FisherStep:
    """Theta -> shift I + gain W D Theta D W^T, W square, Haar orthogonal or Gaussian of variance 1/n.

    Fields:
        shift: what this layer's own weights add, > 0.
        gain: sigma_w^2.
        slopes: law of the entries of D^2 (`slope_law` of an activation, or `discrete_slopes` of drawn values).
        gaussian: whether W is Gaussian.
    """

    shift: float
    gain: float
    slopes: NodeLaw
    gaussian: bool


def discrete_slopes(values: ArrayLike, weights: ArrayLike | None = None) -> NodeLaw:
    """The law of D^2 with these values, of equal weight if none is given."""
    places, where = np.unique(np.asarray(values, dtype=float), return_inverse=True)
    mass = np.bincount(where.ravel(), None if weights is None else np.asarray(weights, dtype=float))
    mass = mass / mass.sum()
    return NodeLaw(places, mass, tuple(zip(places.tolist(), mass.tolist(), strict=True)), ())


def top_of(law: NodeLaw) -> float:
    """Upper end of a law of D^2."""
    return max([place for place, _ in law.atoms] + [high for _, high in law.ranges])


def bottom_of(law: NodeLaw) -> float:
    """Lower end of what is not an atom at zero."""
    return min([place for place, _ in law.atoms if place > 0.0] + [low for low, _ in law.ranges])


def _real_transform(law: NodeLaw, w: Reals) -> tuple[Reals, Reals, Reals]:
    value, above, slope = law.transform(w.astype(complex))
    return value.real, above.real, slope.real


def real_inverse(law: NodeLaw, u: Reals) -> Reals:
    """The w off the support with M_D(w) = u: above it for u > 0, negative for -p < u < 0, else in the gap at zero.

    p is the mass off zero. Newton on 1/M, which is linear for a law of two values, zero among them; a step may take
    nine tenths of the way to the end of the branch.
    """
    p, mean = 1.0 - law.mass_at(0.0), law.moment(1)
    top, bottom = top_of(law), bottom_of(law)
    with np.errstate(all="ignore"):
        w = mean / p * (u + p) / u
        outside, gap = u > 0.0, u < -p
        w = np.where(outside, np.maximum(w, top * (1.0 + 1e-9)), w)
        w = np.where(gap, np.clip(w, 0.0, bottom * (1.0 - 1e-9)), w)
        for _ in range(14):
            value, _, slope = _real_transform(law, w)
            new = w + (1.0 / value - 1.0 / u) * value**2 / slope
            new = np.where(outside, np.maximum(new, top + 0.1 * (w - top)), new)
            new = np.where(gap, np.clip(new, 0.1 * w, bottom - 0.1 * (bottom - w)), new)
            new = np.where(~outside & ~gap, np.minimum(new, 0.1 * w), new)
            done = np.abs(new - w) <= 1e-14 * np.abs(w)
            w = np.where(np.isfinite(new), new, w)
            if done.all():
                break
    return np.asarray(w)


def real_curve(start: float, steps: Sequence[FisherStep], first: Reals) -> tuple[Reals, Reals]:
    """z of the whole chain, and G(z), where the first layer's w is `first`, off the support of its D^2."""
    with np.errstate(all="ignore"):
        u, above, _ = _real_transform(steps[0].slopes, first)
        z = start * above / u
        w = first
        for k, step in enumerate(steps):
            if k:
                w = real_inverse(step.slopes, u)
                above = 1.0 + u
            product = step.gain * w * u * z / (1.0 if step.gaussian else above)
            u = u + step.shift * above / product
            z = product + step.shift
        return np.asarray(z), np.asarray((1.0 + u) / z)


def outer_edges(start: float, steps: Sequence[FisherStep]) -> tuple[float, float]:
    """Ends of the continuous part: where z, followed in from -infinity and from +infinity, first turns back.

    G falls with z all the way, but for the jump at the atom of dead units. Where G passes infinity elsewhere, or the
    curve ends without a turn, the edge is a hard one, and lies there.
    """
    law = steps[0].slopes
    mean, top, bottom = law.moment(1), top_of(law), bottom_of(law)
    shift = steps[-1].shift

    def from_above(t: Reals) -> tuple[Reals, Reals]:
        z, g = real_curve(start, steps, top + mean * np.exp(-t))
        return -z, g

    def from_below(t: Reals) -> tuple[Reals, Reals]:
        # on past w = 0 where D^2 has an atom there, to the least of its other values
        beyond = bottom / (1.0 + np.exp(_SPAN - 8.0 - t))
        z, g = real_curve(start, steps, np.where(t < _SPAN, -mean * np.exp(-t), beyond))
        return z, -g

    reach = 3.0 * _SPAN if law.mass_at(0.0) > 0.0 else _SPAN
    return _turn(from_below, reach, shift), -_turn(from_above, _SPAN, np.nan)


def _turn(rising: Callable[[Reals], tuple[Reals, Reals]], reach: float, jump: float) -> float:
    """Value where a function that rises from -infinity at t = -8 first falls, or its companion, but across `jump`."""
    low, high = -8.0, reach
    best = -np.inf
    for count in (int(_POINTS * (reach + 8.0) / 18.0), _POINTS, _POINTS, _POINTS):
        t = np.linspace(low, high, count)
        value, other = rising(t)
        with np.errstate(invalid="ignore"):
            rises = np.diff(value) >= -1e-13 * np.abs(value[:-1])
            across = (value[:-1] <= jump * (1.0 + 1e-9)) & (value[1:] >= jump * (1.0 - 1e-9))
            rises &= across | (np.diff(other) >= -1e-9 * np.abs(other[:-1]))
        falls = np.flatnonzero(~rises)
        at = int(falls[0]) if falls.size else count - 1
        best = max(best, float(value[at])) if np.isfinite(value[at]) else best
        low, high = float(t[max(at - 1, 0)]), float(t[min(at + 1, count - 1)])
    return best
