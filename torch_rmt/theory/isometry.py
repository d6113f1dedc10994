"""Dynamical isometry at depth L: the q*(L) that holds the Jacobian's variance, and the two universal limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import brentq

from torch_rmt.theory.activation import Activation, Number, as_activation
from torch_rmt.theory.bernoulli_limit import bernoulli_limit
from torch_rmt.theory.chain import Chain
from torch_rmt.theory.critical import CriticalPoint, critical_point
from torch_rmt.theory.gaussian import gaussian_expectation, gaussian_rule
from torch_rmt.theory.jacobian_law import JacobianLaw
from torch_rmt.theory.moments import slope_moment
from torch_rmt.theory.series import moments_from_s

Universality = Literal["bernoulli", "smooth"]


def slope_variance(activation: object, q: Number) -> float:
    """mu_2 / mu_1^2 - 1 with mu_k = E phi'(sqrt(q) Z)^{2k}: what one layer adds to Var(lambda) / mean^2.

    Example:
        >>> round(slope_variance("relu", 1.0), 12)
        1.0
    """
    phi = as_activation(activation)
    first = slope_moment(phi, q)
    fourth = gaussian_expectation(lambda h: (phi.derivative(h) ** 2 / first - 1.0) ** 2, q, phi.kinks)
    return float(fourth)


def critical_q(activation: object, depth: int, variance: Number, *, ensemble: str = "orthogonal") -> CriticalPoint:
    """The critical point whose Jacobian spectrum has the given variance at the given depth.

    At chi = 1 the variance of the eigenvalues of J^T J is depth * (mu_2 / mu_1^2 - 1 - s_1), s_1 = 0 for orthogonal and
    -1 for Gaussian weights; so q*(depth) solves mu_2 / mu_1^2 - 1 = variance / depth + s_1.

    Raises:
        ValueError: a depth below one, a variance that is not positive, or one that no q reaches (Gaussian weights
            alone give `depth`).

    Source: Pennington, Schoenholz and Ganguli 2018, section 3.

    Example:
        >>> point = critical_q("tanh", depth=64, variance=0.25)
        >>> round(64 * slope_variance("tanh", point.q_star), 10)
        0.25
    """
    phi = as_activation(activation)
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}.")
    if not (np.isfinite(variance) and variance > 0):
        raise ValueError(f"the variance must be positive, got {variance}.")
    if ensemble not in ("gaussian", "orthogonal"):
        raise ValueError(f"ensemble is 'gaussian' or 'orthogonal', not {ensemble!r}.")
    target = variance / depth - (1.0 if ensemble == "gaussian" else 0.0)
    if target <= 0:
        raise ValueError(
            f"Gaussian weights alone give the variance {depth} at depth {depth}: use orthogonal ones, or ask for more."
        )
    logs = np.linspace(np.log(1e-12), np.log(1e6), 73)
    values = np.array([slope_variance(phi, float(np.exp(x))) - target for x in logs])
    found = np.flatnonzero((values[:-1] < 0) & (values[1:] >= 0))
    if found.size == 0:
        raise ValueError(
            f"no q gives {phi.name} the variance {variance:g} at depth {depth}: a layer's share spans "
            f"[{values.min() + target:.3g}, {values.max() + target:.3g}], and {target:.3g} is needed."
        )
    low, high = logs[found[0]], logs[found[0] + 1]
    # The finest q that reaches the target: from below, where signals are nearly linear.
    log_q = brentq(lambda x: slope_variance(phi, float(np.exp(x))) - target, low, high, xtol=1e-14, rtol=1e-14)
    return critical_point(phi, q_star=float(np.exp(log_q)))


def universality_class(activation: object) -> Universality:
    """ "bernoulli" or "smooth": which limit the spectrum has at fixed variance as the depth grows.

    With q*(L) chosen to hold the variance, phi'^2 / mu_1 is one but for rare or small deviations. Where a unit's slope
    is off by a finite amount with a probability that vanishes with q (hard tanh, shifted ReLU) the limit is that of
    Bernoulli laws; where all slopes are off a little, the smooth one.

    Raises:
        ValueError: the slopes do not become equal as q falls (ReLU: no q reaches a small variance).

    Source: Pennington, Schoenholz and Ganguli 2018, section 3.3.
    """
    phi = as_activation(activation)
    q = 1e-4 if slope_variance(phi, 1e-4) > 1e-30 else 1e-2
    while slope_variance(phi, q) < 1e-12 and q < 1.0:
        q *= 1.3
    spread = slope_variance(phi, q)
    if spread > 0.5:
        raise ValueError(f"the slopes of {phi.name} stay apart as q falls: neither universality class applies.")
    h, weights = gaussian_rule(q, phi.kinks)
    s = np.asarray(phi.derivative(h)) ** 2
    s = s / (weights @ s)
    # Kurtosis of the deviation: finite for smooth laws, 1 / probability for rare events.
    return "bernoulli" if float(weights @ (s - 1) ** 4) > 1e3 * spread**2 else "smooth"


@dataclass(frozen=True)
class LimitLaw:
    """The L -> infinity law of J^T J at fixed variance, orthogonal weights, as a free multiplicative infinite product.

    S(u) = exp(-variance * f(u)): f = u for the smooth class (free multiplicative Gaussian); for the Bernoulli class
    f = u / (1 + u), slopes that are zero with probability variance / L.

    Fields:
        kind: the class.
        variance: variance of the eigenvalues, mean one.
    """

    kind: Universality
    variance: float

    def log_inverse(self, m: np.ndarray) -> np.ndarray:
        """log z as a function of M: log((1 + M) / M) plus the limit of L log 1/S."""
        exponent = m if self.kind == "smooth" else m / (1.0 + m)
        return np.asarray(np.log((1.0 + m) / m) + self.variance * exponent)

    def largest(self) -> float:
        """Upper edge of the spectrum: the least z over M > 0."""
        v = self.variance
        if self.kind == "smooth":
            # 1 / (M (1 + M)) = v.
            m = (np.sqrt(1.0 + 4.0 / v) - 1.0) / 2.0
        elif v <= 1.0:
            return float(np.exp(v))  # an atom of mass 1 - v stands there
        else:
            m = 1.0 / (v - 1.0)
        return float(np.exp(self.log_inverse(np.array(m))))

    def measure(self) -> JacobianLaw:
        """The law itself."""
        return smooth_limit(self.variance) if self.kind == "smooth" else bernoulli_limit(self.variance)

    def atom(self) -> tuple[float, float] | None:
        """(location, mass) of the atom at the top, which the Bernoulli class has for variances below one."""
        if self.kind == "bernoulli" and self.variance < 1.0:
            return float(np.exp(self.variance)), 1.0 - self.variance
        return None


def smooth_limit(variance: float, log_scale: float = 0.0) -> JacobianLaw:
    """The law with S(u) = exp(-variance u - log_scale): the free multiplicative Gaussian.

    Example:
        >>> law = smooth_limit(0.25)
        >>> round(law.mean, 12), round(law.variance, 12)
        (1.0, 0.25)
    """
    orders = np.arange(8)
    factorials = np.cumprod(np.maximum(orders, 1)).astype(np.float64)
    moments = moments_from_s((-variance) ** orders / factorials)
    return JacobianLaw(Chain((), (), 1.0, drift=variance), log_scale, (), moments)


def limit_law(activation: object, variance: Number) -> LimitLaw:
    """The universal limit that the activation's spectra tend to at fixed variance.

    Example:
        >>> limit_law("hard_tanh", 0.25).atom()
        (1.2840254166877414, 0.75)
    """
    if not (np.isfinite(variance) and variance > 0):
        raise ValueError(f"the variance must be positive, got {variance}.")
    return LimitLaw(universality_class(activation), float(variance))


def shifted_relu(shift: Number) -> Activation:
    """max(h, -shift): linear but for inputs below -shift; of the Bernoulli class.

    Example:
        >>> shifted_relu(1.0).value(np.array([-3.0, 2.0])).tolist()
        [-1.0, 2.0]
    """
    if not np.isfinite(shift):
        raise ValueError(f"the shift must be finite, got {shift}.")
    return Activation(
        name=f"shifted_relu({shift:g})",
        value=lambda h: np.maximum(h, -shift),
        derivative=lambda h: np.where(np.real(h) > -shift, 1.0, 0.0),
        kinks=(-float(shift),),
    )


def smoothed_relu(width: Number) -> Activation:
    """E max(h + width Z, 0): ReLU smoothed by a Gaussian, h Phi(h / w) + w gauss(h / w).

    Example:
        >>> round(float(smoothed_relu(1.0).value(np.array(0.0))), 6)
        0.398942
    """
    from scipy.special import erfc, ndtr

    if not (np.isfinite(width) and width > 0):
        raise ValueError(f"the width must be positive, got {width}; use 'relu' for none.")

    def cdf(h: np.ndarray) -> np.ndarray:
        return np.asarray(0.5 * erfc(-h / (width * np.sqrt(2))) if np.iscomplexobj(h) else ndtr(h / width))

    return Activation(
        name=f"smoothed_relu({width:g})",
        value=lambda h: h * ndtr(h / width) + width * np.exp(-((h / width) ** 2) / 2) / np.sqrt(2 * np.pi),
        derivative=cdf,
    )
