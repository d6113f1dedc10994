"""The master equation of unlike layers, and what can be read off it where M and every w_k are real."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from torch_rmt.theory.chain_parts import Inner, Part, Points, State, Term, log_one_plus
from torch_rmt.theory.slope_law import x_log_x

Reals = Float[np.ndarray, " points"]
Column = Float[np.ndarray, "unknowns 1"]


@dataclass(frozen=True, eq=False)
class ChainEquations:
    """log z = log((1 + M) / M) + sum of terms + sum of kinds, M = E[lambda / (z - lambda)].

    Source: Pennington, Schoenholz and Ganguli 2017, eq. (14), for unlike widths by tr(AB) = tr(BA) between spaces of
    different dimension.
    """

    terms: tuple[Term, ...]
    kinds: tuple[Part, ...]
    lowest: float  # M tends to -lowest at z -> 0: one less the atom at zero
    drift: float = 0.0  # adds drift * M to log z: infinitely many factors near one

    @cached_property
    def rows(self) -> tuple[slice, ...]:
        """Which unknowns belong to which part."""
        ends = np.cumsum([0] + [kind.size for kind in self.kinds])
        return tuple(slice(int(a), int(b)) for a, b in pairwise(ends))

    @cached_property
    def unknowns(self) -> int:
        """How many inner unknowns there are."""
        return sum(kind.size for kind in self.kinds)

    @cached_property
    def low(self) -> Column:
        """Below the imaginary parts of the unknowns, one a row."""
        return np.concatenate([np.zeros(0)] + [kind.low for kind in self.kinds])[:, None]

    @cached_property
    def high(self) -> Column:
        """Above the imaginary parts of the unknowns, one a row."""
        return np.concatenate([np.zeros(0)] + [kind.high for kind in self.kinds])[:, None]

    @cached_property
    def turn(self) -> Column:
        """The imaginary parts of the unknowns where z < 0, one a row."""
        return np.concatenate([np.zeros(0)] + [kind.turn for kind in self.kinds])[:, None]

    # Trial points may leave the domain: what is not finite is refused by whoever asked.
    @np.errstate(all="ignore")
    def evaluate(self, y: Points, v: Inner) -> State:
        """t, its slope and the corrections at given unknowns; M in the closed lower half-plane, w_k in the upper."""
        m = np.exp(y)
        t = log_one_plus(m) - y + self.drift * m
        rate = m / (1.0 + m) - 1.0 + self.drift * m
        lag = np.zeros_like(t)
        for term in self.terms:
            inner = term.a + term.b * m
            t = t + term.count * np.log(inner)
            rate = rate + term.count * term.b * m / inner
        follow, correction = np.empty_like(v), np.empty_like(v)
        for kind, rows in zip(self.kinds, self.rows, strict=True):
            share = kind.evaluate(y, v[rows])
            t, rate, lag = t + share.t, rate + share.rate, lag + share.lag
            follow[rows], correction[rows] = share.follow, share.correction
        return State(y, v, t, rate, follow, correction, lag)

    def newton(self, state: State, target: Points) -> tuple[Points, Inner]:
        """Steps in y and v towards log z = target: the border of the arrowhead eliminated by hand."""
        with np.errstate(all="ignore"):
            dy = (target - state.t - state.lag) / state.rate
            return dy, state.follow * dy[None, :] + state.correction

    def primitive(self, m: Points, v: Inner) -> Points:
        """Integral of log z over M, from 0."""
        total = x_log_x(1.0 + m) - x_log_x(m) + self.drift * m**2 / 2
        for term in self.terms:
            if term.b == 0.0:
                total = total + term.count * m * np.log(term.a)
                continue
            inner = term.a + term.b * m
            total = total + term.count * ((x_log_x(inner) - term.a * np.log(term.a)) / term.b - m)
        for kind, rows in zip(self.kinds, self.rows, strict=True):
            total = total + kind.primitive(m, v[rows])
        return np.asarray(total)

    @cached_property
    def reaches_zero(self) -> bool:
        """Whether the continuous part goes down to zero.

        As M falls to -lowest, z vanishes like (M + lowest)^c. For c = 1 that is a regular point, with a gap above
        zero; for c >= 2 a branch point, with a density that diverges like lambda^(1/c - 1).
        """
        order = 1.0 if abs(self.lowest - 1.0) < 1e-12 else 0.0
        order += sum(term.count for term in self.terms if abs(term.a - term.b * self.lowest) < 1e-12)
        order += sum(kind.order_at(self.lowest) for kind in self.kinds)
        return order > 1.5 or not all(kind.gapped_below(self.lowest) for kind in self.kinds)

    @property
    def may_have_gaps(self) -> bool:
        """Whether the spectrum can have a gap with mass on either side.

        There every w_k is real and the mass below is a sum of what each law has below its w_k: some law needs a gap.
        """
        return any(kind.has_gaps for kind in self.kinds)

    def real_state(self, y: Reals, sign: float) -> State:
        """The solution at real M = sign * exp(y), w_k found from scratch."""
        m = sign * np.exp(y)
        v = np.concatenate([np.zeros((0, len(y)), dtype=complex)] + [kind.start(m) for kind in self.kinds])
        return self.evaluate(y - (0j if sign > 0 else 1j * np.pi), v)

    @cached_property
    def _kept(self) -> dict[tuple[float, bytes], State]:
        return {}

    def kept_state(self, y: Reals, sign: float) -> State:
        """`real_state`, computed once for blocks that share a branch."""
        key = sign, y.tobytes()
        if key not in self._kept:
            self._kept[key] = self.real_state(y, sign)
        return self._kept[key]

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
        excess = np.linspace(-32.0, 12.3, 67)  # not through 0: there a block's unknowns may be infinite
        y = np.log(self.lowest) + np.log1p(np.exp(excess))
        for _ in range(3):
            state = self.real_state(y, -1.0)
            # What rounding denies close to -lowest is no fall.
            known = np.isfinite(state.t.real) | (y - np.log(self.lowest) > 1e-5)
            falls = np.flatnonzero(known & ~(state.rate.real > 0))
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
            if not np.abs(here.correction).max(initial=0.0) > 1e-13 * max(1.0, np.abs(here.follow).max(initial=0.0)):
                break
            with np.errstate(all="ignore"):
                step = here.correction * np.minimum(1.0, 0.5 / np.maximum(np.abs(here.correction), 1e-300))
            here = self.evaluate(y, here.v + step)
        return here

    def critical(self, y: Points, v: Inner, other: Points) -> State:
        """The solution with dt / dy = 0 near y, by the secant rule from y and another point."""
        with np.errstate(all="ignore"):
            before = self.settle(y, v)
            now = self.settle(other, before.v + (other - y)[None, :] * before.follow)
            for _ in range(30):
                change = (now.y - before.y) * now.rate / (now.rate - before.rate)
                # t is stationary here: it is off by the square of this.
                if not np.isfinite(change).all() or np.abs(change).max() < 1e-10:
                    break
                change *= np.minimum(1.0, 0.3 / np.abs(change))
                before, now = now, self.settle(now.y - change, now.v - change[None, :] * now.follow)
                if not np.abs(now.correction).max(initial=0.0) < 1e-3:
                    break  # the w_k were lost: whoever asked sees it from a t far off
        return now
