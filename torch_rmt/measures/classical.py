"""Laws with a Stieltjes transform of degree two: semicircle, Marchenko-Pastur, free Poisson, arcsine."""

from __future__ import annotations

from math import comb, sqrt

import numpy as np
from jaxtyping import Complex
from scipy.special import log1p

from torch_rmt.measures.base import Atom, Interval, SpectralMeasure
from torch_rmt.measures.half_plane import Numbers, fold, two_cut_root, unfold


def positive(name: str, value: float | int) -> float:
    """Return the value as a float, or say that it must be positive."""
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value}; for a law without spread use PointMass")
    return float(value)


def finite(name: str, value: float | int) -> float:
    """Return the value as a float, or say that it must be finite."""
    if not np.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return float(value)


class Semicircle(SpectralMeasure):
    """Wigner's semicircle: density sqrt(4 v - (x - m)^2) / (2 pi v), the free counterpart of the normal law.

    >>> Semicircle(variance=4.0).support()
    ((-4.0, 4.0),)
    """

    def __init__(self, variance: float | int = 1.0, mean: float | int = 0.0) -> None:
        self._variance = positive("variance", variance)
        self._mean = finite("mean", mean)

    def __repr__(self) -> str:
        return f"Semicircle(variance={self._variance}, mean={self._mean})"

    @property
    def mean(self) -> float:
        """First moment."""
        return self._mean

    @property
    def variance(self) -> float:
        """Second central moment."""
        return self._variance

    def _root(self, z: Complex[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
        return two_cut_root(z, *self.bounds())

    def stieltjes(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G(z) = 2 / (z - m + sqrt((z - m)^2 - 4 v))."""
        points, below = fold(z)
        return unfold(2.0 / (points - self._mean + self._root(points)), below)

    def slope(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G'(z) = -G(z) / sqrt((z - m)^2 - 4 v)."""
        points, below = fold(z)
        root = self._root(points)
        with np.errstate(all="ignore"):
            return unfold(-2.0 / ((points - self._mean + root) * root), below)

    def log_potential(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """L = (z - m) G - 1 - v G^2 / 2 - log G."""
        points, below = fold(z)
        g = self.stieltjes(points)
        inverse = fold(1.0 / g)[0]
        return unfold((points - self._mean) * g - 1.0 - 0.5 * self._variance * g * g + np.log(inverse), below)

    def support(self) -> tuple[Interval, ...]:
        """One interval, mean plus and minus two standard deviations."""
        radius = 2.0 * sqrt(self._variance)
        return ((self._mean - radius, self._mean + radius),)

    def atoms(self) -> tuple[Atom, ...]:
        """None."""
        return ()

    def bounds(self) -> Interval:
        """Ends of the support."""
        return self.support()[0]

    def moment(self, k: int) -> float:
        """Sum over j of binomial(k, 2 j) m^(k - 2 j) v^j times the Catalan number C_j."""
        if k < 0:
            raise ValueError(f"moments are defined here for k >= 0, got k = {k}")
        return float(
            sum(
                comb(k, 2 * j) * comb(2 * j, j) // (j + 1) * self._mean ** (k - 2 * j) * self._variance**j
                for j in range(k // 2 + 1)
            )
        )


class MarchenkoPastur(SpectralMeasure):
    """Law of X X^T / n for X of shape (p, n) with entry variance v, and `ratio` = p / n; mean v.

    G solves c v z G^2 - (z - v + c v) G + 1 = 0, c the ratio. For c > 1 an atom 1 - 1/c sits at 0.
    Source: Marchenko and Pastur 1967.

    >>> MarchenkoPastur(4.0).atoms()
    ((0.0, 0.75),)
    """

    def __init__(self, ratio: float | int, variance: float | int = 1.0) -> None:
        self.ratio = positive("ratio", ratio)
        self.scale = positive("variance", variance)

    def __repr__(self) -> str:
        return f"MarchenkoPastur(ratio={self.ratio}, variance={self.scale})"

    def stieltjes(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G(z) = 2 / (B + s), B = z - v + c v, s = sqrt((z - a)(z - b)), without cancellation near 0."""
        points, below = fold(z)
        return unfold(self._evaluate(points)[0], below)

    def _evaluate(self, z: Complex[np.ndarray, "..."]) -> tuple[np.ndarray, np.ndarray]:
        c, v = self.ratio, self.scale
        root = two_cut_root(z, *self.support()[0])
        linear = z + (c - 1) * v
        total, difference = linear + root, linear - root
        with np.errstate(all="ignore"):
            g = np.where(np.abs(total) >= np.abs(difference), 2.0 / total, difference / (2 * c * v * z))
        return np.asarray(g), root

    def slope(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G'(z) = (c v G^2 - G) / s."""
        points, below = fold(z)
        g, root = self._evaluate(points)
        with np.errstate(all="ignore"):
            return unfold((self.ratio * self.scale * g * g - g) / root, below)

    def log_potential(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """L = z G - 1 - log G + log(1 - c v G) / c."""
        points, below = fold(z)
        c, v = self.ratio, self.scale
        with np.errstate(all="ignore"):
            g = self._evaluate(points)[0]
            value = points * g - 1.0 + np.log(fold(1.0 / g)[0]) + log1p(fold(-c * v * g)[0]) / c
            at_zero = points == 0
            if np.any(at_zero):
                limit = np.log(v) - 1.0 - (1.0 / c - 1.0) * np.log1p(-c) if c < 1 else np.log(v) - 1.0
                if c > 1:
                    limit = -np.inf
                value = np.where(at_zero, limit + 1j * np.pi * min(1.0, 1.0 / c), value)
        return unfold(np.asarray(value), below)

    def support(self) -> tuple[Interval, ...]:
        """One interval, v (1 -+ sqrt c)^2."""
        root = sqrt(self.ratio)
        return ((self.scale * (1 - root) ** 2, self.scale * (1 + root) ** 2),)

    def atoms(self) -> tuple[Atom, ...]:
        """The kernel of X X^T: 1 - 1/c at 0 for c > 1."""
        return ((0.0, 1.0 - 1.0 / self.ratio),) if self.ratio > 1 else ()

    def moment(self, k: int) -> float:
        """m_k = v^k times the sum over j of the Narayana numbers N(k, j) c^(k - j)."""
        if k < 0:
            raise ValueError(f"moments are defined here for k >= 0, got k = {k}")
        if k == 0:
            return 1.0
        narayana = (comb(k, j) * comb(k, j - 1) // k * self.ratio ** (k - j) for j in range(1, k + 1))
        return float(self.scale**k * sum(narayana))


def free_poisson(rate: float | int, jump: float | int = 1.0) -> MarchenkoPastur:
    """Free Poisson law with free cumulants rate * jump^k, as the Marchenko-Pastur law that it is.

    >>> free_poisson(2.0).mean
    2.0
    """
    rate, jump = positive("rate", rate), positive("jump", jump)
    return MarchenkoPastur(1.0 / rate, rate * jump)


class Arcsine(SpectralMeasure):
    """Arcsine law on (low, high): density 1 / (pi sqrt((x - low)(high - x))).

    >>> Arcsine(-2.0, 2.0).variance
    2.0
    """

    def __init__(self, low: float | int = -2.0, high: float | int = 2.0) -> None:
        self.low, self.high = finite("low", low), finite("high", high)
        if self.high <= self.low:
            raise ValueError(f"an arcsine law needs low < high, got {low} and {high}")

    def __repr__(self) -> str:
        return f"Arcsine({self.low}, {self.high})"

    def stieltjes(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G(z) = 1 / sqrt((z - low)(z - high))."""
        points, below = fold(z)
        with np.errstate(all="ignore"):
            return unfold(1.0 / two_cut_root(points, self.low, self.high), below)

    def slope(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G'(z) = -(z - centre) G(z)^3."""
        points, below = fold(z)
        with np.errstate(all="ignore"):
            cubed = two_cut_root(points, self.low, self.high) ** -3
            return unfold(-(points - 0.5 * (self.low + self.high)) * cubed, below)

    def log_potential(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """L = log((z - centre + sqrt((z - low)(z - high))) / 2)."""
        points, below = fold(z)
        root = two_cut_root(points, self.low, self.high)
        return unfold(np.log(0.5 * (points - 0.5 * (self.low + self.high) + root)), below)

    def support(self) -> tuple[Interval, ...]:
        """The interval [low, high]."""
        return ((self.low, self.high),)

    def atoms(self) -> tuple[Atom, ...]:
        """None."""
        return ()

    def moment(self, k: int) -> float:
        """Sum over j of binomial(k, 2 j) binomial(2 j, j) centre^(k - 2 j) (radius / 2)^(2 j)."""
        if k < 0:
            raise ValueError(f"moments are defined here for k >= 0, got k = {k}")
        centre, half = 0.5 * (self.low + self.high), 0.25 * (self.high - self.low)
        terms = (comb(k, 2 * j) * comb(2 * j, j) * centre ** (k - 2 * j) * half ** (2 * j) for j in range(k // 2 + 1))
        return float(sum(terms))
