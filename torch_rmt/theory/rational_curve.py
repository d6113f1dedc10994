"""Laws given by a rational curve: z is an explicit rational function of one complex parameter.

Many laws of networks are quoted as a polynomial equation for the Stieltjes transform G and left there, with the
choice of root to the reader. Here z = N(s)/D(s) in a parameter s (for a freely infinitely divisible law s = G itself),
so that on the real axis everything is the roots of one real polynomial: inside the support there is exactly one pair of
complex roots and it is the physical one; in a gap the physical root is the real one at which z, and every
subordination function on the way to it, falls with s. The distribution function follows from the primitive of G,
which is elementary in s, without integration.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from functools import cached_property

import numpy as np
from jaxtyping import Complex, Float, Inexact
from numpy.typing import ArrayLike

from torch_rmt.measures.base import Interval, SpectralMeasure

Polynomial = Float[np.ndarray, "_"]


def strip(polynomial: ArrayLike) -> Polynomial:
    """Drop leading zeros (coefficients highest power first)."""
    coefficients = np.atleast_1d(np.asarray(polynomial, dtype=float))
    big = coefficients != 0.0
    return coefficients[int(np.argmax(big)) :] if big.any() else np.zeros(1)


def plus(first: ArrayLike, second: ArrayLike) -> Polynomial:
    """Sum of two polynomials, a coefficient that cancels to rounding set to zero, so that the degree comes out
    right."""
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    total = np.polyadd(first, second)
    size = np.polyadd(np.abs(first), np.abs(second))
    return strip(np.where(np.abs(total) <= 1e-14 * size, 0.0, total))


def log_from_below(w: Complex[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
    """Logarithm of numbers of the closed lower half-plane, argument in [-pi, 0]; the negative axis has -pi."""
    return np.asarray(np.log(np.abs(w)) - 1j * np.arctan2(np.abs(w.imag), w.real))


def log_from_above(w: Complex[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
    """Logarithm of numbers of the closed upper half-plane, argument in [0, pi]; the negative axis has +pi."""
    return np.asarray(np.log(np.abs(w)) + 1j * np.arctan2(np.abs(w.imag), w.real))


def polynomial_slope(curve: tuple[Polynomial, Polynomial]) -> tuple[Polynomial, Polynomial]:
    """Numerator and denominator of the derivative of a rational function."""
    top, bottom = curve
    return (
        plus(np.polymul(np.polyder(top), bottom), -np.polymul(top, np.polyder(bottom))),
        np.polymul(bottom, bottom),
    )


def real_roots(polynomial: Polynomial) -> list[float]:
    """Real roots, a pair that rounding has pushed off the axis by 1e-7 of its size among them."""
    if len(polynomial) < 2:
        return []
    roots = np.roots(polynomial)
    return sorted(float(r.real) for r in roots if abs(r.imag) <= 1e-7 * max(abs(r), 1e-300))


class RationalCurveLaw(SpectralMeasure):
    """A law whose point z and Stieltjes transform are rational in a parameter s of the lower half-plane.

    A subclass gives `_curves` (z last, the subordination functions before it, each as numerator and denominator in s),
    `_transform` G(s), `_potential` (the primitive of G along z that behaves as log z at infinity) and `atoms`.
    As z -> infinity s -> 0 from below like a positive multiple of 1/z.
    """

    @cached_property
    @abstractmethod
    def _curves(self) -> tuple[tuple[Polynomial, Polynomial], ...]:
        """The rational functions that must map s into the upper half-plane; the last is z."""

    @abstractmethod
    def _transform(self, s: Complex[np.ndarray, "..."], z: Complex[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
        """G at the parameter s, where the curve passes z."""

    @abstractmethod
    def _potential(self, s: Complex[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
        """Integral of log(z - t) rho(dt) at the parameter s."""

    @cached_property
    def _slopes(self) -> tuple[tuple[Polynomial, Polynomial], ...]:
        return tuple(polynomial_slope(curve) for curve in self._curves)

    @cached_property
    def _gaps(self) -> tuple[tuple[Interval, Interval], ...]:
        """Intervals of the real axis free of the continuous part, each with the interval of s that maps onto it.

        In order; two that meet at an isolated atom (s infinite) stay two. On the real axis of s the law has no density
        exactly where z and every curve before it fall with s.
        """
        breaks: set[float] = {0.0}
        for (_, bottom), (slope, _) in zip(self._curves, self._slopes, strict=True):
            breaks.update(real_roots(bottom))
            breaks.update(real_roots(slope))
        knots = sorted(breaks)
        reach = 2.0 * max(1.0, *(abs(knot) for knot in knots)) + 1.0
        middles = [knots[0] - reach, *(0.5 * (a + b) for a, b in itertools.pairwise(knots))]
        middles.append(knots[-1] + reach)
        ends = [-np.inf, *knots, np.inf]
        gaps: list[tuple[Interval, Interval]] = []
        for low, high, middle in zip(ends, ends[1:], middles, strict=False):
            if self._falls(np.array([middle]))[0]:
                gap = (self._limit(high, middle), self._limit(low, middle))
                if gap[1] > gap[0]:
                    gaps.append((gap, (low, high)))
        return tuple(sorted(gaps))

    def _limit(self, end: float, inside: float) -> float:
        """Limit of z as s runs from `inside` to `end`, along a stretch on which z falls with s."""
        top, bottom = self._curves[-1]
        if np.isinf(end):
            if len(top) == len(bottom):
                return float(top[0] / bottom[0])
            return 0.0 if len(top) < len(bottom) else -float(np.sign(end)) * np.inf
        value_top, value_bottom = np.polyval(top, end), np.polyval(bottom, end)
        if end == 0.0 or abs(value_bottom) <= 1e-13 * np.polyval(np.abs(bottom), abs(end)):
            return -np.inf if end > inside else np.inf
        return float(value_top / value_bottom) + 0.0  # no minus zero

    def _falls(self, s: Float[np.ndarray, "..."]) -> np.ndarray:
        """Whether z and every curve before it fall at the real parameter s."""
        falls = np.ones(s.shape, dtype=bool)
        for top, bottom in self._slopes:
            falls &= np.polyval(top, s) * np.sign(np.polyval(bottom, s)) < 0.0
        return falls

    @cached_property
    def _support(self) -> tuple[Interval, ...]:
        bands = [(left[1], right[0]) for (left, _), (right, _) in zip(self._gaps, self._gaps[1:], strict=False)]
        return tuple((low, high) for low, high in bands if high - low > 1e-12 * (abs(low) + abs(high)))

    def support(self) -> tuple[Interval, ...]:
        """Return the intervals of the continuous part; their ends are critical values of z(s)."""
        return self._support

    def _roots(self, z: Inexact[np.ndarray, " points"]) -> Complex[np.ndarray, "points degree"]:
        """All parameters at which the curve passes z: eigenvalues of companion matrices."""
        top, bottom = self._curves[-1]
        degree = max(len(top), len(bottom)) - 1
        padded_top = np.concatenate([np.zeros(degree + 1 - len(top)), top])
        padded_bottom = np.concatenate([np.zeros(degree + 1 - len(bottom)), bottom])
        # In 1/s: z has its pole at s = 0, so that the leading coefficient never vanishes, while a root s may be
        # infinite.
        coefficients = (padded_top[None, :] - z[:, None] * padded_bottom[None, :])[:, ::-1]
        companion = np.zeros((len(z), degree, degree), dtype=coefficients.dtype)
        companion[:, 0, :] = -coefficients[:, 1:] / coefficients[:, :1]
        companion[:, np.arange(1, degree), np.arange(degree - 1)] = 1.0
        inverse = np.asarray(np.linalg.eigvals(companion), dtype=complex)
        return np.asarray(1.0 / np.where(np.abs(inverse) < 1e-150, 1e-150, inverse))

    def _in_support(self, x: Float[np.ndarray, "..."]) -> np.ndarray:
        inside = np.zeros(x.shape, dtype=bool)
        for low, high in self._support:
            inside |= (x > low) & (x < high)
        return inside

    def _parameter(self, z: Complex[np.ndarray, " points"]) -> Complex[np.ndarray, " points"]:
        """Physical parameter at points of the closed upper half-plane."""
        s = np.empty(len(z), dtype=complex)
        real = z.imag == 0.0
        if real.any():
            x = z.real[real]
            roots = self._roots(x)
            inside = self._in_support(x)
            pick = np.argmin(roots.imag, axis=1)
            for (low, high), (first, last) in self._gaps:
                here = ~inside & (x >= low) & (x <= high)
                if here.any():
                    # The physical root is real and lies in the stretch of s that maps onto this gap.
                    far = np.abs(roots[here] - np.clip(roots[here].real, first, last)) / np.abs(roots[here])
                    pick[here] = np.argmin(far, axis=1)
            chosen = roots[np.arange(len(x)), pick]
            s[real] = np.where(inside, chosen, chosen.real)
        if not real.all():
            away = z[~real]
            roots = self._roots(away)
            score = -roots.imag / np.abs(roots)
            with np.errstate(all="ignore"):
                for top, bottom in self._curves[:-1]:
                    value = np.polyval(top, roots) / np.polyval(bottom, roots)
                    score = np.fmin(score, value.imag / np.abs(value))
            s[~real] = roots[np.arange(len(away)), np.argmax(score, axis=1)]
        return s

    def stieltjes(self, z: ArrayLike) -> Complex[np.ndarray, "..."]:
        """G(z), from the physical root; at real z the boundary value from above."""
        points = np.asarray(z, dtype=complex)
        flat = points.ravel()
        below = flat.imag < 0.0
        flat = np.where(below, flat.conj(), flat)
        value = self._transform(self._parameter(flat), flat)
        return np.asarray(np.where(below, value.conj(), value).reshape(points.shape))

    def log_potential(self, z: ArrayLike) -> Complex[np.ndarray, "..."]:
        """Integral of log(z - t) rho(dt) in closed form; at real z the boundary value from above."""
        points = np.asarray(z, dtype=complex)
        flat = points.ravel()
        below = flat.imag < 0.0
        flat = np.where(below, flat.conj(), flat)
        value = self._potential(self._parameter(flat))
        return np.asarray(np.where(below, value.conj(), value).reshape(points.shape))

    def density(self, x: ArrayLike) -> Float[np.ndarray, "..."]:
        """Density of the continuous part, -Im G(x + i0) / pi; zero outside the support."""
        points = np.asarray(x, dtype=float)
        value = np.zeros(points.shape)
        inside = self._in_support(points)
        if inside.any():
            at = points[inside].astype(complex)
            value[inside] = np.maximum(-self._transform(self._parameter(at), at).imag / np.pi, 0.0)
        return value

    def cdf(self, x: ArrayLike) -> Float[np.ndarray, "..."]:
        """F(x) = 1 - Im Phi / pi, Phi the primitive of G in closed form; no integration."""
        points = np.asarray(x, dtype=float)
        flat = points.ravel()
        low, high = self.bounds()
        scale = max(abs(low), abs(high), high - low)
        # At an atom the primitive jumps: step just past it, within the gap around it.
        for location, _ in self.atoms():
            flat = np.where(np.abs(flat - location) < 1e-10 * scale, location + 1e-10 * scale, flat)
        value = np.asarray(np.where(flat < low, 0.0, 1.0))
        between = (flat >= low) & (flat < high)
        if between.any():
            phase = self._potential(self._parameter(flat[between].astype(complex))).imag
            value[between] = np.clip(1.0 - phase / np.pi, 0.0, 1.0)
        return value.reshape(points.shape)
