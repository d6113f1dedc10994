"""`JacobianLaw`: the law of J^T J as a measure, on top of a solver that works in log z."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Complex, Float

from torch_rmt.measures.base import Atom, Interval, SpectralMeasure
from torch_rmt.measures.half_plane import Numbers
from torch_rmt.theory.activation import Array

Points = Complex[np.ndarray, " points"]
Reals = Float[np.ndarray, " points"]
Values = Complex[np.ndarray, "..."]

_NARROW = 1e-5  # in logarithms: a gap with an atom in it that is narrower is none


@runtime_checkable
class Solver(Protocol):
    """What a solver of the master equation offers; t = log z in units of the law's scale.

    `w` is whatever the solver needs beside M to evaluate the potential; its last axis runs over the points.
    """

    @property
    def edges(self) -> tuple[tuple[float, float], ...]:
        """(low, high) of t over each interval of the spectrum; -inf for a hard edge at zero."""
        ...

    def solve(self, t: Reals) -> tuple[np.ndarray, Points]:
        """(w, M) at real t inside the spectrum, NaN outside."""
        ...

    def solve_above(self, log_z: Points) -> tuple[np.ndarray, Points]:
        """(w, M) at log z with 0 < Im log z <= pi."""
        ...

    def potential(self, log_z: Points, w: np.ndarray, u: Points) -> Points:
        """Integral of log(z - lambda)."""
        ...

    def knots(self) -> tuple[np.ndarray, ...]:
        """Ascending or descending t through each interval, dense enough to start a search from."""
        ...


class JacobianLaw(SpectralMeasure):
    """The law of the squared singular values of a product of layers.

    density = -Im M / (pi lambda) with M = z G - 1 on the axis itself (no smoothing width); the distribution function
    is 1 - Im Phi / pi with Phi = (1 + M) log z - integral of log z dM in closed form (never an integrated density).

    Fields:
        solver: solves the master equation.
        log_scale: log of the unit that the solver works in, so that chi^depth may be out of the range of floats.
        log_atoms: (log of the location, mass) of the atoms; -inf for an atom at zero.
        moments_in_units: moments m_0, m_1, ... in the solver's unit.
    """

    def __init__(
        self,
        solver: Solver,
        log_scale: float,
        log_atoms: tuple[tuple[float, float], ...],
        moments_in_units: Float[np.ndarray, " orders"],
    ) -> None:
        self.solver = solver
        self.log_scale = log_scale
        self.log_atoms = tuple(sorted(log_atoms))
        self.moments_in_units = moments_in_units
        self._quantile_table: tuple[Reals, Reals] | None = None

    def support(self) -> tuple[Interval, ...]:
        """Intervals of the continuous part."""
        return tuple((self._value(low), self._value(high)) for low, high in self.solver.edges)

    def atoms(self) -> tuple[Atom, ...]:
        """Point masses; each comes from a slope that most of a layer's units share."""
        return tuple((self._value(location), mass) for location, mass in self.log_atoms)

    def log_support(self) -> tuple[Interval, ...]:
        """Intervals of log lambda: finite where lambda itself underflows or overflows."""
        return tuple((low + self.log_scale, high + self.log_scale) for low, high in self.solver.edges)

    def _value(self, t: float) -> float:
        with np.errstate(over="ignore"):
            return float(np.exp(t + self.log_scale)) if t > -np.inf else 0.0

    def _units(self, x: Float[np.ndarray, " n"]) -> Reals:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(x > 0, np.log(np.maximum(x, 1e-320)), -np.inf) - self.log_scale)

    def density(self, x: Numbers) -> Array:
        """Density of the continuous part; zero outside the support."""
        points = np.asarray(x, dtype=np.float64)
        flat = points.ravel()
        t = self._units(flat)
        _, u = self.solver.solve(t)
        with np.errstate(all="ignore"):
            result = np.where(np.isnan(u), 0.0, -u.imag / (np.pi * flat))
        return np.maximum(result, 0.0).reshape(points.shape)

    def log_density(self, log_x: Numbers) -> Array:
        """Density of log lambda at log lambda: what a picture over many decades shows."""
        points = np.asarray(log_x, dtype=np.float64)
        _, u = self.solver.solve(points.ravel() - self.log_scale)
        return np.maximum(np.where(np.isnan(u), 0.0, -u.imag / np.pi), 0.0).reshape(points.shape)

    def cdf(self, x: Numbers) -> Array:
        """Distribution function, atoms included, in closed form."""
        points = np.asarray(x, dtype=np.float64)
        flat = points.ravel()
        result = self._cdf_log(self._units(flat))
        return np.where(flat < 0, 0.0, result).reshape(points.shape)

    def _cdf_log(self, t: Reals) -> Reals:
        w, u = self.solver.solve(t)
        with np.errstate(all="ignore"):
            inner = 1.0 - self.solver.potential(t + 0j, w, u).imag / np.pi
        result = np.zeros(t.shape)
        # Outside the continuous part F is a step function of the masses that lie to the left.
        for (_, high), mass in zip(self.solver.edges, self._interval_masses, strict=True):
            result += np.where(t >= high, mass, 0.0)
        for location, mass in self.log_atoms:
            result += np.where(t >= location, mass, 0.0)
        return np.clip(np.where(np.isnan(u), result, inner), 0.0, 1.0)

    @cached_property
    def _interval_masses(self) -> tuple[float, ...]:
        """Mass of each interval: the distribution function between its ends, atoms between intervals taken off."""
        edges = self.solver.edges
        # In a gap Phi is analytic across the axis: its imaginary part there counts the mass above, exactly.
        gaps = [(edges[i][1], edges[i + 1][0]) for i in range(len(edges) - 1)]
        # Halfway to the first atom in the gap, where there is one: on an atom Phi has a pole.
        stops = [min([t for t, _ in self.log_atoms if low < t < high], default=high) for low, high in gaps]
        middles = np.array([(low + stop) / 2 for (low, _), stop in zip(gaps, stops, strict=True)]) + 1e-12j
        ends: list[float] = []
        if len(middles):
            w, u = self.solver.solve_above(middles)
            ends = [float(v) for v in 1.0 - self.solver.potential(middles, w, u).imag / np.pi]
            for index, ((low, high), stop) in enumerate(zip(gaps, stops, strict=True)):
                if stop < high and high - low < _NARROW:
                    # Density rises to the atom from either side: no gap to stand in, but the band's own last points.
                    last = np.array([float(np.max(self.solver.knots()[index]))])
                    w, u = self.solver.solve(last)
                    ends[index] = float(1.0 - self.solver.potential(last + 0j, w, u).imag[0] / np.pi)
        masses, before = [], sum(mass for location, mass in self.log_atoms if location <= edges[0][0])
        for index, end in enumerate(ends):
            gap = edges[index][1], edges[index + 1][0]
            lower = sum(m for location, m in self.log_atoms if gap[0] <= location < float(middles[index].real))
            upper = sum(m for location, m in self.log_atoms if float(middles[index].real) < location <= gap[1])
            masses.append(end - lower - before)
            before = end + upper
        top = sum(mass for location, mass in self.log_atoms if location > edges[-1][0])
        masses.append(1.0 - before - top)
        return tuple(masses)

    def quantile(self, p: Numbers) -> Array:
        """Smallest x with F(x) >= p, by Newton on the closed form of F in log x."""
        levels = np.asarray(p, dtype=np.float64)
        if not np.all((levels >= 0) & (levels <= 1)):
            raise ValueError("quantile levels must lie in [0, 1].")
        t = self.log_quantile(levels) - self.log_scale
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(t + self.log_scale))

    def log_quantile(self, p: Numbers) -> Array:
        """Log of the quantile; -inf where the quantile is zero."""
        levels = np.asarray(p, dtype=np.float64)
        flat = levels.ravel()
        knots, values = self._table()
        t = np.interp(flat, values, knots)
        low = knots[np.clip(np.searchsorted(values, flat, side="left") - 1, 0, len(knots) - 1)]
        high = knots[np.clip(np.searchsorted(values, flat, side="left"), 0, len(knots) - 1)]
        at_atom = np.zeros(flat.shape, dtype=bool)
        for location, mass in self.log_atoms:
            below = float(self._cdf_log(np.array([location]))[0]) if location > -np.inf else mass
            here_too = (flat > below - mass - 1e-15) & (flat <= below + 1e-15)
            t[here_too], at_atom = location, at_atom | here_too
        active = np.flatnonzero((high > low) & ~at_atom)
        for _ in range(40):
            here = t[active]
            w, u = self.solver.solve(here)
            with np.errstate(all="ignore"):
                gap = 1.0 - self.solver.potential(here + 0j, w, u).imag / np.pi - flat[active]
                slope = -u.imag / np.pi
                low[active] = np.where(gap < 0, here, low[active])
                high[active] = np.where(gap >= 0, here, high[active])
                new = here - gap / slope
            inside = (new > low[active]) & (new < high[active])
            # What rounding leaves of the gap is no reason to go on.
            done = np.isnan(u) | (np.abs(new - here) <= 1e-12 * np.maximum(1.0, np.abs(here))) | (np.abs(gap) < 4e-15)
            kept = np.where(done, here, (low[active] + high[active]) / 2)
            t[active] = np.where(np.isnan(u), here, np.where(inside, new, kept))
            active = active[~done]
            if not len(active):
                break
        # Below the table lambda underflows.
        result = np.where((flat < values[0] - 1e-12) & ~at_atom, -np.inf, t)
        low_end, high_end = self._log_bounds()
        result = np.where(flat <= 0, low_end, np.where(flat >= 1, high_end, result))
        return np.asarray((result + self.log_scale).reshape(levels.shape))

    def rough_log_quantile(self, p: Numbers) -> Array:
        """`log_quantile` by interpolation in the table that it starts from: where any point near by serves."""
        knots, values = self._table()
        return np.asarray(np.interp(np.asarray(p, dtype=np.float64), values, knots) + self.log_scale)

    def _log_bounds(self) -> tuple[float, float]:
        ends = [e for edge in self.solver.edges for e in edge] + [location for location, _ in self.log_atoms]
        return min(ends), max(ends)

    def _table(self) -> tuple[Reals, Reals]:
        """(t, F) ascending, through every interval, to start the quantiles from."""
        if self._quantile_table is None:
            knots = np.sort(np.concatenate(self.solver.knots()))
            ends = np.array([e for edge in self.solver.edges for e in edge if np.isfinite(e)])
            knots = np.sort(np.concatenate([knots, ends]))
            self._quantile_table = (knots, np.maximum.accumulate(self._cdf_log(knots)))
        return self._quantile_table

    def stieltjes(self, z: Numbers) -> Values:
        """Stieltjes transform; at a real z the boundary value from above."""
        points = np.asarray(z, dtype=np.complex128)
        flat = points.ravel()
        with np.errstate(all="ignore"):
            return np.asarray((self._m(flat) + 1.0) / flat).reshape(points.shape)

    def _m(self, z: Points) -> Points:
        lower = z.imag < 0
        # Built by parts: -1 - 0j has its logarithm on the wrong side of the cut.
        folded = np.empty_like(z)
        folded.real, folded.imag = z.real, np.abs(z.imag)
        z = folded
        log_z = np.log(z) - self.log_scale
        result = np.full(z.shape, np.nan + 0j)
        real = (z.imag == 0) & (z.real > 0)
        if real.any():
            _, result[real] = self.solver.solve(log_z[real].real)
        rest = np.isnan(result)
        if rest.any():
            # Outside the spectrum M is real and analytic: a hair above the axis is as good as on it.
            raised = log_z[rest]
            raised = raised.real + 1j * np.maximum(raised.imag, 1e-13)
            _, result[rest] = self.solver.solve_above(raised)
            result[rest & real] = result[rest & real].real
        return np.where(lower, np.conj(result), result)

    def moment(self, k: int) -> float:
        """m_k from the product of S-transforms as power series; exact to rounding."""
        if not 0 <= k < len(self.moments_in_units):
            raise ValueError(f"moments 0 to {len(self.moments_in_units) - 1} are known, got k = {k}.")
        with np.errstate(over="ignore"):
            return float(np.exp(np.log(self.moments_in_units[k]) + k * self.log_scale))

    def log_determinant(self) -> float:
        """Mean of log lambda; -inf with an atom at zero."""
        if any(location == -np.inf for location, _ in self.log_atoms):
            return float("-inf")
        # E log lambda = Re Phi at z -> 0, approached from the negative axis.
        log_z = np.array([-600.0 + 1j * np.pi])
        w, u = self.solver.solve_above(log_z)
        return float(self.solver.potential(log_z, w, u).real[0]) + self.log_scale
