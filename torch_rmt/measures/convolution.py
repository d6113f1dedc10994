"""Free sums and free products as measures, through their subordination functions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from jaxtyping import Complex, Float

from torch_rmt.measures.base import Atom, Interval, SpectralMeasure
from torch_rmt.measures.cumulants import free_cumulants, moments_from_free_cumulants
from torch_rmt.measures.edges import Points, build_mesh, find_support
from torch_rmt.measures.geometry import Factor, Geometry, LogGeometry
from torch_rmt.measures.half_plane import Numbers, fold, unfold
from torch_rmt.measures.numeric import contour_moments, quantiles
from torch_rmt.measures.subordination import Subordination, in_bulk, solve

_ROUNDING = 1e-14  # of G
_FLOOR = 1e-120  # of the hull: the smallest point at which a product is asked for


def _log_around(z: Complex[np.ndarray, " n"]) -> Complex[np.ndarray, " n"]:
    """Logarithm with the cut on the positive axis, which belongs to its upper side."""
    angle = np.angle(z)
    return np.asarray(np.log(np.abs(z)) + 1j * np.where(angle < -1e-9, angle + 2 * np.pi, np.maximum(angle, 0.0)))


def _heavy_atoms(factors: tuple[Factor, ...], allowance: float = 1.0) -> Iterator[tuple[tuple[float, ...], float]]:
    """Choices of one atom a factor whose missing masses, sum of n_i (1 - m_i) / Lambda_i, stay below the allowance."""
    if not factors:
        yield (), allowance
        return
    first, rest = factors[0], factors[1:]
    for location, mass in first.law.atoms():
        left = allowance - first.count * (1.0 - mass) / first.dimension
        if left > 1e-13:
            for locations, mass_left in _heavy_atoms(rest, left):
                yield (location, *locations), mass_left


class FreeConvolution(SpectralMeasure):
    """What free sums and free products share: everything comes from the subordination functions.

    Attributes:
        geometry: the equations that are solved, with the laws and how often each is taken.
    """

    geometry: Geometry

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The laws that are convolved, with their multiplicities."""
        return self.geometry.factors

    def _solve(self, z: Complex[np.ndarray, " n"], known: Points | None = None) -> Subordination:
        known = known or self.__dict__.get("mesh")  # if it was built already
        return solve(self.geometry, z, None if known is None else (known.x, known.coordinates))

    def subordination(self, z: Numbers) -> Subordination:
        """Subordination functions w_i at points of the closed upper half-plane, flattened: G_i(w_i(z)) = G(z).

        Outlier theory needs them: a spike theta in the i-th summand makes an outlier at every z outside the support
        with w_i(z) = theta. Source: Belinschi, Bercovici, Capitaine and Fevrier 2017.
        """
        points, _ = fold(z)
        return self._solve(points.ravel())

    @cached_property
    def residual(self) -> float:
        """Largest relative backward error of the equations at the points of the mesh."""
        return float(
            solve(self.geometry, self.mesh.x.astype(complex), (self.mesh.x, self.mesh.coordinates)).residual.max()
        )

    @cached_property
    @abstractmethod
    def hull(self) -> Interval:
        """An interval that holds all the mass, known without solving anything."""

    @abstractmethod
    def _transform(self, z: Complex[np.ndarray, " n"], s: Subordination) -> tuple[np.ndarray, np.ndarray]:
        """G and G' from a solution."""

    @abstractmethod
    def _potential(self, z: Complex[np.ndarray, " n"], s: Subordination) -> np.ndarray:
        """L from a solution."""

    def stieltjes_and_slope(self, z: Numbers) -> tuple[Complex[np.ndarray, "..."], Complex[np.ndarray, "..."]]:
        """G and G' from one solution."""
        points, below = fold(z)
        flat = self._off_zero(points.ravel())
        with np.errstate(all="ignore"):
            g, slope = self._transform(flat, self._solve(flat))
        return unfold(g.reshape(points.shape), below), unfold(slope.reshape(points.shape), below)

    def stieltjes(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """Stieltjes transform, on the axis as its boundary value.

        Raises:
            ConvergenceError: where the equations cannot be solved to 1e-12.
        """
        return self.stieltjes_and_slope(z)[0]

    def slope(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G'(z), from the implicit function theorem."""
        return self.stieltjes_and_slope(z)[1]

    def log_potential(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """L(z) in closed form in the subordination functions."""
        points, below = fold(z)
        flat = self._off_zero(points.ravel())
        with np.errstate(all="ignore"):
            value = self._potential(flat, self._solve(flat))
        return unfold(value.reshape(points.shape), below)

    def evaluate(self, x: Float[np.ndarray, " n"], known: Points | None = None) -> Points:
        """F, density and coordinates at points of the axis, all from one solution."""
        z, solution, density, slope = self._on_axis(x, known)
        with np.errstate(all="ignore"):
            total = 1.0 - self._potential(z, solution).imag / np.pi
        low, high = self.hull
        total = np.where(x < low, 0.0, np.where(x >= high, 1.0, np.clip(total, 0.0, 1.0)))
        return Points(x, total, density, slope, solution.coordinates)

    def _on_axis(
        self, x: Float[np.ndarray, " n"], known: Points | None = None
    ) -> tuple[Complex[np.ndarray, " n"], Subordination, Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Solution at points of the axis (beside its atoms), the density and its slope."""
        z = self._off_atoms(x).astype(complex)
        solution = self._solve(z, known)
        with np.errstate(all="ignore"):
            g, slope = self._transform(z, solution)
        bulk = in_bulk(self.geometry, solution.coordinates)
        bulk &= -g.imag > _ROUNDING * np.abs(g)  # close to an atom G is real but for rounding
        return z, solution, np.where(bulk, -g.imag / np.pi, 0.0), np.where(bulk, -slope.imag / np.pi, 0.0)

    def _off_zero(self, z: Complex[np.ndarray, " n"]) -> Complex[np.ndarray, " n"]:
        """Points at which the coordinates exist: all, for sums."""
        return z

    def _off_atoms(self, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Points that are on an atom, moved to its right by a hair: F counts the atom, the rest is continuous."""
        low, high = self.hull
        for location, _ in self.atoms():
            hair = 1e-12 * max(abs(location), 1e-3 * (high - low))
            x = np.where(np.abs(x - location) < hair, location + hair, x)
        return x

    def cdf_and_density(self, x: Numbers) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
        """F = 1 - Im L / pi, in closed form in the subordination functions, and the density, from one solution."""
        points = np.asarray(x, dtype=float)
        low, high = self.hull
        total, density = np.where(points < low, 0.0, 1.0), np.zeros(points.shape)
        inside = np.asarray((points >= low) & (points <= high))
        if inside.any():
            found = self.evaluate(points[inside])
            total[inside], density[inside] = found.cdf, found.density
        return np.asarray(total), density

    def density(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """Density of the continuous part, exactly on the axis."""
        points = np.asarray(x, dtype=float)
        low, high = self.hull
        density = np.zeros(points.shape)
        inside = np.asarray((points >= low) & (points <= high))
        if inside.any():
            density[inside] = self._on_axis(points[inside])[2]
        return density

    def cdf(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """Distribution function, in closed form in the subordination functions: no density is integrated."""
        return self.cdf_and_density(x)[0]

    def quantile(self, p: Numbers) -> Float[np.ndarray, "..."]:
        """Smallest x with F(x) >= p; the mesh gives the brackets."""
        levels = np.asarray(p, dtype=float)
        if not np.all((levels >= 0) & (levels <= 1)):
            raise ValueError("quantile levels must lie in [0, 1]")
        return quantiles(self, levels, self.bounds(), (self.mesh.x, self.mesh.cdf))

    @cached_property
    def mesh(self) -> Points:
        """Points of the axis that follow the mass, with all that is known there; built once, when first needed."""
        return build_mesh(self)

    @cached_property
    def _support(self) -> tuple[Interval, ...]:
        return find_support(self, self.mesh)

    def support(self) -> tuple[Interval, ...]:
        """Intervals of the continuous part; their ends are branch points of the subordination functions."""
        return self._support


class FreeSum(FreeConvolution):
    """Law of a sum of free variables; `free_add` makes it."""

    def __init__(self, factors: tuple[Factor, ...]) -> None:
        self.geometry = Geometry(factors)

    def __repr__(self) -> str:
        return "free sum of " + ", ".join(f"{f.count:g} x {f.law!r}" for f in self.factors)

    @cached_property
    def hull(self) -> Interval:
        """Sum of the summands' hulls."""
        ends = [(f.count * f.law.bounds()[0], f.count * f.law.bounds()[1]) for f in self.factors]
        return sum(low for low, _ in ends), sum(high for _, high in ends)

    def _transform(self, z: Complex[np.ndarray, " n"], s: Subordination) -> tuple[np.ndarray, np.ndarray]:
        return 1.0 / s.common, -s.slope / s.common**2

    def _potential(self, z: Complex[np.ndarray, " n"], s: Subordination) -> np.ndarray:
        parts = [f.count * f.law.log_potential(w) for f, w in zip(self.factors, s.points, strict=True)]
        common = fold(np.where(s.common == 0, 1e-300, s.common))[0]  # rounding must not turn its argument
        return np.asarray(sum(parts) - (self.geometry.total - 1.0) * np.log(common))

    @cached_property
    def _atoms(self) -> tuple[Atom, ...]:
        counts = [f.count for f in self.factors]
        found = [
            (sum(n * a for n, a in zip(counts, place, strict=True)), mass) for place, mass in _heavy_atoms(self.factors)
        ]
        return tuple(sorted(found))

    def atoms(self) -> tuple[Atom, ...]:
        """Atoms at sums of atoms, with mass 1 - sum of n_i (1 - m_i) where that is positive.

        Source: Bercovici and Voiculescu 1998.
        """
        return self._atoms

    def moments(self, count: int) -> Float[np.ndarray, " n"]:
        """From the free cumulants, which add."""
        total = np.zeros(count)
        for f in self.factors:
            total = total + f.count * free_cumulants(f.law.moments(count))
        return moments_from_free_cumulants(total)

    def moment(self, k: int) -> float:
        """From the free cumulants, which add."""
        if k < 0:
            raise ValueError(f"moments are defined here for k >= 0, got k = {k}")
        return float(self.moments(k)[-1]) if k else 1.0

    @property
    def variance(self) -> float:
        """Variances add."""
        return float(sum(f.count * f.law.variance for f in self.factors))


class FreeProduct(FreeConvolution):
    """Law of a product of free variables, at most one of them not positive; `free_mul` makes it."""

    def __init__(self, factors: tuple[Factor, ...]) -> None:
        self.geometry = LogGeometry(factors)

    def __repr__(self) -> str:
        return "free product of " + ", ".join(f"{f.count:g} x {f.law!r}" for f in self.factors)

    @cached_property
    def hull(self) -> Interval:
        """Product of the factors' hulls."""
        low, high = 1.0, 1.0
        for f in self.factors:
            a, b = f.law.bounds()
            ends = (
                [low * a**f.count, high * a**f.count, low * b**f.count, high * b**f.count]
                if a >= 0
                else [a * high, b * high, a * low, b * low]
            )
            low, high = min(ends), max(ends)
        return low, high

    def _off_zero(self, z: Complex[np.ndarray, " n"]) -> Complex[np.ndarray, " n"]:
        """0 itself, where the logarithm ends, is seen from the right."""
        return np.where(z == 0, _FLOOR * max(self.hull[1], -self.hull[0]), z)

    def _off_atoms(self, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """As for sums; and 0 itself, where the logarithm ends, is seen from the right."""
        low, high = self.hull
        floor = _FLOOR * max(high, -low)
        x = np.where(np.abs(x) < floor, floor, x)
        for location, _ in self.atoms():
            if location != 0.0:
                hair = 1e-12 * abs(location)
                x = np.where(np.abs(x - location) < hair, location + np.abs(hair), x)
        return x

    def _transform(self, z: Complex[np.ndarray, " n"], s: Subordination) -> tuple[np.ndarray, np.ndarray]:
        p = np.exp(s.common)
        g = p / ((p - 1.0) * z)
        slope = (-p / (p - 1.0) ** 2 * s.slope / z - g) / z
        return g, slope

    def _potential(self, z: Complex[np.ndarray, " n"], s: Subordination) -> np.ndarray:
        p = np.exp(s.common)
        log_rest = _log_around(p - 1.0)
        value = np.log(z) - (s.common - log_rest)  # log z - log(1 + M)
        for f, w, coordinate in zip(self.factors, s.points, s.coordinates, strict=True):
            potential = f.law.log_potential(w) - coordinate
            potential = potential + 2j * np.pi * (coordinate.imag > np.pi + 1e-9)  # continued through the negative axis
            own = s.common if f.dimension == 1.0 else _log_around(p - 1.0 + f.dimension)
            value = value + (f.count / f.dimension) * (potential + own - log_rest)
        # a mean of arguments of points above the axis lies between 0 and pi; rounding on a cut may add a turn
        value.imag = np.mod(value.imag + 0.5 * np.pi, 2 * np.pi) - 0.5 * np.pi
        return np.asarray(value)

    @cached_property
    def _atoms(self) -> tuple[Atom, ...]:
        counts = [f.count for f in self.factors]
        rank = 1.0
        for f in self.factors:
            at_zero = sum(mass for location, mass in f.law.atoms() if location == 0.0)
            rank = min(rank, (1.0 - at_zero) / f.dimension)
        found = [(0.0, 1.0 - rank)] if rank < 1.0 - 1e-15 else []
        for place, mass in _heavy_atoms(self.factors):
            if 0.0 not in place:
                found.append((float(np.prod([a**n for n, a in zip(counts, place, strict=True)])), mass))
        return tuple(sorted(found))

    def atoms(self) -> tuple[Atom, ...]:
        """At 0 the largest of the factors' masses; elsewhere products of atoms, mass 1 - sum of n_i (1 - m_i) if > 0.

        Source: Belinschi 2003; Bercovici and Voiculescu 1998.
        """
        return self._atoms

    def moments(self, count: int) -> Float[np.ndarray, " n"]:
        """All from one contour integral."""
        return np.append(self.mean, contour_moments(self, count, self.bounds())[1:])[:count]

    @property
    def mean(self) -> float:
        """Product of the means."""
        return float(np.prod([f.law.mean**f.count for f in self.factors]))
