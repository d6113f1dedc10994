"""The master equation of unlike layers, and what can be read off it where M and every w_k are real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from torch_rmt.theory.chain_parts import Inner, Kind, Points, State, Term

Reals = Float[np.ndarray, " points"]
Places = Float[np.ndarray, "kinds points"]
Indices = Int[np.ndarray, " some"]

_REACH = 340.0  # |log w| at most: beyond it the squares of float64 overflow


@dataclass(frozen=True, eq=False)
class ChainEquations:
    """log z = log((1 + M) / M) + sum of terms + sum of kinds, M = E[lambda / (z - lambda)].

    Source: Pennington, Schoenholz and Ganguli 2017, eq. (14), for unlike widths by tr(AB) = tr(BA) between spaces of
    different dimension.
    """

    terms: tuple[Term, ...]
    kinds: tuple[Kind, ...]
    lowest: float  # M tends to -lowest at z -> 0: one less the atom at zero
    drift: float = 0.0  # adds drift * M to log z: infinitely many factors near one

    # Trial points may leave the domain: what is not finite is refused by whoever asked.
    @np.errstate(all="ignore")
    def evaluate(self, y: Points, v: Inner) -> State:
        """t, its slope and the mismatches at given unknowns; M in the closed lower half-plane, w_k in the upper."""
        m = np.exp(y)
        power = sum(kind.count for kind in self.kinds) - 1
        t = np.log(1.0 + m) + power * y + self.drift * m
        rate = m / (1.0 + m) + power + self.drift * m
        for term in self.terms:
            inner = term.a + term.b * m
            t = t + term.count * np.log(inner)
            rate = rate + term.count * term.b * m / inner
        pull, mismatch = np.empty_like(v), np.empty_like(v)
        for k, kind in enumerate(self.kinds):
            w = np.exp(v[k])
            value, _, slope = kind.law.transform(w)
            u = kind.scale * m
            t = t + kind.count * (v[k] + np.log(kind.scale) - np.log(1.0 + u))
            rate = rate - kind.count * u / (1.0 + u)
            pull[k] = w * slope / value
            # A quotient near one: its principal logarithm is right on either side of the branch cut.
            mismatch[k] = np.log(value / u)
            rate = rate + kind.count / pull[k]
        return State(y, v, t, rate, pull, mismatch)

    def newton(self, state: State, target: Points) -> tuple[Points, Inner]:
        """Steps in y and v towards log z = target: the border of the arrowhead eliminated by hand."""
        residual = target - state.t
        for k, kind in enumerate(self.kinds):
            residual = residual + kind.count * state.mismatch[k] / state.pull[k]
        with np.errstate(all="ignore"):
            dy = residual / state.rate
            return dy, (dy[None, :] - state.mismatch) / state.pull

    def inner(self, m: Reals) -> Places:
        """log |w_k| at real M > -1; NaN where a law does not reach.

        w_k lies above its law for M > 0, on the negative axis for -(1 - p0) < scale M < 0, p0 the law's mass at zero,
        and below the law's continuous part and atoms beyond that.
        """
        result = np.full((len(self.kinds), len(m)), np.nan)
        for k, kind in enumerate(self.kinds):
            u = kind.scale * m
            full = 1.0 - kind.law.mass_at(0.0)
            above, below = m > 0, u <= -full * (1 - 1e-15)
            result[k, above] = _above(kind, u[above])
            result[k, below] = _below(kind, u[below], full)
            between = ~above & ~below
            result[k, between] = _negative(kind, u[between])
        return result

    def gapped_below(self, kind: Kind) -> bool:
        """Whether w of this kind is analytic where M passes -lowest, so that it lets the spectrum end above zero."""
        if kind.scale * self.lowest < 1.0 - kind.law.mass_at(0.0) - 1e-12:
            return True
        return not any(low == 0.0 for low, _ in kind.law.ranges)

    @cached_property
    def reaches_zero(self) -> bool:
        """Whether the continuous part goes down to zero.

        As M falls to -lowest, z vanishes like (M + lowest)^c. For c = 1 that is a regular point, with a gap above
        zero; for c >= 2 a branch point, with a density that diverges like lambda^(1/c - 1).
        """
        order = 1.0 if abs(self.lowest - 1.0) < 1e-12 else 0.0
        order += sum(term.count for term in self.terms if abs(term.a - term.b * self.lowest) < 1e-12)
        for kind in self.kinds:
            full = 1.0 - kind.law.mass_at(0.0)
            if abs(kind.scale * self.lowest - 1.0) < 1e-12:
                order -= kind.count  # 1 / (1 + u)
            if abs(kind.scale * self.lowest - full) < 1e-12:
                order += kind.count  # w vanishes with 1 - p0 + u
        return order > 1.5 or not all(self.gapped_below(kind) for kind in self.kinds)

    @property
    def may_have_gaps(self) -> bool:
        """Whether the spectrum can have a gap with mass on either side.

        There every w_k is real and the mass below is a sum of what each law has below its w_k: some law needs a gap.
        """
        return any(len(kind.law.holes()) - (not kind.law.mass_at(0.0) and kind.law.holes()[0][0] == 0.0) > 1
                   for kind in self.kinds)  # fmt: skip

    def real_state(self, y: Reals, sign: float) -> State:
        """The solution at real M = sign * exp(y), w_k found from scratch."""
        m = sign * np.exp(y)
        log_w = self.inner(m)
        turned = np.array([(kind.scale * m < 0) & (kind.scale * m > -(1.0 - kind.law.mass_at(0.0)))
                           for kind in self.kinds]).reshape(log_w.shape)  # fmt: skip
        return self.evaluate(y - (0j if sign > 0 else 1j * np.pi), log_w + 1j * np.pi * turned)

    @cached_property
    def top(self) -> float:
        """log of the highest point of the spectrum: the least log z over real M > 0."""
        y = np.linspace(-35.0, 35.0, 36)
        for _ in range(3):
            state = self.real_state(y, 1.0)
            rises = np.flatnonzero(~(state.rate.real < 0))
            at = int(rises[0]) if len(rises) else len(y) - 1
            low, high = max(at - 1, 0), at
            if y[high] - y[low] < 1e-3:
                break
            last = np.isnan(state.t.real[high])
            y = np.linspace(y[low], y[high], 17)
        if last:
            # A law that ends like a square root: M stops growing before t stops falling.
            return float(np.nanmin(self.real_state(np.linspace(y[0], y[-1], 400), 1.0).t.real))
        return self._turning_point(state, low, high)

    @cached_property
    def bottom(self) -> float:
        """log of the lowest point of the spectrum, -inf where it reaches zero: the greatest log z over M < -lowest."""
        if self.reaches_zero:
            return float("-inf")
        excess = np.linspace(-32.0, 12.0, 67)
        y = np.log(self.lowest) + np.log1p(np.exp(excess))
        for _ in range(3):
            state = self.real_state(y, -1.0)
            falls = np.flatnonzero(~(state.rate.real > 0))
            at = int(falls[0]) if len(falls) else len(y) - 1
            low, high = max(at - 1, 0), at
            last = np.isnan(state.t.real[high])
            if at == 0 or y[high] - y[low] < 1e-3 * (y[high] - np.log(self.lowest)):
                break
            y = np.linspace(y[low], y[high], 17)
        if last:
            t = self.real_state(np.linspace(y[low], y[high], 200), -1.0).t.real
            return float(np.nanmax(t)) if np.isfinite(t).any() else float("-inf")
        return self._turning_point(state, low, high)

    def _turning_point(self, state: State, low: int, high: int) -> float:
        """t where dt / dy = 0 between two real solutions."""
        critical = self.critical(state.y[[low]], state.v[:, [low]], state.y[[high]])
        t = float(critical.t.real[0])
        ends = state.t.real[[low, high]]
        return t if np.isfinite(t) and abs(t - ends.mean()) < 1.0 + np.ptp(ends) else float(ends.mean())

    def settle(self, y: Points, v: Inner) -> State:
        """The w_k that belong to y, by Newton from nearby ones."""
        here = self.evaluate(y, v)
        for _ in range(30):
            if not np.abs(here.mismatch).max(initial=0.0) > 1e-13:
                break
            with np.errstate(all="ignore"):
                step = here.mismatch / here.pull
                step *= np.minimum(1.0, 0.5 / np.maximum(np.abs(step), 1e-300))
            here = self.evaluate(y, here.v - step)
        return here

    def critical(self, y: Points, v: Inner, other: Points) -> State:
        """The solution with dt / dy = 0 near y, by the secant rule from y and another point."""
        with np.errstate(all="ignore"):
            before = self.settle(y, v)
            now = self.settle(other, before.v + (other - y)[None, :] / before.pull)
            for _ in range(30):
                change = (now.y - before.y) * now.rate / (now.rate - before.rate)
                # t is stationary here: it is off by the square of this.
                if not np.isfinite(change).all() or np.abs(change).max() < 1e-10:
                    break
                change *= np.minimum(1.0, 0.3 / np.abs(change))
                before, now = now, self.settle(now.y - change, now.v - change[None, :] / now.pull)
                if not np.abs(now.mismatch).max(initial=0.0) < 1e-3:
                    break  # the w_k were lost: whoever asked sees it from a t far off
        return now


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
