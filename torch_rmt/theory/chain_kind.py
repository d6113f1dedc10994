"""A factor with the law of a diagonal or of measured weights, as one part of a chain: one unknown, w."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from torch_rmt.theory.chain_parts import Bounds, Inner, Part, Points, Share, log_one_plus
from torch_rmt.theory.slope_law import NodeLaw, x_log_x

Reals = Float[np.ndarray, " points"]
Indices = Int[np.ndarray, " some"]

_REACH = 340.0  # |log w| at most: beyond it the squares of float64 overflow


@dataclass(frozen=True, eq=False)
class Kind(Part):
    """`count` factors with one law s of mean one, seen through u = scale * M: adds count * log(u w / (1 + u)) to log z.

    w solves E[s / (w - s)] = u; log w is the unknown.
    """

    law: NodeLaw
    scale: float
    count: float

    @property
    def size(self) -> int:
        """One unknown."""
        return 1

    @property
    def low(self) -> Bounds:
        """w lies in the upper half-plane."""
        return np.zeros(1)

    @property
    def high(self) -> Bounds:
        """w lies in the upper half-plane."""
        return np.full(1, np.pi)

    @property
    def turn(self) -> Bounds:
        """w < 0 where z < 0."""
        return np.full(1, np.pi)

    @property
    def full(self) -> float:
        """The mass off zero."""
        return 1.0 - self.law.mass_at(0.0)

    @property
    def has_gaps(self) -> bool:
        """Whether the law has a gap with mass on either side."""
        holes = self.law.holes()
        return len(holes) - (not self.law.mass_at(0.0) and holes[0][0] == 0.0) > 1

    def evaluate(self, y: Points, v: Inner) -> Share:
        """Its share at log M = y."""
        w, u = np.exp(v[0]), self.scale * np.exp(y)
        value, _, slope = self.law.transform(w)
        follow = value / (w * slope)
        # A quotient near one: its principal logarithm is right on either side of the branch cut.
        correction = -np.log(value / u) * follow
        t = y + v[0] + np.log(self.scale) - log_one_plus(u)
        rate = 1.0 - u / (1.0 + u) + follow
        return Share(self.count * t, self.count * rate, self.count * correction, follow[None], correction[None])

    def start(self, m: Reals) -> Inner:
        """log w at real M > -1; NaN where the law does not reach.

        w lies above its law for M > 0, on the negative axis for -(1 - p0) < scale M < 0, p0 the law's mass at zero,
        and below the law's continuous part and atoms beyond that.
        """
        result = np.full(m.shape, np.nan)
        u = self.scale * m
        above, below = m > 0, u <= -self.full * (1 - 1e-15)
        result[above] = _above(self, u[above])
        result[below] = _below(self, u[below], self.full)
        between = ~above & ~below
        result[between] = _negative(self, u[between])
        turned = (u < 0) & (u > -self.full)
        return np.asarray(result + 1j * np.pi * turned)[None]

    def primitive(self, m: Points, v: Inner) -> Points:
        """Integral of its share of t over M, from 0."""
        x = self.scale * m
        piece = x_log_x(x) - x_log_x(1.0 + x) + x * v[0] - self.law.mean_log(np.exp(v[0]))
        return np.asarray(self.count * piece / self.scale)

    def order_at(self, lowest: float) -> float:
        """With which power of M + lowest its factor of z vanishes as M falls to -lowest."""
        order = 0.0
        if abs(self.scale * lowest - 1.0) < 1e-12:
            order -= self.count  # 1 / (1 + u)
        if abs(self.scale * lowest - self.full) < 1e-12:
            order += self.count  # w vanishes with 1 - p0 + u
        return order

    def gapped_below(self, lowest: float) -> bool:
        """Whether w is analytic where M passes -lowest."""
        return self.scale * lowest < self.full - 1e-12 or not any(low == 0.0 for low, _ in self.law.ranges)


def _root(gap: Callable[[Reals, Indices], tuple[Reals, Reals]], guess: Reals, low: float, high: float) -> Reals:
    """Where a falling function vanishes: Newton in a bracket, each point for itself."""
    x = guess.copy()
    lows, highs = np.full(x.shape, low), np.full(x.shape, high)
    active = np.arange(len(x))
    for step in range(90):
        value, slope = gap(x[active], active)
        here = x[active]
        lows[active] = np.where(value > 0, here, lows[active])
        highs[active] = np.where(value > 0, highs[active], here)
        new = here - value / slope
        inside = (new > lows[active]) & (new < highs[active]) & (step % 5 != 4)
        new = np.where(inside, new, (lows[active] + highs[active]) / 2)
        x[active] = new
        active = active[np.abs(new - here) > 1e-13 * np.maximum(1.0, np.abs(here))]
        if not len(active):
            break
    return x


def _above(kind: Kind, u: Reals) -> Reals:
    """log w > the top of the law, in the distance from it."""
    top = max([s for s, _ in kind.law.atoms] + [b for _, b in kind.law.ranges])
    target = np.log(u)

    def gap(x: Reals, at: Indices) -> tuple[Reals, Reals]:
        away = np.exp(x)
        value, _, slope = kind.law.transform(top + away + 0j)
        return np.log(np.abs(value.real)) - target[at], away * (slope / value).real

    with np.errstate(all="ignore"):
        lowest = np.log(top) - 34.0
        x = _root(gap, -target + np.log(kind.law.moment(1)), lowest, _REACH)
        return np.asarray(np.where(x > lowest + 1e-6, np.log(top + np.exp(x)), np.nan))


def _negative(kind: Kind, u: Reals) -> Reals:
    """log |w| on the negative axis."""
    target = np.log(-u) - np.log1p(u)

    def gap(x: Reals, at: Indices) -> tuple[Reals, Reals]:
        w = -np.exp(x) + 0j
        value, rest, slope = kind.law.transform(w)
        return np.log(-value.real) - np.log(rest.real) - target[at], (w * slope / (value * rest)).real

    with np.errstate(all="ignore"):
        return _root(gap, -target + np.log(kind.law.moment(1)), -_REACH, _REACH)


def _below(kind: Kind, u: Reals, full: float) -> Reals:
    """log w between zero and the law."""
    end = min([s for s, _ in kind.law.atoms if s > 0] + [low for low, _ in kind.law.ranges])
    if end == 0.0:
        return np.full(u.shape, np.nan)
    target = np.log(-u)

    def gap(x: Reals, at: Indices) -> tuple[Reals, Reals]:
        # x = log(w / (end - w)), turned round so that the function falls.
        w = end / (1.0 + np.exp(x)) + 0j
        value, _, slope = kind.law.transform(w)
        return np.log(-value.real) - target[at], (slope / value).real * -(w * (1.0 - w / end)).real

    with np.errstate(all="ignore"):
        x = _root(gap, np.zeros(u.shape), -34.0, 40.0)
        return np.asarray(np.where(x > -33.9, np.log(end) - np.logaddexp(0.0, x), np.nan))
