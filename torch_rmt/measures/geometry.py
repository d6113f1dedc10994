"""The two kinds of free convolution, written as one system of equations.

With F = 1/G and h(w) = F(w) - w = -M(w)/G(w), a sum of free variables of laws 1..K, the i-th taken n_i times, obeys

    F_i(w_i) = F for all i,   z = F - sum_i n_i h_i(w_i),   hence   w_i = z + sum_j (n_j - [i = j]) h_j(w_j).

With P = (1 + M)/M, lambda = log w and k(w) = log P(w) - lambda = -log(-h(w)), a product obeys the same equations with
(w, h, F, log z) replaced by (lambda, k, log P, log z). In both cases the right-hand side maps the upper half-plane
(the strip 0 < Im < pi) to itself, so a solution in the interior is the only one (Denjoy-Wolff; Belinschi and
Bercovici 2007). Arrays of coordinates and fields have one row a law, one column a point. In rectangular
products the i-th factor lives in another dimension: M_i(w_i) = Lambda_i M.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Float

from torch_rmt.measures.base import SpectralMeasure
from torch_rmt.measures.discrete import Discrete
from torch_rmt.measures.half_plane import fold
from torch_rmt.measures.numeric import contour_moments

_FAR, _TERMS = 16.0, 13  # radii from where the moment series is used; its terms: 16^-13 is rounding


@dataclass(frozen=True)
class Factor:
    """One law in a free convolution and how often it is taken."""

    law: SpectralMeasure
    count: float | int = 1.0
    dimension: float | int = 1.0  # Lambda_i, only for rectangular products

    @cached_property
    def radius(self) -> float:
        """Largest modulus in the law's hull."""
        return max(abs(end) for end in self.law.bounds())

    @cached_property
    def moments(self) -> Float[np.ndarray, " k"]:
        """Moments m_1, m_2, ... in units of the radius."""
        r = self.radius
        if abs(np.log10(r)) * _TERMS < 290:
            return np.asarray(self.law.moments(_TERMS) / r ** np.arange(1, _TERMS + 1))
        return contour_moments(self.law, _TERMS, self.law.bounds(), r)

    def shift(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """h(w) = 1/G(w) - w and h'(w) on the closed upper half-plane, also far out, where the difference cancels."""
        h, dh = self._near(w)
        bad = ~(np.isfinite(h) & np.isfinite(dh))
        if bad.any():  # on an atom, or where G is singular: step off by a hair
            h[bad], dh[bad] = self._near(w[bad] + 1e-14j * np.maximum(np.abs(w[bad]), 1e-3 * self.radius))
        if not isinstance(self.law, Discrete):
            far = np.abs(w) > _FAR * self.radius
            if far.any():
                h[far], dh[far] = self._far(w[far])
        return h, dh

    def _near(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(self.law, Discrete):
            return self.law.shift(w)
        with np.errstate(all="ignore"):
            g, slope = self.law.stieltjes_and_slope(w)
            return 1.0 / g - w, -slope / g**2 - 1.0

    def _far(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inverse = self.radius / w
        m, dm = np.zeros_like(w), np.zeros_like(w)
        for k in range(_TERMS, 1, -1):  # Horner's rule for M / inverse and -w M'(w) / inverse
            m, dm = inverse * (m + self.moments[k - 1]), inverse * (dm + k * self.moments[k - 1])
        scaled = self.radius * (m + self.moments[0])  # w M without a product of large and small
        m, dm = inverse * (m + self.moments[0]), -inverse * (dm + self.moments[0])
        return -scaled / (1 + m), -(m + m**2 + dm) / (1 + m) ** 2


@dataclass(frozen=True)
class Geometry:
    """A sum of free variables: coordinates are the points themselves."""

    factors: tuple[Factor, ...]
    counts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", np.array([[factor.count] for factor in self.factors]))

    @cached_property
    def total(self) -> float:
        """Number of summands, sum of n_i."""
        return float(self.counts.sum())

    @cached_property
    def scale(self) -> float:
        """A length beyond which everything is far away."""
        spread = [f.count * (f.law.bounds()[1] - f.law.bounds()[0]) for f in self.factors]
        return float(sum(spread))

    @cached_property
    def ceiling(self) -> np.ndarray:
        """Largest imaginary part of each coordinate."""
        return np.full((len(self.factors), 1), np.inf)

    def floor(self, zeta: np.ndarray) -> np.ndarray:
        """Smallest imaginary part that each coordinate can have."""
        return np.asarray(np.broadcast_to(np.maximum(zeta.imag, 0.0), (len(self.factors), zeta.size)))

    def coordinate(self, z: np.ndarray) -> np.ndarray:
        """The point itself."""
        return z

    def abscissa(self, x: np.ndarray) -> np.ndarray:
        """A coordinate of points of the axis in which solutions are smooth."""
        return x

    def pace(self, x: np.ndarray) -> np.ndarray | float:
        """Derivative of the coordinate by the abscissa."""
        return 1.0

    @property
    def start(self) -> float:
        """Height above the axis, in units of the scale, at which Newton finds the solution from the point itself."""
        return 4.0

    def point(self, w: np.ndarray) -> np.ndarray:
        """The point itself."""
        return w

    def length(self, w: np.ndarray) -> np.ndarray:
        """Unit in which errors of a coordinate are counted."""
        return np.asarray(np.maximum(np.abs(w), self._grain))

    def distance(self, w: np.ndarray) -> np.ndarray:
        """Moduli of the points in units of their laws' radii."""
        return np.asarray(np.abs(w) / self._radii)

    def turn(self, w: np.ndarray) -> np.ndarray:
        """How far coordinates are from those of real points, relative."""
        return np.asarray(np.abs(w.imag) / self.length(w))

    @cached_property
    def _radii(self) -> np.ndarray:
        return np.array([[f.radius] for f in self.factors])

    @cached_property
    def _grain(self) -> np.ndarray:
        return np.array([[1e-3 * (f.law.bounds()[1] - f.law.bounds()[0])] for f in self.factors])

    def fields(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """h_i(w_i) and its derivative, one row a law."""
        h, dh = np.empty_like(w), np.empty_like(w)
        for i, factor in enumerate(self.factors):
            h[i], dh[i] = factor.shift(w[i])
        return h, dh

    def residual(self, zeta: np.ndarray, w: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray | float]:
        """w_i - zeta - sum_j (n_j - [i = j]) h_j(w_j), and how the common value weighs in each row (1 here)."""
        if len(self.factors) == 2 and self.total == 2.0:  # no cancellation where one coordinate is huge
            return w - zeta - h[::-1], 1.0
        return w + h - (zeta + (self.counts * h).sum(axis=0)), 1.0

    def shares(self, common: np.ndarray) -> np.ndarray:
        """F_i (or log P_i) of each law, given the common value; equal to it but in rectangular products."""
        return np.asarray(np.broadcast_to(common, (len(self.factors), common.size)))

    def share_slopes(self, common: np.ndarray) -> np.ndarray | float:
        """Derivative of `shares`."""
        return 1.0

    def common_at(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        """F or log P of solutions at points of the axis."""
        zeta = np.asarray(self.coordinate(x.astype(complex)))
        return np.asarray(zeta + (self.counts * self.fields(w)[0]).sum(axis=0))

    def along(self, w: np.ndarray, f: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coordinates with the common value f, by Newton from w; there dz/dF and z, all real."""
        aim = self.shares(f)
        for _ in range(6):
            h, dh = self.fields(w)
            step = (aim - w - h) / (1.0 + dh)
            step = np.where(np.isfinite(step), step, 0.0).real
            w = w + step
            if np.all(np.abs(step) <= 1e-14 * self.length(w)):
                break
        h, dh = self.fields(w)
        stretch = 1.0 - (self.counts * self.share_slopes(f) * dh / (1.0 + dh)).sum(axis=0)
        return w, stretch.real, self.point(f - (self.counts * h).sum(axis=0)).real


@dataclass(frozen=True)
class LogGeometry(Geometry):
    """A product of free variables: coordinates are logarithms. At most one law may have negative support."""

    @cached_property
    def scale(self) -> float:
        """Product of the largest moduli."""
        return float(np.exp(sum(f.count * np.log(f.radius) for f in self.factors)))

    @cached_property
    def ceiling(self) -> np.ndarray:
        """Coordinates live in the strip 0 <= Im <= pi; beside a law with negative support, up to 2 pi."""
        return np.where(self._signed | ~self._signed.any(), np.pi, 2 * np.pi)

    @cached_property
    def _signed(self) -> np.ndarray:
        return np.array([[factor.law.bounds()[0] < 0] for factor in self.factors])

    def floor(self, zeta: np.ndarray) -> np.ndarray:
        """arg z, but 0 for a law with negative support and in rectangular products."""
        free = self._signed | np.array([[factor.dimension != 1.0] for factor in self.factors]).any()
        return np.where(free, 0.0, super().floor(zeta))

    def coordinate(self, z: np.ndarray) -> np.ndarray:
        """Logarithm."""
        with np.errstate(all="ignore"):
            return np.asarray(np.log(z))

    def abscissa(self, x: np.ndarray) -> np.ndarray:
        """Logarithm of the modulus, increasing with x."""
        least = np.log(np.finfo(float).tiny)
        with np.errstate(all="ignore"):
            return np.asarray(np.sign(x) * (np.log(np.abs(x)) - least))

    def pace(self, x: np.ndarray) -> np.ndarray | float:
        """Derivative of the coordinate by the abscissa."""
        return np.asarray(np.sign(x))

    @property
    def start(self) -> float:
        """As for sums; the scale may be far below the spread of the logarithm."""
        return 50.0

    def point(self, w: np.ndarray) -> np.ndarray:
        """Exponential; exactly real for coordinates that are."""
        value = np.exp(w)
        return np.asarray(np.where(w.imag == 0, value.real, value))

    def length(self, w: np.ndarray) -> np.ndarray:
        """Relative errors: one."""
        return np.ones(w.shape)

    def turn(self, w: np.ndarray) -> np.ndarray:
        """Angle of the point against the axis."""
        return np.asarray(np.abs(np.sin(w.imag)))

    def distance(self, w: np.ndarray) -> np.ndarray:
        """Moduli of the points in units of their laws' radii."""
        with np.errstate(all="ignore"):
            return np.asarray(np.exp(w.real) / self._radii)

    def fields(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """k_i(lambda_i) = -log(-h_i) and its derivative, one row a law."""
        k, dk = np.empty_like(w), np.empty_like(w)
        for i, factor in enumerate(self.factors):
            point = self.point(w[i])
            folded, below = fold(point)
            h, dh = factor.shift(folded)
            minus = np.empty_like(h)
            minus.real, minus.imag = -h.real, -np.maximum(h.imag, 0.0)
            with np.errstate(all="ignore"):
                k[i], dk[i] = -np.log(minus), -folded * dh / h
            k[i], dk[i] = np.where(below, np.conj(k[i]), k[i]), np.where(below, np.conj(dk[i]), dk[i])
        return k, dk

    def residual(self, zeta: np.ndarray, w: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray | float]:
        """As for sums; a factor of another dimension obeys P_i = 1 + (P - 1)/Lambda_i."""
        base, _ = super().residual(zeta, w, h)
        if self._square:
            return base, 1.0
        common = zeta + (self.counts * h).sum(axis=0)
        return base + common - self.shares(common), self.share_slopes(common)

    @cached_property
    def _dimensions(self) -> np.ndarray:
        return np.array([[factor.dimension] for factor in self.factors])

    @cached_property
    def _square(self) -> bool:
        return bool(np.all(self._dimensions == 1.0))

    def shares(self, common: np.ndarray) -> np.ndarray:
        """log P_i, P_i = 1 + (P - 1)/Lambda_i."""
        if self._square:
            return super().shares(common)
        return np.asarray(common + np.log((1.0 - (1.0 - self._dimensions) * np.exp(-common)) / self._dimensions))

    def share_slopes(self, common: np.ndarray) -> np.ndarray | float:
        """d log P_i / d log P = 1 / (1 - (1 - Lambda_i)/P)."""
        return 1.0 if self._square else np.asarray(1.0 / (1.0 - (1.0 - self._dimensions) * np.exp(-common)))
