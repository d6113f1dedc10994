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
_FAR = -8.0  # where a sweep starts: minus the log of the distance, in sizes of the law
_POINTS = 41  # of a finer sweep
_PART = 128  # points of the first sweep at a time
_AGREE = 1e-10  # of parabolas through neighbours and through next neighbours: the finer is good to a sixteenth


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
        active = np.arange(len(w))
        for _ in range(14):
            here, aim = w[active], u[active]
            value, _, slope = _real_transform(law, here)
            new = here + (1.0 / value - 1.0 / aim) * value**2 / slope
            new = np.where(outside[active], np.maximum(new, top + 0.1 * (here - top)), new)
            new = np.where(gap[active], np.clip(new, 0.1 * here, bottom - 0.1 * (bottom - here)), new)
            new = np.where(~outside[active] & ~gap[active], np.minimum(new, 0.1 * here), new)
            # steps square: the next one would be rounding, measured from the end of the branch
            room = np.minimum(np.abs(here), np.where(outside[active], here - top, np.abs(here)))
            room = np.where(gap[active], np.minimum(room, bottom - here), room)
            done = np.abs(new - here) <= np.maximum(1e-8 * room, 1e-14 * np.abs(here))
            w[active] = np.where(np.isfinite(new), new, here)
            active = active[~done]
            if not active.size:
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


def outer_edges(start: float, steps: Sequence[FisherStep], jumps: Sequence[float]) -> tuple[float, float]:
    """Ends of the continuous part: where z, followed in from -infinity and from +infinity, first turns back.

    G falls with z all the way, but for the jumps at the atoms below the band. Where G passes infinity elsewhere, or the
    curve ends without a turn, the edge is a hard one, and lies there. An atom above the band is passed. The lower
    end is the last shift itself where nothing keeps W D Theta D W^T from zero: no units are dead, and W is Gaussian or
    D^2 comes down to zero.
    """
    law, last = steps[0].slopes, steps[-1]
    mean, top, bottom = law.moment(1), top_of(law), bottom_of(law)
    far = _far_start(start, steps)
    highest = _top_atom(start, steps)

    def from_above(t: Reals) -> tuple[Reals, Reals]:
        # on past an atom at the top, where w passes the one value of D^2 other than zero
        beyond = top * -np.expm1(np.minimum(t - 2.0 * _SPAN, -1e-6))
        return _signed(-1.0, real_curve(start, steps, np.where(t < _SPAN, top + mean * np.exp(-t), beyond)))

    reach, passed = (_SPAN, ()) if highest is None else (2.0 * _SPAN, (-highest,))
    upper = _turn(from_above, far, reach, 0.1, passed)
    alive = last.slopes.mass_at(0.0) == 0.0 and all(step.shift > 0.0 for step in steps)
    if alive and (last.gaussian or bottom_of(last.slopes) == 0.0):
        return last.shift, -upper

    # small steps: beyond the turn of a deep law with dead units poles crowd
    def from_below(t: Reals) -> tuple[Reals, Reals]:
        # on past w = 0, to the least value of D^2 other than zero
        beyond = bottom / (1.0 + np.exp(_SPAN - 8.0 - t))
        return _signed(1.0, real_curve(start, steps, np.where(t < _SPAN, -mean * np.exp(-t), beyond)))

    reach = 3.0 * _SPAN if bottom > 0.0 else _SPAN
    lower = _turn(from_below, far, reach, 0.025, jumps)
    # so few dead units that the gap above their atom is passed between two points of the sweep
    return lower if last.shift <= lower < -upper else last.shift, -upper


def _top_atom(start: float, steps: Sequence[FisherStep]) -> float | None:
    """Place of the atom of units that are alive in every layer: Haar weights, D^2 of zero and one value more."""
    mass, place = 1.0, start
    for step in steps:
        if step.gaussian or step.slopes.ranges or len(step.slopes.atoms) > 2 or len(step.slopes.holes()) > 2:
            return None
        mass, place = mass - step.slopes.mass_at(0.0), step.shift + step.gain * top_of(step.slopes) * place
    return place if mass > 0.0 else None


def _far_start(start: float, steps: Sequence[FisherStep]) -> float:
    """-log of the first w, in units of the mean of D^2, from where on z is far from the law of every layer.

    Far out z_l = gain mean(D^2) z_{l-1}, and z_0 = start w/mean(D^2): where layers shrink, the last z comes near first.
    """
    mean, rate, reach = start, 1.0, 1.0
    for step in steps:
        factor = step.gain * step.slopes.moment(1)
        mean, rate = step.shift + factor * mean, rate * factor
        reach = max(reach, mean / (start * rate))
    return _FAR - float(np.log(reach))


def _signed(sign: float, curve: tuple[Reals, Reals]) -> tuple[Reals, Reals]:
    return sign * curve[0], -sign * curve[1]


def _turn(
    rising: Callable[[Reals], tuple[Reals, Reals]], far: float, reach: float, step: float, jumps: Sequence[float]
) -> float:
    """Value where a function that rises from -infinity at t = `far` first falls, or its companion, but across `jumps`.

    A sweep by `step`, in parts so that it may stop early, then finer ones, each within the two intervals beside the
    turn, until a parabola fits its top.
    """
    t, value, other = np.empty(0), np.empty(0), np.empty(0)
    coarse = np.concatenate([np.arange(far, 12.0, step), np.arange(12.0, reach, 0.4)])
    for part in np.split(coarse, np.arange(_PART, len(coarse), _PART)):
        t, value, other = (np.append(*pair) for pair in zip((t, value, other), (part, *rising(part)), strict=True))
        at = _first_fall(value, other, jumps)
        if at < len(t) - 1:
            break
    best = -np.inf
    for finer in range(4):
        best = max(best, float(value[at])) if np.isfinite(value[at]) else best
        tops = [_parabola(value, other, at, stride) for stride in (1, 2)]
        if abs(tops[0] - tops[1]) <= _AGREE * abs(tops[0]):
            return tops[0]
        if finer < 3:
            t = np.linspace(t[max(at - 1, 0)], t[min(at + 1, len(t) - 1)], _POINTS)
            value, other = rising(t)
            at = _first_fall(value, other, jumps)
    return best


def _parabola(value: Reals, other: Reals, at: int, stride: int) -> float:
    """Top of the parabola through three equidistant points, NaN where that is no top of a smooth curve."""
    if not stride <= at < len(value) - stride or not other[at - stride] < other[at] < other[at + stride]:
        return float("nan")
    before, here, after = value[at - stride : at + stride + 1 : stride]
    if not before < here > after:
        return float("nan")
    return float(here - (after - before) ** 2 / (8.0 * (before - 2.0 * here + after)))


def _first_fall(value: Reals, other: Reals, jumps: Sequence[float]) -> int:
    """Last index before either falls, but across the jumps (the first is sure); the last of all if neither does."""
    with np.errstate(invalid="ignore"):
        rises = np.diff(value) >= -1e-13 * np.abs(value[:-1])
        follows = np.diff(other) >= -1e-9 * np.abs(other[:-1])
        for k, jump in enumerate(jumps):
            slack = 1e-9 * abs(jump)
            across = (value[:-1] <= jump + slack) & (value[1:] >= jump - slack)
            # an atom within a band or at its edge may lie between two points too, but does not turn the sign
            follows |= across & ((k == 0) | (other[1:] < 0.0))
        rises &= follows
    falls = np.flatnonzero(~rises)
    return int(falls[0]) if falls.size else len(value) - 1
