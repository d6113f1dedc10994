"""The Jacobian law of equal layers, solved without any choice of branch (solver A)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Complex, Float
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq

from torch_rmt.theory.slope_law import NodeLaw, x_log_x

Points = Complex[np.ndarray, " points"]
Reals = Float[np.ndarray, " points"]
Knots = Float[np.ndarray, " knots"]

_TABLE = 96
_DEEPEST = -680.0  # log of the smallest lambda that is looked for: beyond it float64 underflows


@dataclass(frozen=True, eq=False)
class EqualLayers:
    """t = log z as a function of w for `depth` equal layers, and the curve of w on which z is real.

    With u(w) = E[s / (w - s)], s = phi'^2 scaled to mean one, and z in units of chi^depth,
        orthogonal weights:  t(w) = (1 - depth) log((1 + u) / u) + depth log w,
        Gaussian weights:    t(w) = log((1 + u) / u) + depth log(u w).
    For each |w| there is at most one arg w in (0, pi) with t real, and t grows with |w| along it; so bracketing finds
    the physical solution and no other. The ends of the curve are where dt / d log w = 0 on the real axis.

    Source: the master equation of Pennington, Schoenholz and Ganguli 2017, eq. (14), in the variable w; "found by
    experiment" that the bracket is unique, checked for tanh, erf, ReLU, GELU and hard tanh to depth 8192.
    """

    law: NodeLaw
    depth: float | int
    gaussian: bool

    def evaluate(self, w: Points) -> tuple[Points, Points, Points]:
        """(t, dt / d log w, u) at points of the closed upper half-plane."""
        return self._with_slope(w)[:3]

    # On an atom of the slopes u is infinite: NaN, which is no solution.
    @np.errstate(divide="ignore", invalid="ignore")
    def _with_slope(self, w: Points) -> tuple[Points, Points, Points, Points]:
        u, above, slope = self.law.transform(w)
        outer = 1.0 if self.gaussian else 1.0 - self.depth
        # One layer's factor is near one; its logarithm is taken of the product, whose error depth multiplies.
        per_layer = u * w if self.gaussian else u * w / above
        angle_u, angle_above = np.angle(u), np.angle(above)
        turn = angle_u + np.angle(w) - (0.0 if self.gaussian else angle_above)
        t = np.log(np.abs(above / u)) + self.depth * np.log(np.abs(per_layer))
        t = t + 1j * (angle_above - angle_u + self.depth * turn)
        rate = -outer * slope * w / (u * above) + self.depth
        if self.gaussian:
            rate = rate + self.depth * slope * w / u
        return t, rate, u, slope

    def on_axis(self, r: Reals) -> tuple[Reals, Reals]:
        """(Im t, dt / d log w) at w = r + i0 outside the support of s, where both are real functions."""
        u, _, slope = (part.real for part in self.law.transform(r + 0j))
        outer = 1.0 if self.gaussian else 1.0 - self.depth
        imag = outer * np.where((1.0 + u) / u < 0, np.pi, 0.0)
        rate = -outer * slope * r / (u * (1.0 + u)) + self.depth
        if self.gaussian:
            imag = imag - self.depth * np.where(u < 0, np.pi, 0.0)
            rate = rate + self.depth * slope * r / u
        return imag, rate

    @cached_property
    def arcs(self) -> tuple[tuple[float, float], ...]:
        """The intervals of |w| over which z is real off the axis: one for each interval of the spectrum."""
        outside: list[tuple[float, float]] = []
        for low, high in self.law.holes():
            outside += self._outside(low, high)
        arcs, start = [], 0.0
        for low, high in sorted(outside):
            if low > start:
                arcs.append((start, low))
            start = max(start, high)
        return tuple(arcs)

    def _outside(self, low: float, high: float) -> list[tuple[float, float]]:
        """Parts of the hole (low, high) of the law of s whose w = r + i0 belong to a real z outside the spectrum."""
        ends = np.logspace(-6, -0.31, 120)
        if np.isinf(high):
            # A continuous law ends on its own scale, which may be far below its location.
            spread = min(low, (self.law.moment(2) - self.law.moment(1) ** 2) ** 0.5 + 1e-9 * low)
            r = low + spread * np.logspace(-5, np.log10((1e3 * self.depth + 1e3) * low / spread), 400)
        else:
            r = low + (high - low) * np.concatenate([ends, 1.0 - ends[-2::-1]])
        r = r[(r > low) & (r < high)]
        with np.errstate(all="ignore"):
            imag, rate = self.on_axis(r)
        good = (np.abs(imag) < 1e-9) & (rate > 0)

        def gap(x: float) -> float:
            return float(self.on_axis(np.array([x]))[1][0])

        parts: list[tuple[float, float]] = []
        for i in np.flatnonzero(good):
            begin = low if i == 0 else float(r[i])
            end = high if i == len(r) - 1 else float(r[i])
            if i > 0 and not good[i - 1]:
                begin = self._turn(gap, float(r[i - 1]), float(r[i]), rate[i - 1])
            if i < len(r) - 1 and not good[i + 1]:
                end = self._turn(gap, float(r[i]), float(r[i + 1]), rate[i + 1])
            if parts and i > 0 and good[i - 1]:
                parts[-1] = (parts[-1][0], end)
            else:
                parts.append((begin, end))
        return parts

    @staticmethod
    def _turn(gap: Callable[[float], float], a: float, b: float, bad_rate: float) -> float:
        if bad_rate < 0:
            return float(brentq(gap, a, b, xtol=1e-300, rtol=1e-15))
        return (a + b) / 2

    def angle(self, r: Reals) -> Reals:
        """Arg w in (0, pi) with Im t = 0, by bracketed Newton; r must lie inside an arc."""
        low, high = np.zeros_like(r), np.full_like(r, np.pi)
        angle = np.full_like(r, 1.0)
        moved = np.full(r.shape, np.inf)
        active = np.arange(r.size)
        for _ in range(80):
            here = angle[active]
            t, rate, _ = self.evaluate(r[active] * np.exp(1j * here))
            below = t.imag < 0
            low[active], high[active] = (
                np.where(below, here, low[active]),
                np.where(below, high[active], here),
            )
            with np.errstate(all="ignore"):
                new = here - t.imag / rate.real
            # A Newton step counts while it shrinks by halves, as where it converges; the bracket is cut otherwise.
            shrinks = np.abs(new - here) < 0.5 * moved[active]
            inside = (new > low[active]) & (new < high[active]) & shrinks
            # Near an edge the angle is small: halve it in ratio, not in difference.
            middle = np.where(
                low[active] > 0,
                np.sqrt(low[active] * high[active]),
                np.minimum(0.5, 1e-2 + high[active]) * high[active],
            )
            new = np.where(inside, new, middle)
            moved[active] = np.abs(new - here)
            angle[active] = new
            # Newton polishes what the table starts; here the branch is what counts.
            active = active[(np.abs(new - here) > 1e-8 * here) & (here > 1e-14)]
            if not active.size:
                break
        return angle

    @property
    def _direct(self) -> bool:
        # One orthogonal layer: z = w, and the law is that of s itself.
        return self.depth == 1 and not self.gaussian

    def _at_itself(self, t: Reals) -> tuple[Points, Points]:
        inside = np.zeros(t.shape, dtype=bool)
        for low, high in self.edges:
            inside |= (t > low) & (t < high)
        w = np.where(inside, np.exp(np.minimum(t, 700.0)), np.nan) + 0j
        u = np.full(t.shape, np.nan + 0j)
        u[inside] = self.law.transform(w[inside])[0]
        return w, u

    @cached_property
    def edges(self) -> tuple[tuple[float, float], ...]:
        """(log low, log high) of each interval of the spectrum; -inf for a hard edge at zero."""
        if self._direct:
            with np.errstate(divide="ignore"):
                return tuple((float(np.log(low)), float(np.log(high))) for low, high in self.law.ranges)
        return tuple((self._edge(a), self._edge(b)) for a, b in self.arcs)

    def _edge(self, r: float) -> float:
        if r == 0.0:
            return float("-inf")
        if self.law.mass_at(r) > 0 and not self.gaussian:
            return self.depth * float(np.log(r))  # u = inf there: a hard edge
        return float(self.evaluate(np.array([r + 0j]))[0].real[0])

    @cached_property
    def tables(self) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], ...]:
        """For each arc (x, t, log r, angle) along x in (0, 1), spaced so that all are smooth up to the ends."""
        return tuple(self._table(arc) for arc in self.arcs)

    def _table(self, arc: tuple[float, float]) -> tuple[Knots, Knots, Knots, Knots]:
        x = (np.arange(_TABLE) + 0.5) / _TABLE
        top = np.log(arc[1])
        if arc[0] > 0:
            log_r = np.log(arc[0]) + (top - np.log(arc[0])) * np.sin(np.pi / 2 * (1 - x)) ** 2
        else:
            log_r = top - self._span(top) * x**2
        angle = self.angle(np.exp(log_r))
        t = self.evaluate(np.exp(log_r + 1j * angle))[0].real
        # Where the law has no mass left t is rounding: keep what falls, as t must along the arc.
        falls = np.concatenate([[True], t[1:] < np.minimum.accumulate(t)[:-1]]) & np.isfinite(t)
        return x[falls], t[falls], log_r[falls], angle[falls]

    def knots(self) -> tuple[np.ndarray, ...]:
        """The t of each table, one for each interval of the spectrum."""
        if self._direct:
            x = (np.arange(_TABLE) + 0.5) / _TABLE
            lows = [max(low, float(np.log(max(self.law.floor, 1e-12)))) for low, _ in self.edges]
            return tuple(high + (low - high) * x**2 for low, (_, high) in zip(lows, self.edges, strict=True))
        return tuple(table[1] for table in self.tables)

    def _span(self, top: float) -> float:
        """How far below the top of log |w| the arc is worth following: until lambda underflows or the law ends."""
        spans = 2.0 * 1.25 ** np.arange(27)
        r = np.exp(top - spans)
        angle = self.angle(r)
        t = self.evaluate(r * np.exp(1j * angle))[0].real
        enough = (t < _DEEPEST) | ((r < self.law.floor) & (angle < 0.3)) | (r < 1e-250)
        return float(spans[np.argmax(enough)] if enough.any() else spans[-1])

    def solve(self, t: Reals) -> tuple[Points, Points]:
        """(w, u) at real t inside the spectrum; NaN outside it."""
        if self._direct:
            return self._at_itself(t)
        w = np.full(t.shape, np.nan + 0j)
        u = np.full(t.shape, np.nan + 0j)
        for (low, high), table in zip(self.edges, self.tables, strict=True):
            inside = np.flatnonzero((t > low) & (t < high))
            if inside.size:
                w[inside], u[inside] = self._solve_arc(t[inside], low, high, table)
        return w, u

    def _solve_arc(
        self, t: Reals, low: float, high: float, table: tuple[Knots, Knots, Knots, Knots]
    ) -> tuple[Points, Points]:
        _, knots, log_r, angle = table

        def straight(values: Reals) -> Reals:
            # t leaves an edge as x^2: in this variable x is nearly linear.
            if np.isinf(low):
                return np.sqrt(np.maximum(high - values, 0.0))
            return np.arccos(np.clip(2 * (values - low) / (high - low) - 1, -1, 1))

        at, here = straight(knots), straight(t)
        first = log_r[0] + (log_r[0] - log_r[1]) / 8
        places, curve = np.concatenate([[0.0], at]), np.concatenate([[first + 0j], log_r + 1j * angle])
        beyond = np.zeros(t.shape, dtype=bool)
        if np.isinf(low):
            beyond = here > at[-1]
        else:
            last = log_r[-1] + (log_r[-1] - log_r[-2]) / 8
            places, curve = np.append(places, np.pi), np.append(curve, last + 0j)
        log_w = CubicSpline(places, curve)(here)
        log_w = log_w.real + 1j * np.clip(log_w.imag, 1e-9, np.pi)
        log_w, u, error = self._polish(log_w, t)
        bad = np.flatnonzero(~(error < 1e-8) & ~beyond)
        if bad.size:
            log_w[bad], u[bad] = self._bisect(t[bad], log_r)
        # Below the table the law has less mass than rounding.
        u[beyond] = np.nan
        return np.exp(log_w), u

    def _polish(self, log_w: Points, t: Reals) -> tuple[Points, Points, Reals]:
        """Newton in log w; the imaginary part is kept in (0, pi)."""
        u = np.zeros_like(log_w)
        error = np.full(t.shape, np.inf)
        active = np.arange(t.size)
        for _ in range(14):
            w = np.exp(log_w[active])
            with np.errstate(all="ignore"):
                value, rate, here, slope = self._with_slope(w)
                step = (value - t[active]) / rate
            step = np.where(np.isfinite(step), step, 0.0)
            size = np.abs(step)
            error[active] = size
            imag = log_w[active].imag
            step *= np.minimum(1.0, 0.5 / np.maximum(size, 1e-300))
            new = log_w[active] - step
            new = new.real + 1j * np.clip(new.imag, imag / 4, np.pi - (np.pi - imag) / 4)
            # The last step is taken in u too: after it both are off by the square of its size.
            u[active] = here + slope * w * (new - log_w[active])
            log_w[active] = new
            active = active[size > 1e-8 * np.minimum(1.0, imag)]
            if not active.size:
                break
        return log_w, u, error

    def _bisect(self, t: Reals, log_r: Knots) -> tuple[Points, Points]:
        """The slow sure way: t grows with |w| along the curve."""
        low, high = np.full(t.shape, log_r.min() - 1e-3), np.full(t.shape, log_r.max() + 0.1)
        for _ in range(50):
            middle = (low + high) / 2
            w = np.exp(middle + 1j * self.angle(np.exp(middle)))
            below = self.evaluate(w)[0].real < t
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        log_w, u, _ = self._polish(np.log(w), t)
        return log_w, u

    def solve_above(self, log_z: Points) -> tuple[Points, Points]:
        """(w, u) for complex log z, 0 < Im log z <= pi, by turning z from the negative axis at fixed |z|."""
        log_w = self._negative(log_z.real) + 1j * np.pi
        steps = 24
        for k in range(1, steps + 1):
            target = log_z.real + 1j * (np.pi + (log_z.imag - np.pi) * k / steps)
            for _ in range(3 if k < steps else 8):
                value, rate, _ = self.evaluate(np.exp(log_w))
                step = (value - target) / rate
                log_w = log_w - step * np.minimum(1.0, 0.3 / np.maximum(np.abs(step), 1e-300))
                log_w = log_w.real + 1j * np.clip(log_w.imag, 1e-14, np.pi)
        error = np.abs(self.evaluate(np.exp(log_w))[0] - log_z)
        if not (error < 1e-7 * np.maximum(1.0, np.abs(log_z))).all():
            raise ArithmeticError(
                f"the Stieltjes transform did not converge (residual {float(np.nanmax(error)):.1e}): ask for points "
                "nearer the spectrum's own scale."
            )
        return np.exp(log_w), self.evaluate(np.exp(log_w))[2]

    def _negative(self, t: Reals) -> Reals:
        """Log |w| for z on the negative axis, where everything is real and grows with |w|."""
        grid = np.linspace(-80.0, 80.0, 641)
        knots = self._on_negative(grid)[0]
        log_r = np.interp(t, knots, grid)
        rate_low = (knots[1] - knots[0]) / (grid[1] - grid[0])
        log_r = np.where(t < knots[0], grid[0] + (t - knots[0]) / rate_low, log_r)
        log_r = np.where(t > knots[-1], grid[-1] + (t - knots[-1]), log_r)
        for _ in range(6):
            value, rate = self._on_negative(log_r)
            log_r = log_r - (value - t) / rate
        return np.asarray(log_r)

    def _on_negative(self, log_r: Reals) -> tuple[Reals, Reals]:
        t, rate, _ = self.evaluate(-np.exp(log_r) + 0j)
        return t.real, rate.real

    def potential(self, log_z: Points, w: Points, u: Points) -> Points:
        """Integral of log(z - lambda): (1 + u) log z - I(u), I the integral of log z over u from 0."""
        both = x_log_x(1.0 + u) - x_log_x(u)
        per_layer = -both + u * np.log(w) - self.law.mean_log(w)
        if self.gaussian:
            per_layer = per_layer + x_log_x(1.0 + u) - u
        return np.asarray((1.0 + u) * log_z - both - self.depth * per_layer)
