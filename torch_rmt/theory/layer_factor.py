"""One random layer's factor in a squared gradient norm, exactly, and the law of a product of independent factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Complex, Float
from numpy.typing import ArrayLike
from scipy.special import loggamma, polygamma

# Masses below this never show in a distribution function; so too the size at which a transform is cut.
_NEGLIGIBLE = 1e-16
_DECAY = 35.0  # -log of the aliasing error of the inversion
_BLOCK, _MOST = 48, 2048  # frequencies at a time, and in all
_ANGLES = 240  # found by tuning: rounding error at widths 2 to 3000


@dataclass(frozen=True)
class LayerFactor:
    """X = |D W u|^2 of one layer in units of its mean gain: a Gaussian or Haar W, then phi'(h) = left or right.

    Gaussian: X = (1/n) sum_i c_i z_i^2, c_i = left^2 or right^2 with equal chance, independent of z: flipping the sign
    of a row of W flips h_i and leaves z_i^2. Haar: the same with z on the sphere of R^m, m the larger of the two
    widths; the radius of a Gaussian vector is independent of its direction, so X_Haar = X_Gaussian / (chi^2_m / m) with
    an independent divisor: cumulants of logarithms subtract, transforms divide. Derived here, simulated in the tests.

    Fields:
        width: n, of the layer's output.
        slopes: (left, right), not both zero.
        sphere: m for Haar weights, None for Gaussian ones.

    >>> bool(LayerFactor(50, (1.0, 1.0), sphere=50).log_cumulants()[1] == 0.0)      # an isometry: nothing fluctuates
    True
    """

    width: int
    slopes: tuple[float, float]
    sphere: int | None = None

    @property
    def _squares(self) -> tuple[float, float]:
        return self.slopes[0] ** 2, self.slopes[1] ** 2

    @property
    def scale(self) -> float:
        """E phi'^2."""
        return 0.5 * sum(self._squares)

    def log_cumulants(self) -> Float[np.ndarray, " 4"]:
        """First four cumulants of log X."""
        value = layer_log_cumulants(self.width, self.slopes)
        if self.sphere is not None:
            if self.width == self.sphere and self.slopes[0] ** 2 == self.slopes[1] ** 2:
                return np.array([np.log(self.scale), 0.0, 0.0, 0.0])
            value = value - layer_log_cumulants(self.sphere, (1.0, 1.0))
        return value

    @property
    def _fewest(self) -> int:
        """The fewest units that are alive with a probability worth counting."""
        return int(self._alive()[0][0]) if min(self._squares) == 0.0 else self.width

    @property
    def left_exponent(self) -> float:
        """E X^(-s) is finite for s below this: half the fewest live units."""
        return 0.5 * self._fewest

    def _alive(self) -> tuple[Float[np.ndarray, " counts"], Float[np.ndarray, " counts"]]:
        """Numbers of units with the larger slope (at least one, if the other is 0), and the logs of their chances."""
        n = self.width
        k = np.arange(1.0 if min(self._squares) == 0.0 else 0.0, n + 1.0)
        log_weight = loggamma(n + 1.0) - loggamma(k + 1.0) - loggamma(n - k + 1.0) - n * np.log(2.0)
        keep = log_weight > np.log(_NEGLIGIBLE)
        log_weight = log_weight[keep]
        return k[keep], log_weight - np.log(np.exp(log_weight).sum())

    def log_moment(self, s: Complex[np.ndarray, " points"]) -> Complex[np.ndarray, " points"]:
        """log E X^s, for -left_exponent < Re s < 0, with a branch of the logarithm that may differ by 2 pi i."""
        n = self.width
        if min(self._squares) == max(self._squares):
            value = np.zeros(len(s), dtype=complex)
        elif min(self._squares) == 0.0:
            k, log_weight = self._alive()
            half = 0.5 * k[:, None]
            terms = log_weight[:, None] + loggamma(half + s) - loggamma(half)
            top = terms.real.max(axis=0)
            value = top + np.log(np.exp(terms - top).sum(axis=0)) + loggamma(0.5 * n) - loggamma(0.5 * n + s)
            value = value + s * np.log(2.0)
        else:
            share, weight = self._shares
            value = np.log(np.exp(np.outer(s, np.log(share))) @ weight)
        if self.sphere != n:
            value = value + _log_chi_square_moment(float(n), s)
            if self.sphere is not None:
                value = value - _log_chi_square_moment(float(self.sphere), s)
        return np.asarray(value + s * np.log(self.scale))

    @cached_property
    def _shares(self) -> tuple[Float[np.ndarray, " nodes"], Float[np.ndarray, " nodes"]]:
        """Values of sum_i c_i y_i^2, y on the sphere of R^n, in units of the mean, and their weights.

        With k units of the larger slope their share of |y|^2 is sin^2(angle), a beta variable of k/2 and (n - k)/2.
        """
        n = self.width
        high, low = max(self._squares) / self.scale, min(self._squares) / self.scale
        k, log_weight = self._alive()
        # the angle lies within 14 / sqrt(n) of pi / 4 but for a chance below 1e-16
        reach = min(0.25 * np.pi, 14.0 / np.sqrt(n))
        nodes, weights = np.polynomial.legendre.leggauss(_ANGLES)
        angle = 0.25 * np.pi + reach * nodes
        inner = (k > 0) & (k < n)
        m, log_m = k[inner, None], log_weight[inner, None]
        with np.errstate(divide="ignore"):
            log_density = (m - 1.0) * np.log(np.sin(angle)) + (n - m - 1.0) * np.log(np.cos(angle))
        log_density = (
            log_density + log_m + np.log(2.0) - loggamma(0.5 * m) - loggamma(0.5 * (n - m)) + loggamma(0.5 * n)
        )
        mass = np.exp(log_density).sum(axis=0) * reach * weights
        share = high * np.sin(angle) ** 2 + low * np.cos(angle) ** 2
        ends = [(place, float(np.exp(w))) for place, at in ((low, 0.0), (high, float(n))) for w in log_weight[k == at]]
        return (
            np.concatenate([share, [place for place, _ in ends]]),
            np.concatenate([mass, [part for _, part in ends]]),
        )


def _log_chi_square_moment(n: float, s: Complex[np.ndarray, " points"]) -> Complex[np.ndarray, " points"]:
    """log E (chi^2_n / n)^s."""
    return np.asarray(loggamma(0.5 * n + s) - loggamma(0.5 * n) + s * np.log(2.0 / n))


def layer_log_cumulants(width: int, slopes: tuple[float, float]) -> Float[np.ndarray, " 4"]:
    """First four cumulants of log (1/width) sum_i c_i z_i^2, z Gaussian, c_i = left^2 or right^2 with equal chance.

    With E exponential, P(log E - log X > y) = E exp(-e^y X) is [(1 + 2 l^2 s)^(-1/2)/2 + (1 + 2 r^2 s)^(-1/2)/2]^width,
    s = e^y/width: the cumulants of log E are polygamma(1), and those of log X are left. Where a slope is zero, given
    that not all neurons are dead.
    """
    left, right = slopes[0] ** 2, slopes[1] ** 2
    if left == right:
        # chi-square: closed
        orders = np.arange(1, 5)
        value = np.array([float(polygamma(k - 1, 0.5 * width)) for k in orders])
        value[0] += np.log(2.0 * left / width)
        return value
    dead = 0.5**width if min(left, right) == 0.0 else 0.0
    scale = 0.5 * (left + right)
    # Trapezoidal rule for the density of V = log E - log X, analytic for |Im y| < pi: exact to rounding at step 0.1.
    # The right tail falls like exp(-y/2) at worst (one neuron alive).
    y = np.arange(-45.0, 100.0, 0.1)
    s = np.exp(y) / (width * scale)
    inner = 0.5 * (1.0 + 2.0 * left * s) ** -0.5 + 0.5 * (1.0 + 2.0 * right * s) ** -0.5
    fall = 0.5 * s * (left * (1.0 + 2.0 * left * s) ** -1.5 + right * (1.0 + 2.0 * right * s) ** -1.5)
    density = 0.1 * width * inner ** (width - 1) * fall / (1.0 - dead)
    centre = float(density @ y)
    second, third, fourth = (float(density @ (y - centre) ** k) for k in (2, 3, 4))
    cumulants = np.array([centre, second, third, fourth - 3.0 * second**2])
    exponential = np.array([float(polygamma(k, 1.0)) for k in range(4)])
    value = (cumulants - exponential) * np.array([-1.0, 1.0, -1.0, 1.0])
    value[0] += np.log(scale)
    return np.asarray(value)


@dataclass(frozen=True, eq=False)
class LogProductLaw:
    """Distribution function of S = shift + sum of the logarithms of independent layer factors, by inversion.

    F(y) = (1/2 pi i) integral of E exp(s (S - y)) ds/(-s) along Re s = -sigma < 0: nothing singular on the way, and the
    trapezoidal rule is exact up to exp(-35). No expansion in 1/width. The one loss: Haar layers of few units have point
    masses (all units alive: 2^-n a layer), which a finite number of frequencies smooths: for three layers of five units
    1e-5 (ReLU) to 1e-2 (leaky), from thirty units on nothing.

    Fields:
        nodes, transform: s, and E exp(s S) there with the weights of the rule in it.
        top: above it the function is 1 but for rounding.
    """

    nodes: Complex[np.ndarray, " nodes"] = field(repr=False)
    transform: Complex[np.ndarray, " nodes"] = field(repr=False)
    top: float

    @classmethod
    def of(cls, factors: Sequence[LayerFactor], shift: float, mean: float, deviation: float) -> LogProductLaw:
        """The law of the sum, of known mean and standard deviation."""
        count: dict[LayerFactor, int] = {}
        for factor in factors:
            count[factor] = count.get(factor, 0) + 1
        sigma = min(1.0 / deviation, 0.5 * min(factor.left_exponent for factor in count))
        step = 2.0 * np.pi * sigma / _DECAY
        nodes: list[np.ndarray] = []
        values: list[np.ndarray] = []
        top = None
        for start in range(0, _MOST, _BLOCK):
            s = -sigma + 1j * step * np.arange(start, start + _BLOCK)
            value = shift * s + sum(times * factor.log_moment(s) for factor, times in count.items())
            top = float(value.real[0]) if top is None else top
            nodes.append(s)
            values.append(value)
            if value.real[-1] - top < -_DECAY:
                break
        s, log_value = np.concatenate(nodes), np.concatenate(values)
        weight = np.full(len(s), step / np.pi)
        weight[0] *= 0.5
        return cls(nodes=s, transform=weight * np.exp(log_value) / -s, top=mean + 15.0 * deviation)

    def cdf(self, y: ArrayLike) -> Float[np.ndarray, "..."]:
        """P(S <= y)."""
        at = np.asarray(y, dtype=float)
        flat = at.ravel()
        value = np.empty(flat.shape)
        for start in range(0, len(flat), 512):
            part = np.minimum(flat[start : start + 512, None], self.top)
            value[start : start + 512] = (np.exp(-self.nodes * part) @ self.transform).real
        return np.asarray(np.clip(value, 0.0, 1.0).reshape(at.shape))
