"""Laws with an elementary density: uniform and quarter circle."""

from __future__ import annotations

from math import gamma, pi, sqrt

import numpy as np
from jaxtyping import Complex, Float
from scipy.special import log1p

from torch_rmt.measures.base import Atom, Interval, SpectralMeasure
from torch_rmt.measures.classical import finite, positive
from torch_rmt.measures.half_plane import Numbers, fold, two_cut_root, unfold

_SERIES = 20  # terms of 1 - arctan(x) / x: 0.4^40 is rounding


class Uniform(SpectralMeasure):
    """Constant density 1 / (high - low).

    >>> Uniform(0.0, 2.0).mean
    1.0
    """

    def __init__(self, low: float | int = 0.0, high: float | int = 1.0) -> None:
        self.low, self.high = finite("low", low), finite("high", high)
        if self.high <= self.low:
            raise ValueError(f"a uniform law needs low < high, got {low} and {high}")

    def __repr__(self) -> str:
        return f"Uniform({self.low}, {self.high})"

    def stieltjes(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G(z) = (log(z - low) - log(z - high)) / (high - low)."""
        points, below = fold(z)
        with np.errstate(all="ignore"):
            return unfold(self._log_ratio(points) / (self.high - self.low), below)

    def _log_ratio(self, z: Complex[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
        """log((z - low) / (z - high)) in the closed upper half-plane; the difference of logarithms cancels far out."""
        width = self.high - self.low
        far = np.abs(z - self.high) > 4 * width
        series = log1p(width / np.where(far, z - self.high, np.inf))
        return np.where(far, series, np.log(z - self.low) - np.log(z - self.high))

    def slope(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G'(z) = -1 / ((z - low)(z - high))."""
        points, below = fold(z)
        with np.errstate(all="ignore"):
            return unfold(-1.0 / ((points - self.low) * (points - self.high)), below)

    def log_potential(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """L = log(z - high) + (z - low) log((z - low) / (z - high)) / (high - low) - 1."""
        points, below = fold(z)
        with np.errstate(all="ignore"):
            ratio = (points - self.low) / (self.high - self.low) * self._log_ratio(points)
            value = np.log(points - self.high) + np.where(points == self.low, 0.0, ratio) - 1.0
        # at the upper end two infinite terms leave log(high - low) - 1
        return unfold(np.where(points == self.high, np.log(self.high - self.low) - 1.0, value), below)

    def support(self) -> tuple[Interval, ...]:
        """The interval [low, high]."""
        return ((self.low, self.high),)

    def atoms(self) -> tuple[Atom, ...]:
        """None."""
        return ()

    def density(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """Constant on the interval."""
        points = np.asarray(x, dtype=float)
        return np.where((points >= self.low) & (points <= self.high), 1.0 / (self.high - self.low), 0.0)

    def cdf(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """(x - low) / (high - low), clipped to [0, 1]."""
        return np.asarray(np.clip((np.asarray(x, dtype=float) - self.low) / (self.high - self.low), 0.0, 1.0))

    def quantile(self, p: Numbers) -> Float[np.ndarray, "..."]:
        """Linear in p."""
        levels = np.asarray(p, dtype=float)
        if not np.all((levels >= 0) & (levels <= 1)):
            raise ValueError("quantile levels must lie in [0, 1]")
        return np.asarray(self.low + (self.high - self.low) * levels)

    def moment(self, k: int) -> float:
        """Mean of the k + 1 products low^j high^(k - j)."""
        if k < 0:
            raise ValueError(f"moments are defined here for k >= 0, got k = {k}")
        return sum(self.low**j * self.high ** (k - j) for j in range(k + 1)) / (k + 1)


class QuarterCircle(SpectralMeasure):
    """Singular values of a square Gaussian matrix: density 4 sqrt(r^2 - x^2) / (pi r^2), 0 < x < r.

    The radius is 2 for unit variance.

    >>> round(QuarterCircle().moment(2), 12)
    1.0
    """

    def __init__(self, radius: float | int = 2.0) -> None:
        self.radius = positive("radius", radius)

    def __repr__(self) -> str:
        return f"QuarterCircle({self.radius})"

    def stieltjes(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G = (4 / (pi r^2)) (pi (z - s) / 2 + r - s arctan(r / s)), s = sqrt(z^2 - r^2)."""
        return self.stieltjes_and_slope(z)[0]

    def slope(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G' = (4 / (pi r^2)) (pi (1 - z / s) / 2 - (z / s) arctan(r / s) + r / z)."""
        return self.stieltjes_and_slope(z)[1]

    def stieltjes_and_slope(self, z: Numbers) -> tuple[Complex[np.ndarray, "..."], Complex[np.ndarray, "..."]]:
        """Both, without cancellation far out: z - s = r^2 / (z + s), and 1 - arctan(x) / x by its series."""
        points, below = fold(z)
        r = self.radius
        with np.errstate(all="ignore"):
            root = two_cut_root(points, -r, r)
            ratio = r / root
            # within the radius arctan(r / s) is beside its cut; arctan(s / r) is not
            side = np.where(points.real >= 0, 1.0, -1.0)
            turned = side * 0.5 * pi + 1j * np.log(side * points / (r - 1j * root))
            angle = np.where(np.abs(ratio) > 0.8, turned, np.arctan(ratio))
            square = ratio * ratio
            series = -square * np.polynomial.polynomial.polyval(-square, -1.0 / (2 * np.arange(_SERIES) + 3.0))
            defect = np.where(np.abs(ratio) < 0.4, series, 1 - angle / ratio)
            g = 4 / (pi * r * r) * (0.5 * pi * r * r / (points + root) + r * defect)
            rest = points * defect / root - r * r / (points * root)
            slope = 4 / (pi * r * r) * (rest * ratio - 0.5 * pi * r * r / (root * (points + root)))
        return unfold(g, below), unfold(slope, below)

    def support(self) -> tuple[Interval, ...]:
        """The interval [0, r]."""
        return ((0.0, self.radius),)

    def atoms(self) -> tuple[Atom, ...]:
        """None."""
        return ()

    def density(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """4 sqrt(r^2 - x^2) / (pi r^2)."""
        points = np.asarray(x, dtype=float)
        inside = (points >= 0) & (points <= self.radius)
        return np.where(inside, 4 / (pi * self.radius**2) * np.sqrt(np.maximum(self.radius**2 - points**2, 0)), 0.0)

    def cdf(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """(2 / pi)(u sqrt(1 - u^2) + arcsin u), u = x / r."""
        u = np.clip(np.asarray(x, dtype=float) / self.radius, 0.0, 1.0)
        return np.asarray(2 / pi * (u * np.sqrt(1 - u * u) + np.arcsin(u)))

    def moment(self, k: int) -> float:
        """r^k Gamma((k + 1)/2) / (sqrt(pi) Gamma(k/2 + 2))."""
        if k < 0:
            raise ValueError(f"moments are defined here for k >= 0, got k = {k}")
        return self.radius**k * gamma((k + 1) / 2) / (sqrt(pi) * gamma(k / 2 + 2))
