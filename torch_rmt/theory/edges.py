"""Edges: the Tracy-Widom fluctuation of the largest eigenvalue, and where spikes leave the bulk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float
from numpy.polynomial import chebyshev
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import airy

from torch_rmt.measures.base import SpectralMeasure
from torch_rmt.theory.sizes import whole_number

_LOW, _HIGH = -12.0, 13.0  # beyond, F1 is below 1e-30 or above 1 - 1e-16
_DEGREE = 90  # rounding error from 80 on, found by tuning; so too the 48 nodes below


def tracy_widom_determinant(s: ArrayLike) -> Float[np.ndarray, "..."]:
    """F1(s) = det(1 - B_s), B_s(x, y) = Ai(x + y + s) on L^2(0, inf), for the real (GOE) case.

    Ferrari and Spohn 2005, by Bornemann's Nyström method 2010: Gauss-Legendre on (0, L), where the kernel has died
    out at L = 16 - s; the determinant then converges exponentially. About 1e-14 absolute.
    """
    point = np.atleast_1d(np.asarray(s, dtype=float)).ravel()
    nodes, weights = np.polynomial.legendre.leggauss(48)
    value = np.empty(point.shape)
    for k, shift in enumerate(point):
        length = 0.5 * max(16.0 - shift, 2.0)
        x, w = 0.5 * length * (nodes + 1.0), 0.5 * length * weights
        root = np.sqrt(w)
        kernel = airy(x[:, None] + x[None, :] + shift)[0]
        value[k] = np.linalg.det(np.eye(len(x)) - root[:, None] * kernel * root[None, :])
    return value.reshape(np.shape(s))


@cache
def _interpolant() -> tuple[Float[np.ndarray, " terms"], Float[np.ndarray, " slopes"]]:
    """Chebyshev coefficients of F1 on [_LOW, _HIGH], and of its derivative."""
    nodes = chebyshev.chebpts1(_DEGREE + 1)
    x = 0.5 * (_LOW + _HIGH) + 0.5 * (_HIGH - _LOW) * nodes
    coefficients = chebyshev.chebfit(nodes, tracy_widom_determinant(x), _DEGREE)
    return coefficients, chebyshev.chebder(coefficients)


@dataclass(frozen=True)
class TracyWidom:
    """The Tracy-Widom law of real symmetric matrices (beta = 1).

    >>> law = TracyWidom()
    >>> round(law.mean, 6), round(law.variance, 6)          # Bornemann 2010, table 10
    (-1.206534, 1.607781)
    """

    def cdf(self, s: ArrayLike) -> Float[np.ndarray, "..."]:
        """Distribution function F1(s), from the determinant through one Chebyshev interpolant; 1e-12 absolute."""
        point = np.asarray(s, dtype=float)
        coefficients, _ = _interpolant()
        at = np.clip((2.0 * point - _LOW - _HIGH) / (_HIGH - _LOW), -1.0, 1.0)
        value = np.clip(chebyshev.chebval(at, coefficients), 0.0, 1.0)
        return np.asarray(np.where(point >= _HIGH, 1.0, np.where(point <= _LOW, 0.0, value)))

    def density(self, s: ArrayLike) -> Float[np.ndarray, "..."]:
        """Density F1'(s)."""
        point = np.asarray(s, dtype=float)
        _, slope = _interpolant()
        at = np.clip((2.0 * point - _LOW - _HIGH) / (_HIGH - _LOW), -1.0, 1.0)
        value = np.maximum(chebyshev.chebval(at, slope) * 2.0 / (_HIGH - _LOW), 0.0)
        return np.asarray(np.where((point >= _HIGH) | (point <= _LOW), 0.0, value))

    def survival(self, s: ArrayLike) -> Float[np.ndarray, "..."]:
        """1 - F1(s), accurate far out: there tr B_s = integral of Ai(s + 2x) dx, half that of Ai from s on."""
        point = np.asarray(s, dtype=float)
        tail = np.array([_airy_tail(value) for value in np.atleast_1d(point).ravel()]).reshape(point.shape)
        return np.asarray(np.where(point > 4.0, 0.5 * tail, 1.0 - self.cdf(point)))

    def quantile(self, p: ArrayLike) -> Float[np.ndarray, "..."]:
        """Smallest s with F1(s) >= p."""
        levels = np.asarray(p, dtype=float)

        def one(level: float) -> float:
            if not 0.0 < level < 1.0:
                return float(np.sign(level - 0.5)) * np.inf
            if level > 1.0 - 1e-7:
                return float(brentq(lambda s: float(self.survival(np.array(s))) - (1.0 - level), 4.0, 40.0))
            return float(brentq(lambda s: float(self.cdf(np.array(s))) - level, _LOW, _HIGH, xtol=1e-13))

        return np.array([one(level) for level in np.atleast_1d(levels).ravel()]).reshape(levels.shape)

    @property
    def mean(self) -> float:
        """Mean, -1.2065335745..."""
        return self._moments()[0]

    @property
    def variance(self) -> float:
        """Variance, 1.6077810345..."""
        return self._moments()[1]

    def _moments(self) -> tuple[float, float]:
        nodes, weights = np.polynomial.legendre.leggauss(160)
        x = 0.5 * (_LOW + _HIGH) + 0.5 * (_HIGH - _LOW) * nodes
        mass = self.density(x) * weights * 0.5 * (_HIGH - _LOW)
        mean = float(mass @ x)
        return mean, float(mass @ (x - mean) ** 2)


def _airy_tail(s: float) -> float:
    """Integral of Ai from s to infinity, by Gauss-Legendre where it lives; s >= 4 is where it is needed."""
    start = max(s, 0.0)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    # Ai(s + t) falls at least like exp(-sqrt(s) t)
    length = 40.0 / np.sqrt(max(start, 1.0))
    x = start + 0.5 * length * (nodes + 1.0)
    return float(0.5 * length * (weights @ airy(x)[0]))


@dataclass(frozen=True)
class LargestEigenvalue:
    """Law of the largest eigenvalue of an n x n real matrix: edge + scale TW1, scale = (kappa n)^(-2/3).

    Fields:
        edge: upper end of the law of the bulk.
        kappa: the density there is (kappa/pi) sqrt(edge - x); for a law with explicit z(G), kappa = sqrt(2/z''(G_c)).
        dim: n.
    """

    edge: float
    kappa: float
    dim: int

    @property
    def scale(self) -> float:
        """Width of the fluctuation, (kappa n)^(-2/3)."""
        return float((self.kappa * self.dim) ** (-2.0 / 3.0))

    @property
    def mean(self) -> float:
        """Expected largest eigenvalue."""
        return self.edge + self.scale * TracyWidom().mean

    @property
    def variance(self) -> float:
        """Its variance."""
        return self.scale**2 * TracyWidom().variance

    def p_value(self, eigenvalue: float) -> float:
        """Probability that noise alone gives a largest eigenvalue at least this large."""
        return float(TracyWidom().survival(np.array((eigenvalue - self.edge) / self.scale)))

    def quantile(self, p: float) -> float:
        """Level that the largest eigenvalue stays below with probability p."""
        return self.edge + self.scale * float(TracyWidom().quantile(np.array(p)))


def edge_sharpness(measure: SpectralMeasure, *, upper: bool = True) -> float:
    """kappa, where the density near the outer edge is (kappa/pi) sqrt(distance): extrapolated from inside.

    Raises:
        ValueError: no continuous part, or an edge that is not of square-root type (a hard edge, an atom).
    """
    bands = measure.support()
    if not bands:
        raise ValueError("the law has no continuous part, hence no soft edge")
    low, high = bands[-1] if upper else bands[0]
    edge, inward = (high, -1.0) if upper else (low, 1.0)
    # density/sqrt(distance) is a power series in the distance: Chebyshev extrapolation to zero distance
    nodes = 0.5 * (1.0 + np.cos(np.pi * (np.arange(6) + 0.5) / 6.0))
    distance = 0.02 * (high - low) * nodes
    ratio = np.pi * measure.density(edge + inward * distance) / np.sqrt(distance)
    kappa = float(np.polynomial.polynomial.polyfit(distance / distance.max(), ratio, 5)[0])
    coarse = float(np.polynomial.polynomial.polyfit(distance / distance.max(), ratio, 3)[0])
    if not kappa > 0.0 or abs(kappa - coarse) > 0.05 * kappa:
        raise ValueError(f"the edge at {edge:.6g} is not of square-root type: no Tracy-Widom law there")
    return kappa


def largest_eigenvalue_law(measure: SpectralMeasure, dim: int) -> LargestEigenvalue:
    """Tracy-Widom law of the largest eigenvalue of a dim x dim real matrix whose spectrum has the given law.

    Args:
        measure: law of the whole spectrum, atoms included.
        dim: number of eigenvalues.

    Raises:
        ValueError: dim below 1, or an upper edge that is not of square-root type.

    >>> from torch_rmt.measures import Semicircle
    >>> law = largest_eigenvalue_law(Semicircle(), 1000)
    >>> round(law.kappa, 6), round(law.scale * 1000 ** (2 / 3), 6)
    (1.0, 1.0)
    """
    dim = whole_number("dim", dim)
    kappa = edge_sharpness(measure)
    return LargestEigenvalue(edge=measure.support()[-1][1], kappa=kappa, dim=dim)
