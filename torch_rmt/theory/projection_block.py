"""A residual block whose shortcut changes the width: real solutions of its equations, on which all others rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Complex, Float

from torch_rmt.theory.block import Block
from torch_rmt.theory.chain_parts import Flags, Inner, Points, State, joined, log_one_plus

Reals = Float[np.ndarray, " points"]
Knots = Float[np.ndarray, " knots"]
Rows = Complex[np.ndarray, "unknowns knots"]

_SETTLED = 1e-6  # what Newton's method may leave of an argument
# Logs of -w in the branch's units, and of what a goes beyond its end: finer where laws are.
_NEGATIVE = np.concatenate(
    [np.linspace(-120, -14, 53, endpoint=False), np.linspace(-14, 14, 225), np.arange(16, 121, 2)]
)
_INNER = np.concatenate([np.linspace(-60, -14, 46, endpoint=False), np.linspace(-14, 14, 225), np.arange(15, 41)])


@dataclass(frozen=True, eq=False)
class ProjectionBlock(Block):
    """A block from one width to another, ratio r = n_in / n_out not one.

    The pairs omega = sqrt(w) ((1 + r a)/(1 + r u), (1 + a)/(1 + u)), and those of b, are subordination functions of
    block matrices (see `measures.rectangular_solver`): in the upper half-plane with sqrt(w), growing with it where they
    are real. That says which real solutions are the right ones. Below the law M passes -1 and -1 / r, and h changes its
    sign at the lower of them: real solutions there come from all sides of the branch's and the shortcut's laws.
    """

    @property
    def rank(self) -> float:
        """Share of the input's dimensions that is not lost."""
        return min(1.0, 1.0 / self.ratio)

    @property
    def _meets_zero(self) -> bool:
        return False

    def order_at(self, lowest: float) -> float:
        """Whether 1 + r M, a factor of the block's, vanishes there."""
        return self.count if self.ratio > 1.0 and abs(self.scale * lowest - self.rank) < 1e-12 else 0.0

    def contained(self, y: Points, v: Inner) -> Flags:
        """As for other blocks, and every omega in the upper half-plane."""
        good = super().contained(y, v)
        u, r = self.scale * np.exp(y), self.ratio
        half = 0.5 * (log_one_plus(u) + log_one_plus(r * u) - self.shortcut.evaluate(v[1])[0]).imag
        for one in np.exp(v[:2]):
            for c in (1.0, r):
                angle = half + log_one_plus(c * one).imag - log_one_plus(c * u).imag
                good = good & (angle > -_SETTLED) & (angle < np.pi + _SETTLED)
        return np.asarray(good)

    def _square(self, state: State) -> Reals:
        """h = (1 + a)(1 + r a) / w at real points of the branch above its law."""
        return self._joint(np.exp(state.y.real), state, 1.0)

    def _joint(self, a: Reals, state: State, sign: float) -> Reals:
        return np.asarray(sign * (1.0 + a) * (1.0 + self.ratio * a) * np.exp(-state.t.real - self.log_scale))

    @cached_property
    @np.errstate(all="ignore")
    def _real_solutions(self) -> tuple[Reals, Flags, Flags, Inner]:
        """(u < 0, whether it solves the equations, whether it does beyond an edge of the law, unknowns)."""
        negative = self.branch.kept_start(_NEGATIVE)
        for _ in range(3):  # closer together where two b of one a meet: 1 + M vanishes near by
            absent = np.isnan(self.shortcut.roots(self._joint(-np.exp(negative.y.real), negative, -1.0))[-1])
            fold = np.flatnonzero(absent[1:] != absent[:-1])
            t = negative.t.real
            if self.shortcut.gaussian or not len(fold):
                break
            fine = np.concatenate([np.linspace(t[i], t[i + 1], 26)[1:-1] for i in fold])
            order = np.argsort(np.concatenate([t, fine]), kind="stable")
            negative = joined(negative, self.branch.start(fine), order)
        found = [
            self._with_roots(negative, -1.0, -1.0),
            self._with_roots(self.branch.kept_state(np.linspace(-120.0, 40.0, 201), 1.0), 1.0, 1.0),
        ]
        if not self.branch.reaches_zero:
            log_a = np.log(self.branch.lowest) + np.logaddexp(0.0, _INNER)
            found.append(self._with_roots(self.branch.kept_state(log_a, -1.0), -1.0, 1.0))
        u, good, beyond, rows = (np.concatenate(pieces, axis=-1) for pieces in zip(*found, strict=True))
        return u, good, beyond, rows

    @np.errstate(all="ignore")
    def _with_roots(self, state: State, side: float, sign: float) -> tuple[Reals, Flags, Flags, Inner]:
        """The branch at real points, a of sign `side` and w of sign `sign`, with every b that has the same h."""
        a, r = side * np.exp(state.y.real), self.ratio
        h, slope = self._joint(a, state, sign), state.rate.real
        # Beyond its own edges the branch solves its equations too, but w turns back there.
        known = np.isfinite(state.t.real) & np.isfinite(slope)
        if sign > 0:
            turned = known & (slope * side > 0)
            clear = np.abs(np.abs(a) - self.branch.lowest) > 1e-9 * self.branch.lowest  # of rounding
            known &= ~turned & ~np.maximum.accumulate(turned & clear)
        log_a, inner = state.y, state.v
        if side > 0:
            log_a, inner = log_a - 2j * np.pi, inner + np.where(self.branch.turn > 0, 2j * np.pi, -2j * np.pi)
        move_a = a / (a / (1.0 + a) + r * a / (1.0 + r * a) - slope)  # by log h, as all slopes here
        columns = []
        for b in self.shortcut.roots(h):
            log_b = np.log(np.abs(b)) - np.where(b > 0, 2j, 1j) * np.pi
            u = a + b
            move_b = b / self.shortcut.evaluate(log_b)[1].real
            move = move_a + move_b
            climb = move / (1.0 + u) + r * move / (1.0 + r * u) - 1.0  # of log z
            grow = [
                (1.0 + c * x) / (1.0 + c * u) * (0.5 * climb + c * dx / (1.0 + c * x) - c * move / (1.0 + c * u))
                for x, dx in ((a, move_a), (b, move_b))
                for c in (1.0, r)
            ]
            one_way = np.abs(np.sign(np.stack(grow)).sum(axis=0)) == 4
            plus = (np.stack([1.0 + c * x for x in (a, b, u) for c in (1.0, r)]) > 0).all(axis=0) & (sign < 0)
            some = known & np.isfinite(u) & (u < 0) & (np.abs(u + self.rank) > 1e-13)
            positive = some & ((1.0 + u) * (1.0 + r * u) / h > 0)
            rising = positive & one_way & (np.sign(grow[0]) == np.sign(climb))
            good = np.where(u > -self.rank, some & ~positive & plus, rising)
            columns.append((u, good, positive & one_way, np.concatenate([[log_a, log_b], inner])))
        u, good, beyond, rows = (np.concatenate(pieces, axis=-1) for pieces in zip(*columns, strict=True))
        return u, good, beyond, rows

    @np.errstate(all="ignore")
    def _regions(self, u: Reals) -> list[tuple[Flags, str, Reals]]:
        """Below the law first h < 0, then h > 0."""
        first, last = -self.rank, -max(1.0, 1.0 / self.ratio)
        return [
            (u > 0, "_above", np.log(u)),
            ((u < 0) & (u > first), "_negative", np.log(-u) - np.log(u - first)),
            ((u < first) & (u > last), "_window", np.log(first - u) - np.log(u - last)),
            (u < last, "_below", np.log(last - u)),
        ]

    @cached_property
    def _negative(self) -> tuple[Knots, Rows]:
        """(place, unknowns) where z is negative."""
        return self._table("_negative")

    @cached_property
    def _window(self) -> tuple[Knots, Rows]:
        """The same between zero and the law, h still negative."""
        return self._table("_window")

    @cached_property
    def _below(self) -> tuple[Knots, Rows]:
        """The same where h is positive."""
        return self._table("_below")

    @np.errstate(all="ignore")
    def _table(self, name: str) -> tuple[Knots, Rows]:
        u, good, beyond, rows = self._real_solutions
        where, place = next((where, place) for where, other, place in self._regions(u) if other == name)
        good = where & good & np.isfinite(place) & np.isfinite(rows).all(axis=0)
        if name != "_negative" and good.any():
            last = place[good].max()
            good |= where & beyond & (place > last) & (place < last + 0.7) & np.isfinite(rows).all(axis=0)
        places, order = np.unique(place[good], return_index=True)
        return places, rows[:, good][:, order]
