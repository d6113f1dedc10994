"""Gaussian moments of an activation, as functions of the pre-activation variance q."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Float

from torch_rmt.theory.activation import Activation
from torch_rmt.theory.closed_forms import GaussianMoments, Homogeneous
from torch_rmt.theory.gaussian import checked_variance, gaussian_expectation, gaussian_rule
from torch_rmt.theory.piecewise_linear import piecewise_linear

# Below this q an activation is its tangent at zero to within rounding of every moment.
TINY_Q = 1e-14


@lru_cache(maxsize=256)
def closed_moments(activation: Activation) -> GaussianMoments | None:
    """The closed forms that the activation carries, or those of its kinks and slopes if it is piecewise linear.

    Example:
        >>> from torch_rmt.theory import as_activation
        >>> closed_moments(as_activation("hard_tanh"))
        PiecewiseLinear(offset=0.0, slope=1.0, turns=((-1.0, 1.0), (1.0, -1.0)))
    """
    if activation.closed is not None:
        return activation.closed
    slopes = activation.slopes()
    if slopes is None:
        return None
    offset = float(activation.value(np.zeros(1))[0])
    if offset == 0.0 and all(kink == 0.0 for kink in activation.kinks):
        return Homogeneous(slopes[0], slopes[-1])
    exact = piecewise_linear(activation.kinks, slopes, offset)
    # A derivative that is not that of the value (straight-through) has no such form.
    points = np.array([p + d for p in (*activation.kinks, 0.0) for d in (-30.0, -0.7, 0.0, 0.7, 30.0)])
    gap = np.abs(exact.value(points) - activation.value(points)).max()
    return exact if gap <= 1e-9 * max(1.0, float(np.abs(activation.value(points)).max())) else None


@lru_cache(maxsize=4096)
def mean_value(activation: Activation, q: float) -> float:
    """E phi(h), h ~ N(0, q)."""
    closed = closed_moments(activation)
    if closed is not None:
        return closed.mean(checked_variance(q))
    return gaussian_expectation(activation.value, q, activation.kinks)


@lru_cache(maxsize=4096)
def mean_slope(activation: Activation, q: float) -> float:
    """E phi'(h), h ~ N(0, q)."""
    closed = closed_moments(activation)
    if closed is not None:
        return closed.mean_slope(checked_variance(q))
    return gaussian_expectation(activation.derivative, q, activation.kinks)


@lru_cache(maxsize=4096)
def second_moment(activation: Activation, q: float) -> float:
    """V(q) = E phi(h)^2, h ~ N(0, q)."""
    closed = closed_moments(activation)
    if closed is not None:
        return closed.square(checked_variance(q))
    return gaussian_expectation(lambda h: activation.value(h) ** 2, q, activation.kinks)


@lru_cache(maxsize=4096)
def slope_moment(activation: Activation, q: float) -> float:
    """D(q) = E phi'(h)^2, h ~ N(0, q); at q = 0 the mean over the two one-sided slopes, as q -> 0 gives."""
    closed = closed_moments(activation)
    if closed is not None:
        return closed.square_slope(checked_variance(q))
    if q < TINY_Q:
        # Second-order extrapolation to both sides of zero.
        near = np.array([1e-6, -1e-6, 2e-6, -2e-6])
        squares = np.asarray(activation.derivative(near), dtype=np.float64) ** 2
        return float(squares[:2].sum() - squares[2:].sum() / 2)
    return gaussian_expectation(lambda h: activation.derivative(h) ** 2, q, activation.kinks)


@lru_cache(maxsize=4096)
def length_slope(activation: Activation, q: float) -> float:
    """P(q) = dV/dq = E[h phi(h) phi'(h)] / q, h ~ N(0, q)."""
    closed = closed_moments(activation)
    if closed is not None:
        return closed.square_rate(max(checked_variance(q), TINY_Q))
    offset = float(activation.value(np.zeros(1))[0])
    if q < TINY_Q and offset == 0.0:
        return slope_moment(activation, 0.0)
    q = max(q, TINY_Q)
    if offset == 0.0 or q > 1e-3:
        inner = gaussian_expectation(lambda h: h * activation.value(h) * activation.derivative(h), q, activation.kinks)
        return inner / q
    # phi(0) != 0: the constant contributes E[h phi'] phi(0) = phi(0) Cov, which loses digits at small q when divided.
    rest = gaussian_expectation(
        lambda h: h * (activation.value(h) - offset) * activation.derivative(h), q, activation.kinks
    )
    mean_slope = float(activation.derivative(np.zeros(1))[0])
    odd = gaussian_expectation(lambda h: h * (activation.derivative(h) - mean_slope), q, activation.kinks)
    return (rest + offset * odd) / q


@lru_cache(maxsize=64)
def moment_table(
    activation: Activation,
) -> tuple[
    Float[np.ndarray, " grid"],
    Float[np.ndarray, " grid"],
    Float[np.ndarray, " grid"],
    Float[np.ndarray, " grid"],
]:
    """(q, V, D, P) on a logarithmic grid from 1e-9 to 1e9: where to look for roots before they are polished.

    Raises:
        ValueError: a moment diverges already at q = 1.
    """
    grid = np.logspace(-9, 9, 145)
    rows = []
    closed = closed_moments(activation)
    if closed is not None:
        rows = [(closed.square(q), closed.square_slope(q), closed.square_rate(q)) for q in grid.tolist()]
    for q in grid if closed is None else ():
        h, weights = gaussian_rule(float(q), activation.kinks)
        with np.errstate(over="ignore", invalid="ignore"):
            value, slope = activation.value(h), activation.derivative(h)
            rows.append((weights @ value**2, weights @ slope**2, weights @ (h * value * slope) / q))
    table = np.array(rows)
    finite = np.asarray(np.isfinite(table).all(axis=1))
    if not finite[grid <= 1.0].all():
        raise ValueError(
            f"the Gaussian moments of activation {activation.name!r} diverge: it grows too fast for mean-field theory."
        )
    return grid[finite], table[finite, 0], table[finite, 1], table[finite, 2]


def is_scale_invariant(activation: Activation) -> bool:
    """Whether phi(a h) = a phi(h) for a > 0: linear, ReLU, leaky ReLU, |h|."""
    return isinstance(closed_moments(activation), Homogeneous)
