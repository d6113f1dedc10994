"""`SpectralMeasure`: a probability measure on the real line, known by its Stieltjes transform."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from jaxtyping import Complex, Float
from numpy.typing import ArrayLike

Interval = tuple[float, float]
Atom = tuple[float, float]


class SpectralMeasure(ABC):
    """A probability measure on the real line.

    Three things define it: `stieltjes`, `support` and `atoms`; all else is derived here and overridden where
    a closed form is known.

    Shapes: every method of a point takes a scalar or an array of any shape and returns an array of that shape.
    """

    @abstractmethod
    def stieltjes(self, z: ArrayLike) -> Complex[np.ndarray, "..."]:
        """Stieltjes transform G(z) = integral of rho(dt) / (z - t).

        At a real z this is the boundary value G(z + i0), so that the density is -Im G(x) / pi.
        """

    @abstractmethod
    def support(self) -> tuple[Interval, ...]:
        """Return the closed intervals `(low, high)`, in order, that carry the continuous part (atoms are not in it)."""

    @abstractmethod
    def atoms(self) -> tuple[Atom, ...]:
        """Return the point masses as `(location, mass)`, in order of location."""

    def density(self, x: ArrayLike) -> Float[np.ndarray, "..."]:
        """Density of the continuous part, -Im G(x + i0) / pi; zero outside the support."""
        raise NotImplementedError

    def cdf(self, x: ArrayLike) -> Float[np.ndarray, "..."]:
        """Distribution function F(x) = mass of (-inf, x], atoms included."""
        raise NotImplementedError

    def quantile(self, p: ArrayLike) -> Float[np.ndarray, "..."]:
        """Smallest x with F(x) >= p."""
        raise NotImplementedError

    def moment(self, k: int) -> float:
        """Moment m_k = integral of t^k rho(dt)."""
        raise NotImplementedError

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
