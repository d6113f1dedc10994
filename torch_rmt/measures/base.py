"""`SpectralMeasure`: a probability measure on the real line, known by its Stieltjes transform."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from jaxtyping import Complex, Float

from torch_rmt.measures.half_plane import Numbers, fold, unfold
from torch_rmt.measures.numeric import contour_moments, distribution, potential, quantiles

Interval = tuple[float, float]
Atom = tuple[float, float]


class SpectralMeasure(ABC):
    """A probability measure on the real line.

    Three things define it: `stieltjes`, `support` and `atoms`; all else is derived here and overridden where
    a closed form is known.

    Shapes: every method of a point takes a scalar or an array of any shape and returns an array of that shape.
    """

    @abstractmethod
    def stieltjes(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """Stieltjes transform G(z) = integral of rho(dt) / (z - t).

        At a real z this is the boundary value G(z + i0), so that the density is -Im G(x) / pi.
        """

    @abstractmethod
    def support(self) -> tuple[Interval, ...]:
        """Return the closed intervals `(low, high)`, in order, that carry the continuous part (atoms are not in it)."""

    @abstractmethod
    def atoms(self) -> tuple[Atom, ...]:
        """Return the point masses as `(location, mass)`, in order of location."""

    def slope(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """Derivative G'(z) of the Stieltjes transform; at a real z the boundary value from above.

        The default is a five-point difference along a small circle (or, near the axis, a half-line upwards).
        """
        points, below = fold(z)
        low, high = self.bounds()
        step = 1e-4 * np.minimum(np.abs(points - 0.5 * (low + high)) + 0.5 * (high - low), np.maximum(points.imag, 0))
        step = np.maximum(step, 1e-7 * np.maximum(np.abs(points), 1e-3 * (high - low)))
        g = [self.stieltjes(points + 1j * k * step) for k in range(5)]
        derivative = (-25 * g[0] + 48 * g[1] - 36 * g[2] + 16 * g[3] - 3 * g[4]) / (12j * step)
        return unfold(derivative, below)

    def stieltjes_and_slope(self, z: Numbers) -> tuple[Complex[np.ndarray, "..."], Complex[np.ndarray, "..."]]:
        """G and G' together; overridden where they share work."""
        return self.stieltjes(z), self.slope(z)

    def log_potential(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """L(z) = integral of log(z - t) rho(dt), so that L' = G and F(x) = 1 - Im L(x + i0) / pi.

        The default integrates G down a vertical line from far above the support, on a logarithmic grid.
        """
        points, below = fold(z)
        return unfold(potential(self, points), below)

    def density(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """Density of the continuous part, -Im G(x + i0) / pi; zero outside the support."""
        points = np.asarray(x, dtype=float)
        inside = np.zeros(points.shape, dtype=bool)
        for low, high in self.support():
            inside |= (points >= low) & (points <= high)
        result = np.zeros(points.shape)
        if inside.any():
            with np.errstate(all="ignore"):
                result[inside] = np.maximum(-np.asarray(self.stieltjes(points[inside])).imag / np.pi, 0.0)
        return result

    def cdf(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """Distribution function F(x) = mass of (-inf, x], atoms included."""
        return distribution(self, np.asarray(x, dtype=float), self.bounds())

    def cdf_and_density(self, x: Numbers) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
        """F and its density together; overridden where they share work."""
        return self.cdf(x), self.density(x)

    def quantile(self, p: Numbers) -> Float[np.ndarray, "..."]:
        """Smallest x with F(x) >= p.

        Raises:
            ValueError: if a level is outside [0, 1] or is no number.
        """
        levels = np.asarray(p, dtype=float)
        if not np.all((levels >= 0) & (levels <= 1)):
            raise ValueError("quantile levels must lie in [0, 1]")
        return quantiles(self, levels, self.bounds())

    def moment(self, k: int) -> float:
        """Moment m_k = integral of t^k rho(dt), by a contour integral of z^k G(z) around the support."""
        if k < 0:
            raise ValueError(f"moments are defined here for k >= 0, got k = {k}")
        return 1.0 if k == 0 else float(contour_moments(self, k, self.bounds())[-1])

    def moments(self, count: int) -> Float[np.ndarray, " n"]:
        """Moments m_1 .. m_count together; overridden where they share work."""
        return np.array([self.moment(k) for k in range(1, count + 1)])

    @property
    def residual(self) -> float:
        """Largest relative error of the equations behind this law: zero for closed forms."""
        return 0.0

    @property
    def mean(self) -> float:
        """First moment."""
        return self.moment(1)

    @property
    def variance(self) -> float:
        """Second central moment."""
        return self.moment(2) - self.moment(1) ** 2

    def bounds(self) -> Interval:
        """Smallest closed interval that holds all the mass, continuous part and atoms."""
        ends = [end for interval in self.support() for end in interval]
        ends += [location for location, _ in self.atoms()]
        return min(ends), max(ends)

    def sample(self, size: int, generator: np.random.Generator) -> Float[np.ndarray, " size"]:
        """Independent draws, by inversion of the distribution function."""
        return self.quantile(generator.random(size))
