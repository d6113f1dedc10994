"""Laws given by a rational curve: z is an explicit rational function of one complex parameter.

Many laws of networks are quoted as a polynomial equation for the Stieltjes transform G and left there, with the
choice of root to the reader. Here z = N(s)/D(s) in a parameter s (for a freely infinitely divisible law s = G itself),
so that on the real axis everything is the roots of one real polynomial: inside the support there is exactly one pair of
complex roots and it is the physical one; in a gap the physical root is the real one at which z, and every
subordination function on the way to it, falls with s. The distribution function follows from the primitive of G,
which is elementary in s, without integration.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import numpy as np
from jaxtyping import Complex, Float
from numpy.typing import ArrayLike

from torch_rmt.measures.base import Interval, SpectralMeasure

Polynomial = Float[np.ndarray, " terms"]


def strip(polynomial: ArrayLike) -> Polynomial:
    """Drop leading zeros (coefficients highest power first)."""
    coefficients = np.atleast_1d(np.asarray(polynomial, dtype=float))
    big = coefficients != 0.0
    return coefficients[int(np.argmax(big)) :] if big.any() else np.zeros(1)


def plus(first: ArrayLike, second: ArrayLike) -> Polynomial:
    """Sum of two polynomials, a coefficient that cancels to rounding set to zero, so that the degree comes out right."""
    total = np.polyadd(first, second)
    size = np.polyadd(np.abs(first), np.abs(second))
    return strip(np.where(np.abs(total) <= 1e-14 * size, 0.0, total))


def log_from_below(w: Complex[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
    """Logarithm of numbers of the closed lower half-plane, argument in [-pi, 0]; the negative axis has -pi."""
    return np.log(np.abs(w)) - 1j * np.arctan2(np.abs(w.imag), w.real)


def log_from_above(w: Complex[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
    """Logarithm of numbers of the closed upper half-plane, argument in [0, pi]; the negative axis has +pi."""
    return np.log(np.abs(w)) + 1j * np.arctan2(np.abs(w.imag), w.real)


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
    def _transform(
        self, s: Complex[np.ndarray, "..."], z: Complex[np.ndarray, "..."]
    ) -> Complex[np.ndarray, "..."]:
        """G at the parameter s, where the curve passes z."""

    @abstractmethod
    def _potential(self, s: Complex[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
        """Integral of log(z - t) rho(dt) at the parameter s."""

    @cached_property
    def _slopes(self) -> tuple[tuple[Polynomial, Polynomial], ...]:
        return tuple(polynomial_slope(curve) for curve in self._curves)

    @cached_property
    def _gaps(self) -> tuple[Interval, ...]:
        """Intervals of the real axis free of the continuous part, in order; the first and last are infinite.

        On the real axis of s the law has no density exactly where z and every curve before it fall with s.
        """
        breaks: set[float] = {0.0}
        for (_, bottom), (slope, _) in zip(self._curves, self._slopes, strict=True):
            breaks.update(real_roots(bottom))
            breaks.update(real_roots(slope))
        knots = sorted(breaks)
        reach = 2.0 * max(1.0, *(abs(knot) for knot in knots)) + 1.0
        middles = [knots[0] - reach, *(0.5 * (a + b) for a, b in zip(knots, knots[1:], strict=False))]
        middles.append(knots[-1] + reach)
        ends = [-np.inf, *knots, np.inf]
        top, bottom = self._curves[-1]
        gaps: list[Interval] = []
        for low, high, middle in zip(ends, ends[1:], middles, strict=False):
            if self._falls(np.array([middle]))[0]:
                gaps.append((self._limit(high, middle), self._limit(low, middle)))
        gaps = sorted(gap for gap in gaps if gap[1] > gap[0])
        joined: list[Interval] = []
        for gap in gaps:
            if joined and gap[0] <= joined[-1][1] + 1e-12 * (1.0 + abs(gap[0])):
                joined[-1] = (joined[-1][0], max(joined[-1][1], gap[1]))
            else:
                joined.append(gap)
        return tuple(joined)

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
        return float(value_top / value_bottom)

    def _falls(self, s: Float[np.ndarray, "..."]) -> np.ndarray:
        """Whether z and every curve before it fall at the real parameter s."""
        falls = np.ones(s.shape, dtype=bool)
        for top, bottom in self._slopes:
            falls &= np.polyval(top, s) * np.sign(np.polyval(bottom, s)) < 0.0
        return falls

    @cached_property
    def _support(self) -> tuple[Interval, ...]:
        gaps = self._gaps
        bands = [(left[1], right[0]) for left, right in zip(gaps, gaps[1:], strict=False)]
        return tuple((low, high) for low, high in bands if high > low)

    def support(self) -> tuple[Interval, ...]:
        """Return the intervals of the continuous part; their ends are critical values of z(s)."""
        return self._support

    def _roots(self, z: Complex[np.ndarray, " points"]) -> Complex[np.ndarray, "points degree"]:
        """All parameters at which the curve passes z: eigenvalues of the companion matrices."""
        top, bottom = self._curves[-1]
        degree = max(len(top), len(bottom)) - 1
        padded_top = np.concatenate([np.zeros(degree + 1 - len(top)), top])
        padded_bottom = np.concatenate([np.zeros(degree + 1 - len(bottom)), bottom])
        coefficients = padded_top[None, :] - z[:, None] * padded_bottom[None, :]
        lead = coefficients[:, :1]
        # A vanishing leading coefficient sends one root to infinity: keep it there, finite.
        size = np.abs(coefficients).max(axis=1, keepdims=True)
        lead = np.where(np.abs(lead) < 1e-30 * size, 1e-30 * size, lead)
        companion = np.zeros((len(z), degree, degree), dtype=coefficients.dtype)
        companion[:, 0, :] = -coefficients[:, 1:] / lead
        companion[:, np.arange(1, degree), np.arange(degree - 1)] = 1.0
        return np.asarray(np.linalg.eigvals(companion), dtype=complex)

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
            if not inside.all():
                outside = roots[~inside].real
                # The physical root is real, and there every curve falls; of several (rounding) the smallest is nearest
                # to the sheet of infinity.
                key = np.where(self._falls(outside), 0.0, 1e300) + np.abs(roots[~inside].imag) * 1e100
                key = key + np.abs(outside)
                pick[~inside] = np.argmin(key, axis=1)
            chosen = roots[np.arange(len(x)), pick]
            s[real] = np.where(inside, chosen, chosen.real)
        if not real.all():
            away = z[~real]
            roots = self._roots(away)
            score = -roots.imag / np.abs(roots)
            for top, bottom in self._curves[:-1]:
                value = np.polyval(top, roots) / np.polyval(bottom, roots)
                score = np.minimum(score, value.imag / np.abs(value))
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
