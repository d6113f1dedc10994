"""Fuss-Catalan laws: squared singular values of products of square Gaussian matrices, of any real order."""

from __future__ import annotations

from functools import cached_property
from math import exp, lgamma, log

import numpy as np
from jaxtyping import Bool, Complex, Float
from scipy.spatial import cKDTree
from scipy.special import expm1, log1p

from torch_rmt.measures.base import Atom, Interval, SpectralMeasure
from torch_rmt.measures.half_plane import Numbers, fold, unfold

_TABLE = 2000  # starting values of the inversion x -> angle


def _log_below(m: Complex[np.ndarray, " n"]) -> Complex[np.ndarray, " n"]:
    """log M for M in the closed lower half-plane: -1 has the argument -pi, whatever the sign of its rounding."""
    return np.asarray(np.conj(np.log(m.real + 1j * np.maximum(-m.imag, 0.0))))


class FussCatalan(SpectralMeasure):
    """Fuss-Catalan law of real order s >= 0: moments binomial((s + 1) k, k) / (s k + 1).

    M solves z M = (1 + M)^(s + 1).

    On the axis, with 0 < tau < pi, t = tau / (s + 1):
    x = sin(tau)^(s + 1) / (sin(t) sin(s t)^s), density = sin(tau) sin(t) / (pi x sin(s t)),
    F = 1 - (tau - s sin(t) sin(tau) / sin(s t)) / pi. Order 0 is the point mass at 1, order 1 Marchenko-Pastur(1).
    Everything is computed from log x, so that order 8192 is as accurate as order 2.
    Source: Forrester and Liu 2014 (the angle); the distribution function follows from L = s M - log M.

    >>> FussCatalan(2).moment(3)
    12.0
    """

    def __init__(self, order: float | int) -> None:
        if not (np.isfinite(order) and order >= 0):
            raise ValueError(f"the order of a Fuss-Catalan law is a finite number >= 0 (its factors), got {order}")
        self.order = float(order)

    def __repr__(self) -> str:
        return f"FussCatalan({self.order:g})"

    @cached_property
    def _log_edge(self) -> float:
        s = self.order
        return (s + 1) * log(s + 1) - s * log(s) if s > 0 else 0.0

    def _log_x(self, angle: Float[np.ndarray, " n"]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Return log x and d log x / d sigma at sigma = log tan(tau / 2)."""
        s = self.order
        tau = 2 * np.arctan(np.exp(angle))
        sine = 1 / np.cosh(angle)
        t = tau / (s + 1)
        # tau - t is exact enough; near tau = pi the sine of tau must come from sigma, not from tau
        ratio = np.log(sine / np.sin(tau - t))
        large = s > 4
        if large:
            smooth = tau < 3.0
            stable = np.log1p(-2 * np.sin(t / 2) ** 2 + np.sin(t) / np.tan(np.where(smooth, tau - t, 1.0)))
            ratio = np.where(smooth, stable, ratio)
        value = (s + 1) * ratio + np.log(np.sin(tau - t) / np.sin(t))
        cosine = -np.tanh(angle)
        slope = (s + 1) * cosine - sine * (1 / np.tan(t) + s * s / np.tan(tau - t)) / (s + 1)
        return value, slope

    @cached_property
    def _table(self) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
        reach = 30.0 + 760.0 / (self.order + 1)
        angle = np.concatenate([np.linspace(-20.0, 5.0, _TABLE), np.linspace(5.0, reach, _TABLE // 4)[1:]])
        return angle, self._log_x(angle)[0]

    def _angle(self, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Solve for sigma at points strictly inside the support."""
        angle, table = self._table
        target = np.log(x)
        edge = self._log_edge
        start = np.interp(-np.log(np.maximum(edge - target, 1e-300)), -np.log(np.maximum(edge - table, 1e-300)), angle)
        sigma = np.asarray(start)
        low, high = np.full(x.shape, angle[0]), np.full(x.shape, angle[-1])
        for _ in range(60):
            value, slope = self._log_x(sigma)
            error = value - target
            low, high = np.where(error > 0, sigma, low), np.where(error <= 0, sigma, high)
            with np.errstate(all="ignore"):
                move = sigma - error / slope
            move = np.where((move > low) & (move < high), move, 0.5 * (low + high))
            done = np.abs(move - sigma) <= 4e-16 * np.maximum(1.0, np.abs(sigma))
            sigma = move
            if done.all():
                break
        return sigma

    def _axis(self, x: Numbers) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return a mask of interior points and, there, tau, sin(tau) and t."""
        points = np.asarray(x, dtype=float)
        inner = np.asarray((points > 0) & (points < self.bounds()[1]) & (self.order > 0))
        sigma = self._angle(points[inner]) if inner.any() else np.zeros(0)
        tau = 2 * np.arctan(np.exp(sigma))
        return inner, tau, 1 / np.cosh(sigma), tau / (self.order + 1)

    def density(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """sin(tau) sin(t) / (pi x sin(s t))."""
        points = np.asarray(x, dtype=float)
        inner, tau, sine, t = self._axis(points)
        result = np.zeros(points.shape)
        if self.order > 0:
            result[points == 0] = np.inf
        result[inner] = sine * np.sin(t) / (np.pi * points[inner] * np.sin(tau - t))
        return result

    def cdf(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """1 - (tau - s sin(t) sin(tau) / sin(s t)) / pi, in closed form."""
        points = np.asarray(x, dtype=float)
        inner, tau, sine, t = self._axis(points)
        result = np.where(points >= self.bounds()[1], 1.0, 0.0)
        result[inner] = 1.0 - (tau - self.order * np.sin(t) * sine / np.sin(tau - t)) / np.pi
        return result

    def log_potential(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """L = s M - log M."""
        points, below = fold(z)
        with np.errstate(all="ignore"):
            m = np.expm1(self._log_one_plus_m(points))
            return unfold(self.order * m - _log_below(m), below)

    def stieltjes(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G(z) = (1 + M) / z."""
        points, below = fold(z)
        with np.errstate(all="ignore"):
            return unfold(np.exp(self._log_one_plus_m(points)) / points, below)

    def slope(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G' = (M' - G) / z with z M' = M (1 + M) / (s M - 1)."""
        return self.stieltjes_and_slope(z)[1]

    def stieltjes_and_slope(self, z: Numbers) -> tuple[Complex[np.ndarray, "..."], Complex[np.ndarray, "..."]]:
        """Both, from one M."""
        points, below = fold(z)
        with np.errstate(all="ignore"):
            kappa = self._log_one_plus_m(points)
            m, g = expm1(kappa), np.exp(kappa) / points
            return unfold(g, below), unfold(g * (m / (self.order * m - 1) - 1) / points, below)

    def _log_one_plus_m(self, z: Complex[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
        """log(1 + M(z)) = log(z G(z)) on the closed upper half-plane, exact for M near 0 and for M near -1."""
        if self.order == 0:
            return np.asarray(np.log(z) - np.log(z - 1.0))
        flat = z.ravel()
        result = np.empty_like(flat)
        x = flat.real
        axis = (flat.imag == 0) & (x > 0) & (x < self.bounds()[1])
        if axis.any():
            _, tau, sine, t = self._axis(x[axis])
            result[axis] = np.log(sine / np.sin(tau - t)) - 1j * t
        if not axis.all():
            result[~axis] = self._off_axis(flat[~axis])
        return np.asarray(result.reshape(z.shape))

    def _off_axis(self, z: Complex[np.ndarray, " n"]) -> Complex[np.ndarray, " n"]:
        """Newton from the nearest known solution; log z is univalent where `_is_physical`, so nothing is guessed."""
        log_z = np.log(z)
        known, kappas = self._known
        near = known.query(np.stack([log_z.real, log_z.imag], axis=1))[1]
        ahead = log_z - known.data[near] @ np.array([1.0, 1j])
        s = self.order
        # at the edge a square root, of which the nearest solution may be on the other side
        turn = np.log1p(1 / s)
        root = np.sqrt(2 * (log_z - self._log_edge) / (s * (s + 1)))
        start = np.where(np.abs(root) < 0.5 * min(1.0, turn), turn - root, self._moved(kappas[near], ahead))
        kappa, error = self._newton(start, log_z, 8)
        tip = np.abs(root) < 1e-8 * min(1.0, turn)  # where Newton's rule divides by 0
        kappa[tip] = (turn - root)[tip]
        lost = ~(tip | ((error < 1e-13) & self._is_physical(kappa)))
        if lost.any():  # the other solution of the pair that meets at the edge
            again, error = self._newton(2 * turn - kappa[lost], log_z[lost], 12)
            found = (error < 1e-13) & self._is_physical(again)
            kappa[np.flatnonzero(lost)[found]] = again[found]
            lost[lost] = ~found
        if lost.any():
            raise ArithmeticError(f"{self!r}: no solution near z = {z[lost][0]}; move the point off the support's edge")
        kappa.imag[z.imag == 0] = 0.0
        return kappa

    @cached_property
    def _known(self) -> tuple[cKDTree, Complex[np.ndarray, " m"]]:
        """Solutions log(1 + M) for a net of points log z.

        log(1 + M) = rho - i t fills 0 <= t <= pi / (s + 1), rho below its value on the axis: log z is explicit there.
        """
        s = self.order
        tau = 2 * np.arctan(np.exp(np.linspace(-9.0, 9.0, 61)))
        t = tau / (s + 1)
        top = np.log(np.sin(tau) / np.sin(tau - t))
        below = np.concatenate([[0.0], np.geomspace(1e-4, 60.0, 80)]) / (s + 1)
        kappa = (top[:, None] - below - 1j * t[:, None]).ravel()
        # the real axis, and the neighbourhood of infinity, log(1 + M) = 0
        small = np.geomspace(1e-12, 1.0, 40) / (s + 1)
        around = np.exp(-1j * np.pi * np.linspace(0.0, 1.0, 13))
        kappa = np.concatenate([kappa, (small[:, None] * around).ravel()])
        kappa = kappa[self._is_physical(kappa)]
        m = expm1(kappa)
        log_z = (s + 1) * kappa - _log_below(m)
        good = np.isfinite(log_z) & (np.abs(s * m - 1) > 0)
        return cKDTree(np.stack([log_z.real, log_z.imag], axis=1)[good]), kappa[good]

    def _is_physical(self, kappa: Complex[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Whether log(1 + M) lies in the image of the upper half-plane."""
        s = self.order
        t = -kappa.imag
        # near z = 0 the angle t is within rounding of its limit, where the bound on the real part plunges
        inner = np.clip(t * (1 - 1e-14), 1e-300, np.pi / (s + 1) * (1 - 1e-14))
        with np.errstate(all="ignore"):
            top = np.log(np.sin((s + 1) * inner) / np.sin(s * inner))
        slack = 1e-9 / (s + 1)
        return np.asarray((t >= -slack) & (t <= np.pi / (s + 1) + slack) & (kappa.real <= top + slack))

    def _moved(self, kappa: np.ndarray, ahead: np.ndarray) -> np.ndarray:
        """log(1 + M) further along in log z: along the tangent in log M or in log(1 + M), whichever is straighter."""
        m = expm1(kappa)
        rate = ahead / (self.order * m - 1)
        return np.where(np.abs(m) < 0.5, log1p(m * np.exp(rate * (1 + m))), kappa + rate * m)

    def _newton(self, kappa: np.ndarray, log_z: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Newton for (s + 1) log(1 + M) - log M = log z; returns log(1 + M) and the relative error."""
        s = self.order
        size = np.maximum(1.0, np.abs(log_z) + s)
        kappa = kappa.real + 1j * np.minimum(kappa.imag, 0.0)  # M lives in the lower half-plane
        for _ in range(steps):
            m = expm1(kappa)
            error = (s + 1) * kappa - _log_below(m) - log_z
            kappa = self._moved(kappa, -error)
            kappa.imag = np.minimum(kappa.imag, 0.0)
            if np.all(np.abs(error) <= 1e-15 * size):
                break
        error = np.abs((s + 1) * kappa - _log_below(expm1(kappa)) - log_z)
        return kappa, error / size

    def support(self) -> tuple[Interval, ...]:
        """From 0 to (s + 1)^(s + 1) / s^s."""
        return ((0.0, exp(self._log_edge)),) if self.order > 0 else ()

    def atoms(self) -> tuple[Atom, ...]:
        """None, but for order 0, which is the point mass at 1."""
        return () if self.order > 0 else ((1.0, 1.0),)

    def moment(self, k: int) -> float:
        """m_k = binomial((s + 1) k, k) / (s k + 1)."""
        if k < 0:
            raise ValueError(f"moments are defined here for k >= 0, got k = {k}")
        s = self.order
        if k < 40:
            value = 1.0
            for j in range(2, k + 1):
                value *= (s * k + j) / j
            return value
        return exp(lgamma((s + 1) * k + 1) - lgamma(k + 1) - lgamma(s * k + 2))
