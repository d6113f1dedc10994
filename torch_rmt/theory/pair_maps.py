"""E phi(u) phi(v) for every pair of a Gaussian vector with any variances: what a layer does to a kernel matrix."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.polynomial import chebyshev
from scipy.special import erfcx

from torch_rmt.theory.activation import Activation, ArrayFunction
from torch_rmt.theory.correlation import HERMITE_TERMS, hermite_coefficients
from torch_rmt.theory.gaussian import gaussian_expectation

_VARIANCES = 12  # at which the coefficients are computed; between them they are interpolated in log variance
_SAME = 1e-9  # variances closer than this, relatively, are one


def kernel_values(activation: Activation, covariance: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """E phi(u_s) phi(u_t) for u ~ N(0, covariance); see `_pairs` for what is known of the error."""
    return _pairs(activation.value, activation.kinks, covariance, decay=2.5)


def kernel_slopes(activation: Activation, covariance: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """E phi'(u_s) phi'(u_t) for u ~ N(0, covariance)."""
    return _pairs(activation.derivative, activation.kinks, covariance, decay=1.5)


def _pairs(
    function: ArrayFunction, kinks: tuple[float, ...], covariance: Float[np.ndarray, "n n"], decay: float
) -> Float[np.ndarray, "n n"]:
    """sum_k a_k(q_s) a_k(q_t) c^k, a_k the normalised Hermite coefficients of f(sqrt(q) Z), c the correlation.

    The diagonal is an integral of its own. At a kink a_k^2 falls as k^-decay only: what the kept terms leave out at
    c = 1 is known, sqrt(r_s r_t), and goes with c as the tail of that power does. Errors against closed forms and
    against integrals in two dimensions: 1e-12 for smooth activations, below 1e-3 of the value at kinks.
    """
    q = np.diag(covariance).copy()
    if not (np.isfinite(covariance).all() and (q > 0).all()):
        raise ValueError("a covariance needs finite entries and positive variances.")
    size = np.sqrt(np.outer(q, q))
    c = np.clip(covariance / size, -1.0, 1.0)
    coefficients, squares = _by_variance(function, kinks, q)
    total: Float[np.ndarray, "n n"] = np.zeros_like(c)
    power = np.ones_like(c)
    for k in range(HERMITE_TERMS):
        a = coefficients[:, k]
        total += np.outer(a, a) * power
        power *= c
    left = np.sqrt(np.clip(squares - (coefficients**2).sum(1), 0.0, None))
    total += np.outer(left, left) * _tail(c, decay) * _in_phase(q, kinks)
    np.fill_diagonal(total, squares)
    return total


def _in_phase(q: Float[np.ndarray, " n"], kinks: tuple[float, ...]) -> Float[np.ndarray, "n n"]:
    """How far the tails of two variances add up: He_k turns by sqrt(k) dz between their places z of the kinks."""
    places = np.outer(1.0 / np.sqrt(q), np.asarray(kinks or (0.0,)))
    apart = np.abs(places[:, None, :] - places[None, :, :]).max(-1) * np.sqrt(HERMITE_TERMS)
    return np.where(apart < 0.5 * np.pi, np.cos(np.minimum(apart, np.pi)), 0.0)


def _tail(c: Float[np.ndarray, "n n"], decay: float) -> Float[np.ndarray, "n n"]:
    """sum_{k > K} k^-decay c^k over its value at c = 1, as an integral; 0 for c <= 0, where signs alternate.

    With x = -K log c: exp(-x) (1 - sqrt(pi x) erfcx(sqrt x)) for decay 3/2, and integrated by parts for 5/2.
    """
    x = -HERMITE_TERMS * np.log(np.clip(c, 1e-300, 1.0))
    slow = 1.0 - np.sqrt(np.pi * x) * erfcx(np.sqrt(x))
    if decay == 2.5:
        slow = 1.0 - 2.0 * x * slow
    return np.where(c > 0.0, np.exp(-x) * slow, 0.0)


def _by_variance(
    function: ArrayFunction, kinks: tuple[float, ...], q: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, "n terms"], Float[np.ndarray, " n"]]:
    """Hermite coefficients and E f^2 at each variance."""
    logs = np.log(q)
    low, high = float(logs.min()), float(logs.max())
    one = high - low <= _SAME
    nodes = np.array([0.0]) if one else chebyshev.chebpts1(_VARIANCES)
    middle, half = 0.5 * (low + high), 0.5 * (high - low)
    at = np.exp(middle + half * nodes)
    table = np.stack(
        [
            np.append(
                hermite_coefficients(function, float(v), kinks),
                gaussian_expectation(lambda h: function(h) ** 2, float(v), kinks),
            )
            for v in at
        ]
    )
    if one:
        return np.repeat(table[:, :-1], len(q), axis=0), np.repeat(table[:, -1], len(q))
    series = np.linalg.solve(chebyshev.chebvander(nodes, _VARIANCES - 1), table)
    values = chebyshev.chebvander((logs - middle) / half, _VARIANCES - 1) @ series
    return values[:, :-1], values[:, -1]
