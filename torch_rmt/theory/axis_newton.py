"""Laws given by a system of analytic equations: Newton's method, led down from the far upper half-plane to the axis."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Complex, Float
from numpy.typing import ArrayLike

from torch_rmt.measures.base import Interval, SpectralMeasure
from torch_rmt.measures.half_plane import fold, unfold

Unknowns = Complex[np.ndarray, "unknowns points"]
Reals = Float[np.ndarray, " points"]
_FACTOR = 0.12  # of height, each step of the descent; found by tuning, failures halve it in logarithm
_NEAR = 0.3  # angle above a band from which one step leads onto it, to begin with; failures take a tenth
_NEWTON = 9
_TABLE = 65  # angles per band; the starts between them are linear


class NewtonLaw(SpectralMeasure):
    """A law whose Stieltjes transform follows from K unknowns y with F(y) = 0, F_K(y) = Z(y) - z.

    The physical solution is the one that continues that at z -> i infinity through the upper half-plane; so Newton's
    method is led down on vertical lines, and every step is checked against what the unknowns, being Stieltjes
    transforms or subordination functions, must satisfy there. On the bands of the support the starts come from a
    table made once.
    """

    @abstractmethod
    def _step(self, y: Unknowns, z: Complex[np.ndarray, " points"]) -> tuple[Unknowns, Unknowns]:
        """Newton step, to be subtracted, and the tangent dy/dz."""

    @abstractmethod
    def _far(self, z: Complex[np.ndarray, " points"]) -> Unknowns:
        """The solution for z far away, to first order."""

    @abstractmethod
    def _admissible(self, y: Unknowns) -> Bool[np.ndarray, " points"]:
        """Whether the unknowns lie in the (closed) half-planes that they must lie in; rounding forgiven."""

    @abstractmethod
    def _transform(self, y: Unknowns, z: Complex[np.ndarray, " points"]) -> Complex[np.ndarray, " points"]:
        """G(z) from the unknowns."""

    @abstractmethod
    def _potential(self, y: Unknowns, z: Complex[np.ndarray, " points"]) -> Complex[np.ndarray, " points"]:
        """The primitive of G that behaves as log z at infinity."""

    @abstractmethod
    def _scale(self) -> float:
        """A length of the order of the largest eigenvalue."""

    def _newton(self, y: Unknowns, z: Complex[np.ndarray, " points"]) -> tuple[Unknowns, np.ndarray, Unknowns]:
        """Polish; return the unknowns, which points came to rest in their half-planes, and the tangents dy/dz."""
        y, tangents = y.copy(), np.empty_like(y)
        active = np.arange(len(z))
        rest = np.zeros(len(z), dtype=bool)
        before = np.full(len(z), np.nan)
        for _ in range(_NEWTON):
            move, tangents[:, active] = self._step(y[:, active], z[active])
            with np.errstate(all="ignore"):
                y[:, active] -= move
                size = (np.abs(move) / np.abs(y[:, active])).max(axis=0)
                ratio = size / before[active]
            # Newton's steps square, so that the next can be foretold; small ones that shrink no further are rounding,
            # as in a narrow gap
            small = (size <= 1e-11) | (size * ratio**2 <= 1e-13) | ((size <= 1e-8) & (ratio >= 0.1))
            before[active] = size
            rest[active[small]] = True
            active = active[~small & np.isfinite(move).all(axis=0)]
            if not active.size:
                break
        with np.errstate(all="ignore"):
            return y, rest & self._admissible(y), tangents

    def _descend(self, z: Complex[np.ndarray, " points"]) -> Unknowns:
        """Follow vertical lines down to z."""
        top = 6.0 * self._scale() + np.abs(z)
        high = z.real + 1j * np.maximum(z.imag, top)
        y, good, tangents = self._newton(self._far(high), high)
        if not good.all():
            raise RuntimeError(f"no solution far above the axis at z = {high[~good][:3]}; the equations are at fault")

        def path(height: Reals, where: np.ndarray) -> Complex[np.ndarray, " points"]:
            return np.asarray(z[where] + 1j * height)

        least = 1e-9 * self._scale()
        return self._follow(path, high.imag - z.imag, np.maximum(least, z.imag), least, y, tangents)

    def _onto(self, low: Reals, high: Reals, angle: Reals) -> Unknowns:
        """Solution on bands, at low + (high - low) (1 - cos(angle))/2, in along confocal ellipses around each.

        In the angle continued to angle + i height the solution has no square roots at the ends, and steps are few.
        """
        middle, half = 0.5 * (low + high), 0.5 * (high - low)

        def path(height: Reals, where: np.ndarray) -> Complex[np.ndarray, " points"]:
            turn = angle[where]
            ellipse = np.cos(turn) * np.cosh(height) - 1j * np.sin(turn) * np.sinh(height)
            return np.asarray(middle[where] - half[where] * ellipse)

        bounds = self.bounds()
        height = np.log(8.0 * max(abs(bounds[0]), abs(bounds[1])) / half)
        every = np.arange(len(angle))
        start = path(height, every)
        y, good, tangents = self._newton(self._far(start), start)
        if not good.all():
            return self._descend(path(np.zeros(len(angle)), every))
        return self._follow(path, height, np.full(len(angle), _NEAR), 1e-9, y, tangents)

    def _follow(
        self,
        path: Callable[[Reals, np.ndarray], Complex[np.ndarray, " points"]],
        height: Reals,
        floor: Reals,
        least: float,
        y: Unknowns,
        tangents: Unknowns,
    ) -> Unknowns:
        """From a solution at `height` along a path down to height zero, which is reached in one step from `floor`."""
        every = np.arange(len(height))
        here = path(height, every)
        ratio, floor = np.full(len(height), _FACTOR), floor.copy()
        # 400 steps: from the top down to 1e-9 at a tenth of the usual logarithmic pace
        for _ in range(400):
            todo = np.flatnonzero(height > 0.0)
            if not todo.size:
                break
            aim = height[todo] * ratio[todo]
            last = aim <= floor[todo]
            aim[last] = 0.0
            next_z = path(aim, todo)
            start = y[:, todo] + tangents[:, todo] * (next_z - here[todo])
            start = np.where(np.isfinite(start) & self._admissible(start)[None, :], start, y[:, todo])
            found, good, slopes = self._newton(start, next_z)
            # The last step, onto the axis near an edge, converges slowly: there the value above the axis serves.
            stuck = ~good & last & (height[todo] <= 4.0 * least)
            found[:, stuck] = y[:, todo[stuck]]
            good |= stuck
            y[:, todo[good]], tangents[:, todo[good]] = found[:, good], slopes[:, good]
            here[todo[good]], height[todo[good]] = next_z[good], aim[good]
            floor[todo] = np.where(~good & last, np.maximum(0.1 * floor[todo], least), floor[todo])
            ratio[todo] = np.where(good, np.maximum(ratio[todo] ** 1.5, _FACTOR), np.sqrt(ratio[todo]))
        return y

    @cached_property
    def _table(self) -> tuple[tuple[Interval, Reals, Unknowns], ...]:
        angle = np.pi * (np.arange(_TABLE) + 0.5) / _TABLE
        bands = self.support()
        if not bands:
            return ()
        ends = np.repeat(np.array(bands).reshape(-1, 2), _TABLE, axis=0)
        found = self._onto(ends[:, 0], ends[:, 1], np.tile(angle, len(bands)))  # all bands in one go
        parts = np.split(found, len(bands), axis=1)
        return tuple((band, angle, part) for band, part in zip(bands, parts, strict=True))

    def _unknowns(self, z: Complex[np.ndarray, " points"]) -> Unknowns:
        """Physical solution at points of the closed upper half-plane; the last one is kept, for density, then cdf."""
        for points, y in self._kept.values():
            if np.array_equal(points, z):
                return y
        y = self._solved(z)
        self._kept["last"] = (z.copy(), y)
        return y

    @cached_property
    def _kept(self) -> dict[str, tuple[Complex[np.ndarray, " points"], Unknowns]]:
        return {}

    def _solved(self, z: Complex[np.ndarray, " points"]) -> Unknowns:
        pending = np.ones(len(z), dtype=bool)
        parts: list[tuple[np.ndarray, Unknowns]] = []
        real = z.imag == 0.0
        if real.any():
            for (low, high), angles, table in self._table:
                here = np.flatnonzero(real & (z.real > low) & (z.real < high))
                if not here.size:
                    continue
                x = z[here].real
                at = np.arccos(np.clip((low + high - 2.0 * x) / (high - low), -1.0, 1.0))
                start = np.stack(
                    [np.interp(at, angles, row.real) + 1j * np.interp(at, angles, row.imag) for row in table]
                )
                found, good, _ = self._newton(start, z[here])
                parts.append((here[good], found[:, good]))
                pending[here[good]] = False
        rest = np.flatnonzero(pending)
        if rest.size:
            parts.append((rest, self._descend(z[rest])))
        y = np.empty((parts[0][1].shape[0], len(z)), dtype=complex)
        for where, value in parts:
            y[:, where] = value
        return y

    def stieltjes(self, z: ArrayLike) -> Complex[np.ndarray, "..."]:
        """G(z) by Newton's method; at real z the boundary value from above."""
        flat, below = fold(np.asarray(z, dtype=complex).ravel())
        if not flat.size:
            return flat.reshape(np.shape(z))
        return unfold(self._transform(self._unknowns(flat), flat), below).reshape(np.shape(z))

    def log_potential(self, z: ArrayLike) -> Complex[np.ndarray, "..."]:
        """Integral of log(z - t) rho(dt), in closed form in the unknowns."""
        flat, below = fold(np.asarray(z, dtype=complex).ravel())
        if not flat.size:
            return flat.reshape(np.shape(z))
        return unfold(self._potential(self._unknowns(flat), flat), below).reshape(np.shape(z))

    def density(self, x: ArrayLike) -> Float[np.ndarray, "..."]:
        """Density of the continuous part, -Im G(x + i0) / pi; zero outside the support."""
        points = np.asarray(x, dtype=float)
        value = np.zeros(points.shape)
        inside = np.zeros(points.shape, dtype=bool)
        for low, high in self.support():
            inside |= (points > low) & (points < high)
        if inside.any():
            value[inside] = np.maximum(-self.stieltjes(points[inside]).imag / np.pi, 0.0)
        return value

    def cdf(self, x: ArrayLike) -> Float[np.ndarray, "..."]:
        """F(x) = 1 - Im Phi / pi in closed form; constant between the bands."""
        points = np.asarray(x, dtype=float)
        value = np.zeros(points.shape)
        inside = np.zeros(points.shape, dtype=bool)
        for low, high in self.support():
            inside |= (points > low) & (points < high)
        for location, mass in self.atoms():
            value += np.where(~inside & (points >= location), mass, 0.0)
        for (_, high), mass in zip(self.support(), self._band_masses, strict=True):
            value += np.where(~inside & (points >= high), mass, 0.0)
        if inside.any():
            value[inside] = np.clip(1.0 - self.log_potential(points[inside]).imag / np.pi, 0.0, 1.0)
        return np.asarray(np.minimum(value, 1.0))

    def _gap_points(self) -> Reals:
        """A point in each gap between bands."""
        return np.array([0.5 * (a[1] + b[0]) for a, b in itertools.pairwise(self.support())])

    @cached_property
    def _band_masses(self) -> tuple[float, ...]:
        """Mass of each band: what is left at its right end less what was there at its left, atoms apart."""
        bands = self.support()
        if not bands:
            return ()
        if len(bands) == 1:
            return (1.0 - sum(mass for _, mass in self.atoms()),)
        middles = self._gap_points()
        atoms = np.array([[m * (location <= x) for location, m in self.atoms()] for x in middles]).sum(axis=1)
        levels = 1.0 - self.log_potential(middles).imag / np.pi - atoms
        total = 1.0 - sum(mass for _, mass in self.atoms())
        return tuple(np.diff(np.concatenate([[0.0], levels, [total]])).tolist())


class SystemLaw(NewtonLaw):
    """A `NewtonLaw` that gives its equations and their Jacobian, and leaves the linear algebra to this class."""

    @abstractmethod
    def _equations(
        self, y: Unknowns, z: Complex[np.ndarray, " points"]
    ) -> tuple[Unknowns, Complex[np.ndarray, "unknowns unknowns points"]]:
        """F and its Jacobian."""

    def _step(self, y: Unknowns, z: Complex[np.ndarray, " points"]) -> tuple[Unknowns, Unknowns]:
        value, slope = self._equations(y, z)
        right = np.zeros((y.shape[1], y.shape[0], 2), dtype=complex)
        right[:, :, 0] = value.T
        right[:, -1, 1] = 1.0
        with np.errstate(all="ignore"):
            solved = _solve(slope.transpose(2, 0, 1), right)
        return solved[:, :, 0].T, solved[:, :, 1].T


def _solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve many small systems; singular ones give NaN instead of an exception."""
    if matrix.shape[1] == 1:
        return np.asarray(right / matrix)
    if matrix.shape[1] == 2:
        a, b, c, d = matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1]
        determinant = (a * d - b * c)[:, None]
        first = (d[:, None] * right[:, 0] - b[:, None] * right[:, 1]) / determinant
        second = (a[:, None] * right[:, 1] - c[:, None] * right[:, 0]) / determinant
        return np.stack([first, second], axis=1)
    try:
        return np.asarray(np.linalg.solve(matrix, right))
    except np.linalg.LinAlgError:
        return np.full(right.shape, np.nan, dtype=complex)
