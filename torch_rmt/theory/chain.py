"""The Jacobian law of unlike layers: Newton on an arrowhead system, continued from the negative axis (solver B)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from torch_rmt.theory.chain_parts import Inner, Kind, Points, State, Term, put, take
from torch_rmt.theory.slope_law import x_log_x

Reals = Float[np.ndarray, " points"]

_TABLE = 96
_DEEPEST = 680.0  # lambda underflows beyond this distance below the top, in logs


@dataclass(frozen=True, eq=False)
class Chain:
    """log z = log((1 + M) / M) + sum of terms + sum of kinds, M = E[lambda / (z - lambda)].

    Source: Pennington, Schoenholz and Ganguli 2017, eq. (14), for unlike widths by tr(AB) = tr(BA) between spaces of
    different dimension; continuation and guards as theory.md, solver B, "found by experiment".
    """

    terms: tuple[Term, ...]
    kinds: tuple[Kind, ...]
    lowest: float  # M tends to -lowest at z -> 0: one less the atom at zero
    drift: float = 0.0  # adds drift * M to log z: infinitely many factors near one

    # --- the equations

    # Trial points may leave the domain: what is not finite is refused by the guards of the continuation.
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
        dy = residual / state.rate
        return dy, (dy[None, :] - state.mismatch) / state.pull

    @np.errstate(all="ignore")
    def inner(self, m: Reals, *, above: bool) -> Float[np.ndarray, "kinds points"]:
        """log |w_k| at real M: w_k above its law for M > 0, on the negative axis for -lowest < M < 0."""
        result = np.zeros((len(self.kinds), len(m)))
        for k, kind in enumerate(self.kinds):
            target = np.log(np.abs(kind.scale * m))
            top = np.log(max([s for s, _ in kind.law.atoms] + [b for _, b in kind.law.ranges]))
            low = np.full(m.shape, -720.0 if not above else top)
            high = np.full(m.shape, 720.0)
            guess = np.clip(-target, low + 1e-9, high) if not above else np.logaddexp(top, -target)
            for step in range(100):
                w = np.exp(guess) * (1.0 if above else -1.0) + 0j
                with np.errstate(all="ignore"):
                    value, _, slope = kind.law.transform(w)
                    gap = np.log(np.abs(value.real)) - target
                    move = gap / (w * slope / value).real
                # |M_k| falls with |w|.
                low, high = np.where(gap > 0, guess, low), np.where(gap > 0, high, guess)
                new = guess - move
                inside = (new > low) & (new < high) & np.isfinite(new) & (step % 4 != 3)
                # Close to the top of the law the distance, not w, is what varies.
                half = top + np.exp((np.log(low - top + 1e-14) + np.log(high - top)) / 2) if above else (low + high) / 2
                new = np.where(inside, new, half)
                if (np.abs(new - guess) <= 1e-14 * np.maximum(1.0, np.abs(guess))).all():
                    break
                guess = new
            result[k] = guess
        return result

    # --- continuation

    @cached_property
    def _negative_table(self) -> tuple[Reals, Points, Inner]:
        """(t, y, v) on the negative axis of z, where all is real and monotone."""
        grid = np.concatenate([np.linspace(-690, -40, 40), np.linspace(-38, 30, 100)])
        # M from -lowest to 0 by a logistic in the grid, both ends resolved.
        m = -self.lowest / (1.0 + np.exp(grid))
        v = self.inner(m, above=False) + 1j * np.pi
        state = self.evaluate(np.log(-m) - 1j * np.pi, v)
        good = np.isfinite(state.t.real) & (np.abs(state.mismatch).max(axis=0, initial=0.0) < 1e-8)
        t = state.t.real[good]
        t, order = np.unique(t, return_index=True)
        return t, state.y[good][order], v[:, good][:, order]

    def start(self, t: Reals) -> State:
        """The solution at z = -exp(t)."""
        knots, y_knots, v_knots = self._negative_table

        def follow(values: Float[np.ndarray, " knots"]) -> Reals:
            # Logarithms are linear in t beyond the table.
            first = values[0] + (t - knots[0]) * (values[1] - values[0]) / (knots[1] - knots[0])
            last = values[-1] + (t - knots[-1]) * (values[-1] - values[-2]) / (knots[-1] - knots[-2])
            inside = np.where(t > knots[-1], last, np.interp(t, knots, values))
            return np.asarray(np.where(t < knots[0], first, inside))

        y = follow(y_knots.real) - 1j * np.pi
        v = np.array([follow(row.real) for row in v_knots]).reshape(len(self.kinds), len(t)) + 1j * np.pi
        state = self.evaluate(y, v)
        for _ in range(12):
            dy, dv = self.newton(state, t + 1j * np.pi)
            size = np.maximum(np.abs(dy), np.abs(dv).max(axis=0, initial=0.0))
            cut = np.minimum(1.0, 0.5 / np.maximum(size, 1e-300))
            new_y = state.y + cut * dy
            new_y = np.minimum(new_y.real, np.log(self.lowest) - 1e-18) - 1j * np.pi
            state = self.evaluate(new_y, (state.v + cut * dv).real + 1j * np.pi)
            if size.max() < 1e-13:
                break
        return state

    def above(self, log_z: Points) -> State:
        """The solution at log z in the strip 0 <= Im <= pi; NaN where the continuation could not get through."""
        return self._turn(self.start(log_z.real), log_z.real + 1j * np.pi, log_z, 0)

    def _turn(self, state: State, begin: Points, end: Points, depth: int) -> State:
        """Follow log z from begin to end; steps that the guards refuse are halved, for those points alone."""
        pieces = 8 if depth == 0 else 2
        failed = np.zeros(len(begin), dtype=bool)
        here = begin
        for k in range(1, pieces + 1):
            target = begin + (end - begin) * k / pieces
            moved, good = self._step(state, here, target)
            bad = ~good & ~failed
            if bad.any():
                if depth < 16:
                    part = self._turn(take(state, bad), here[bad], target[bad], depth + 1)
                    moved = put(moved, bad, part)
                    failed |= bad & np.isnan(moved.y)
                else:
                    failed |= bad
            state, here = moved, target
        if failed.any():
            state = put(state, failed, take(state, failed, lost=True))
        return state

    def _step(self, state: State, here: Points, target: Points) -> tuple[State, np.ndarray]:
        with np.errstate(all="ignore"):
            dy = (target - here) / state.rate
            y, v = state.y + dy, state.v + dy[None, :] / state.pull
            good = np.abs(dy) < 0.7
            new = self.evaluate(y, v)
            for _ in range(5):
                dy, dv = self.newton(new, target)
                size = np.maximum(np.abs(dy), np.abs(dv).max(axis=0, initial=0.0))
                if not (size > 1e-12).any():
                    break
                new = self.evaluate(new.y + dy, new.v + dv)
            drift = np.maximum(np.abs(new.y - y), np.abs(new.v - v).max(axis=0, initial=0.0))
            good &= (size < 1e-7) & (drift < 0.1)
            good &= (new.y.imag <= 1e-9) & (new.y.imag >= -np.pi - 1e-9)
            if len(self.kinds):
                good &= (new.v.imag >= -1e-9).all(axis=0) & (new.v.imag <= np.pi + 1e-9).all(axis=0)
        return new, good

    # --- edges and tables

    @cached_property
    def reaches_zero(self) -> bool:
        """Whether the continuous part goes down to zero.

        As M falls to -lowest, z vanishes like (M + lowest)^c. For c = 1 that is a regular point, with a gap above
        zero; for c >= 2 a branch point, with a density that diverges like lambda^(1/c - 1).
        """
        order = 1.0 if abs(self.lowest - 1.0) < 1e-12 else 0.0
        order += sum(term.count for term in self.terms if abs(term.a - term.b * self.lowest) < 1e-12)
        for kind in self.kinds:
            at_zero = kind.law.mass_at(0.0)
            if at_zero > 0 and abs(kind.scale * self.lowest - (1 - at_zero)) < 1e-12:
                order += kind.count
        return order > 1.5 or any(low == 0.0 for kind in self.kinds for low, _ in kind.law.ranges)

    @cached_property
    def _intervals(self) -> tuple[tuple[float, float, np.ndarray, np.ndarray, np.ndarray], ...]:
        """(log low, log high, t, y, v) for each interval of the spectrum."""
        top = self._top()
        # Where less than 1e-13 of the mass is left below, nothing more is looked for.
        knots, y_knots, _ = self._negative_table
        left = 1.0 - np.exp(y_knots.real) / self.lowest
        bottom = knots[np.searchsorted(left, 1e-13)] if (left < 1e-13).any() else knots[0]
        span = min(max(top - bottom, 3.0), _DEEPEST)
        x = (np.arange(2 * _TABLE) + 0.5) / (2 * _TABLE)
        t = (top - span * x**2)[::-1]
        state = self.above(t + 0j)
        found = np.isfinite(state.y)
        t, state = t[found], take(state, found)
        m = np.exp(state.y)
        # Outside the spectrum M is real. Near zero it is M + lowest that is small, and says so first.
        inside = (-state.y.imag > 1e-7) & (-state.y.imag < np.pi - 1e-7)
        if self.reaches_zero:
            first = int(np.argmax(inside & (np.interp(t, knots, left) > 1e-6)))
            inside[:first] = -m.imag[:first] > 0
        else:
            inside &= (np.abs(m.imag) > 1e-6 * np.abs(m + self.lowest)) & (np.interp(t, knots, left) > 1e-9)
        changes = np.flatnonzero(inside[1:] != inside[:-1]) + 1
        bounds = np.concatenate([[0], changes, [len(t)]])
        intervals: list[tuple[float, float, np.ndarray, np.ndarray, np.ndarray]] = []
        for begin, stop in pairwise(bounds):
            if not inside[begin]:
                continue
            if begin == 0 or (self.reaches_zero and not intervals):
                low = float("-inf")
            else:
                low = self._edge(take(state, np.array([begin])), float(t[begin - 1]), float(t[begin]))
            high = top
            if stop < len(t):
                high = self._edge(take(state, np.array([stop - 1])), float(t[stop]), float(t[stop - 1]))
            if np.isinf(low):
                members = np.arange(begin, stop)
                intervals.append((low, high, t[members], state.y[members], state.v[:, members]))
                continue
            grid = (np.arange(_TABLE) + 0.5) / _TABLE
            knots_t = low + (high - low) * np.sin(np.pi / 2 * grid) ** 2
            fresh = self.above(knots_t + 0j)
            keep = np.isfinite(fresh.y)
            intervals.append((low, high, knots_t[keep], fresh.y[keep], fresh.v[:, keep]))
        return tuple(intervals)

    def _top(self) -> float:
        """log of the highest point of the spectrum: the least log z over real M > 0."""
        y = np.linspace(-60.0, 60.0, 121)
        for _ in range(9):
            state = self.evaluate(y + 0j, self.inner(np.exp(y), above=True) + 0j)
            t = np.where(np.isfinite(state.t.real), state.t.real, np.inf)
            best = int(np.argmin(t))
            y = np.linspace(y[max(best - 1, 0)], y[min(best + 1, len(y) - 1)], 17)
        return float(t[best])

    def _edge(self, state: State, outer: float, inner: float) -> float:
        """The t between outer and inner where dt / dy = 0, by the secant rule in y from the nearest point inside."""
        y, v = state.y, state.v

        def settle(y: Points, v: Inner) -> State:
            here = self.evaluate(y, v)
            for _ in range(30):
                if not np.abs(here.mismatch).max(initial=0.0) > 1e-13:
                    break
                here = self.evaluate(y, here.v - here.mismatch / here.pull)
            return here

        with np.errstate(all="ignore"):
            before = settle(y, v)
            step = np.where(before.y.imag < -np.pi / 2, -1j * (np.pi + before.y.imag), -1j * before.y.imag) * 0.3
            now = settle(y + step, before.v)
            for _ in range(60):
                change = (now.y - before.y) * now.rate / (now.rate - before.rate)
                if not np.isfinite(change).all() or np.abs(change).max() < 1e-13:
                    break
                change *= np.minimum(1.0, 0.3 / np.abs(change))
                before, now = now, settle(now.y - change, now.v)
        t = float(now.t.real[0])
        low, high = min(outer, inner), max(outer, inner)
        # An edge is real; a value off the bracket is another critical point, and the bracket is then all we know.
        return t if low - 1e-9 <= t <= high + 1e-9 else (low + high) / 2

    @property
    def edges(self) -> tuple[tuple[float, float], ...]:
        """(log low, log high) of each interval of the spectrum; -inf for a hard edge at zero."""
        return tuple((low, high) for low, high, _, _, _ in self._intervals)

    def knots(self) -> tuple[np.ndarray, ...]:
        """The t of each table."""
        return tuple(t for _, _, t, _, _ in self._intervals)

    # --- what the law asks for

    def solve(self, t: Reals) -> tuple[Inner, Points]:
        """(w, M) at real t inside the spectrum; NaN outside."""
        y = np.full(t.shape, np.nan + 0j)
        v = np.full((len(self.kinds), len(t)), np.nan + 0j)
        for low, high, knots, y_knots, v_knots in self._intervals:
            reach = low if np.isfinite(low) else knots[0]
            inside = np.flatnonzero((t > reach) & (t < high))
            if inside.size:
                y[inside], v[:, inside] = self._solve_in(t[inside], low, high, knots, y_knots, v_knots)
        return np.exp(v), np.exp(y)

    def _solve_in(
        self, t: Reals, low: float, high: float, knots: np.ndarray, y_knots: np.ndarray, v_knots: np.ndarray
    ) -> tuple[Points, Inner]:
        def straight(values: Reals) -> Reals:
            if np.isinf(low):
                return -np.sqrt(np.maximum(high - values, 0.0))
            return -np.arccos(np.clip(2 * (values - low) / (high - low) - 1, -1, 1))

        at, want = straight(knots), straight(t)

        def follow(values: np.ndarray) -> np.ndarray:
            # Linear through the last two knots towards an edge: y moves as the square root of the distance.
            ends = np.array([at[0] - (at[1] - at[0]), at[-1] + (at[-1] - at[-2])])
            padded = np.concatenate([[2 * values[0] - values[1]], values, [2 * values[-1] - values[-2]]])
            grid = np.concatenate([[ends[0]], at, [ends[1]]])
            return np.asarray(np.interp(want, grid, padded.real) + 1j * np.interp(want, grid, padded.imag))

        y, v = follow(y_knots), np.array([follow(row) for row in v_knots]).reshape(len(self.kinds), len(t))
        y = y.real + 1j * np.clip(y.imag, -np.pi + 1e-12, -1e-12)
        v = v.real + 1j * np.clip(v.imag, 1e-12, np.pi - 1e-12)
        y, v, good = self._polish(y, v, t)
        if not good.all():
            sure = self.above(t[~good] + 0j)
            y[~good], v[:, ~good] = sure.y, sure.v
        return y, v

    def _polish(self, y: Points, v: Inner, t: Reals) -> tuple[Points, Inner, np.ndarray]:
        target = t + 0j
        start_y = y
        with np.errstate(all="ignore"):
            state = self.evaluate(y, v)
            size = np.full(t.shape, np.inf)
            for _ in range(12):
                dy, dv = self.newton(state, target)
                size = np.maximum(np.abs(dy), np.abs(dv).max(axis=0, initial=0.0))
                if not (size > 1e-15).any():
                    break
                cut = np.minimum(1.0, 0.5 / np.maximum(size, 1e-300))
                old = state
                new_y, new_v = old.y + cut * dy, old.v + cut * dv
                # Steps that would leave the half-planes go three quarters of the way to their border.
                new_y = new_y.real + 1j * np.clip(new_y.imag, -np.pi + (np.pi + old.y.imag) / 4, old.y.imag / 4)
                new_v = new_v.real + 1j * np.clip(new_v.imag, old.v.imag / 4, np.pi - (np.pi - old.v.imag) / 4)
                state = self.evaluate(new_y, new_v)
                if (size < 1e-13).all():
                    break
            good = (size < 1e-7) & (np.abs(state.y - start_y) < 0.5) & (np.abs(state.t - t) < 1e-7 * (1 + np.abs(t)))
        return state.y, state.v, good

    def solve_above(self, log_z: Points) -> tuple[Inner, Points]:
        """(w, M) for complex log z, 0 < Im log z <= pi.

        Raises:
            ArithmeticError: the continuation did not get through.
        """
        state = self.above(log_z)
        if not np.isfinite(state.y).all():
            raise ArithmeticError(
                "the continuation of the Stieltjes transform stalled: ask nearer the spectrum's own scale."
            )
        return np.exp(state.v), np.exp(state.y)

    def potential(self, log_z: Points, w: Inner, u: Points) -> Points:
        """Integral of log(z - lambda): (1 + M) log z - I(M), I the integral of log z over M from 0."""
        m = u
        total = x_log_x(1.0 + m) - x_log_x(m) + self.drift * m**2 / 2
        for term in self.terms:
            if term.b == 0.0:
                total = total + term.count * m * np.log(term.a)
                continue
            inner = term.a + term.b * m
            total = total + term.count * ((x_log_x(inner) - term.a * np.log(term.a)) / term.b - m)
        for k, kind in enumerate(self.kinds):
            x = kind.scale * m
            piece = x_log_x(x) - x_log_x(1.0 + x) + x * np.log(w[k]) - kind.law.mean_log(w[k])
            total = total + kind.count * piece / kind.scale
        return np.asarray((1.0 + m) * log_z - total)
