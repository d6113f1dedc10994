"""Kesten-McKay and Wachter laws: the free powers and corners of a projection, in closed form."""

from __future__ import annotations

from abc import abstractmethod
from math import sqrt

import numpy as np
from jaxtyping import Complex

from torch_rmt.measures.base import Atom, Interval, SpectralMeasure
from torch_rmt.measures.classical import positive
from torch_rmt.measures.half_plane import Numbers, fold, two_cut_root, unfold


class _OneInterval(SpectralMeasure):
    """A law whose G is a rational function of z and of the root of (z - low)(z - high)."""

    @abstractmethod
    def _parts(self, z: Complex[np.ndarray, "..."]) -> tuple[np.ndarray, np.ndarray]:
        """G and the root in the closed upper half-plane."""

    def stieltjes(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G(z), see `_parts`."""
        points, below = fold(z)
        return unfold(self._parts(points)[0], below)


class KestenMcKay(_OneInterval):
    """Spectrum of the infinite tree of degree d >= 2: a free sum of d signs; density on |x| < 2 sqrt(d - 1).

    rho = d sqrt(4 (d - 1) - x^2) / (2 pi (d^2 - x^2)). Source: Kesten 1959, McKay 1981.

    >>> KestenMcKay(2.0).variance
    2.0
    """

    def __init__(self, degree: float | int) -> None:
        if not (np.isfinite(degree) and degree >= 2):
            raise ValueError(
                f"a Kesten-McKay law needs a degree >= 2, got {degree}; below use free_power of a Bernoulli law"
            )
        self.degree = float(degree)

    def __repr__(self) -> str:
        return f"KestenMcKay({self.degree:g})"

    def _parts(self, z: Complex[np.ndarray, "..."]) -> tuple[np.ndarray, np.ndarray]:
        """G(z) = 2 (d - 1) / ((d - 2) z + d sqrt(z^2 - 4 (d - 1)))."""
        root = two_cut_root(z, *self.support()[0])
        with np.errstate(all="ignore"):
            g = 2 * (self.degree - 1) / ((self.degree - 2) * z + self.degree * root)
        return np.asarray(g), root

    def slope(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G'(z), from the formula for G."""
        points, below = fold(z)
        g, root = self._parts(points)
        d = self.degree
        with np.errstate(all="ignore"):
            return unfold(-(g**2) * (d - 2 + d * points / root) / (2 * (d - 1)), below)

    def log_potential(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """L = (d/2) log(w^2 - 1) + (d - 1) log G, w = (z + (d - 1)/G)/d."""
        points, below = fold(z)
        d = self.degree
        f = fold(1.0 / self._parts(points)[0])[0]
        w = (points + (d - 1) * f) / d
        return unfold(0.5 * d * (np.log(w - 1) + np.log(w + 1)) - (d - 1) * np.log(f), below)

    def support(self) -> tuple[Interval, ...]:
        """One interval, plus and minus 2 sqrt(d - 1)."""
        edge = 2 * sqrt(self.degree - 1)
        return ((-edge, edge),)

    def atoms(self) -> tuple[Atom, ...]:
        """None."""
        return ()

    @property
    def variance(self) -> float:
        """The degree."""
        return self.degree


class Wachter(_OneInterval):
    """Corner of a projection: the law of P Q P in the range of P, for free projections of rank `rank` and `corner`.

    For Wishart matrices A, B of dimension p with n_A, n_B samples it is the law of (A + B)^(-1/2) A (A + B)^(-1/2),
    rank = n_A / (n_A + n_B), corner = p / (n_A + n_B): the Jacobi (MANOVA) ensemble, see `jacobi`.
    F = 1/(corner G) solves b (1 - b) F^2 + ((2 b - 1) z + a - b) F - z (z - 1) = 0 with a = rank, b = corner.
    Source: Wachter 1980.

    >>> Wachter(0.5, 0.25).mean
    0.5
    """

    def __init__(self, rank: float | int, corner: float | int) -> None:
        if not (0 < rank < 1 and 0 < corner < 1):
            raise ValueError(
                f"rank and corner of a Wachter law must lie strictly between 0 and 1, got {rank} and {corner}"
            )
        self.rank, self.corner = float(rank), float(corner)

    def __repr__(self) -> str:
        return f"Wachter(rank={self.rank}, corner={self.corner})"

    @property
    def mean(self) -> float:
        """The rank."""
        return self.rank

    def _parts(self, z: Complex[np.ndarray, "..."]) -> tuple[np.ndarray, np.ndarray]:
        """G(z) = 2 (1 - b) / (s - (2 b - 1) z - a + b), s = sqrt((z - low)(z - high))."""
        a, b = self.rank, self.corner
        root = two_cut_root(z, *self.support()[0])
        linear = (2 * b - 1) * z + a - b
        plus, minus = root + linear, root - linear
        with np.errstate(all="ignore"):
            g = np.where(np.abs(minus) >= np.abs(plus), 2 * (1 - b) / minus, plus / (2 * b * z * (z - 1)))
        return np.asarray(g), root

    def slope(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G'(z) = -b G^2 F', F' = (2 z - 1 - (2 b - 1) F) / s."""
        points, below = fold(z)
        g, root = self._parts(points)
        b = self.corner
        with np.errstate(all="ignore"):
            return unfold(-(b * g**2) * (2 * points - 1 - (2 * b - 1) / (b * g)) / root, below)

    def log_potential(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """L = ((1 - a) log w + a log(w - 1) - (1 - b) log F) / b + log b, w = z + (1 - b) F."""
        points, below = fold(z)
        a, b = self.rank, self.corner
        with np.errstate(all="ignore"):
            root = two_cut_root(points, *self.support()[0])
            linear = (2 * b - 1) * points + a - b
            plus, minus = root + linear, root - linear
            f = np.where(np.abs(minus) >= np.abs(plus), minus / (2 * b * (1 - b)), 2 * points * (points - 1) / plus)
            f = fold(np.where(f == 0, 1e-300, f))[0]
            w = points + (1 - b) * f
            value = ((1 - a) * np.log(w) + a * np.log(w - 1) - (1 - b) * np.log(f)) / b + np.log(b)
        return unfold(np.asarray(value), below)

    def support(self) -> tuple[Interval, ...]:
        """One interval, (sqrt(a (1 - b)) -+ sqrt(b (1 - a)))^2."""
        a, b = self.rank, self.corner
        one, two = sqrt(a * (1 - b)), sqrt(b * (1 - a))
        return (((one - two) ** 2, (one + two) ** 2),)

    def atoms(self) -> tuple[Atom, ...]:
        """At 0, 1 - a/b, and at 1, 1 - (1 - a)/b, where positive."""
        masses = ((0.0, 1 - self.rank / self.corner), (1.0, 1 - (1 - self.rank) / self.corner))
        return tuple((location, mass) for location, mass in masses if mass > 0)


def jacobi(ratio_a: float | int, ratio_b: float | int) -> Wachter:
    """Law of (A + B)^(-1/2) A (A + B)^(-1/2) for Wishart A, B with dimension / samples = ratio_a, ratio_b.

    >>> jacobi(0.5, 0.5)
    Wachter(rank=0.5, corner=0.25)
    """
    samples_a, samples_b = 1.0 / positive("ratio_a", ratio_a), 1.0 / positive("ratio_b", ratio_b)
    total = samples_a + samples_b
    if total <= 1:
        raise ValueError("A + B is singular: the samples of A and B together must exceed the dimension")
    return Wachter(samples_a / total, 1.0 / total)
