"""Mean field of a wide random network: fixed points of the length and correlation maps, and depth scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from torch_rmt.theory.activation import Activation, Number, as_activation
from torch_rmt.theory.correlation import correlation_fixed_point
from torch_rmt.theory.moments import (
    is_scale_invariant,
    length_slope,
    moment_table,
    second_moment,
    slope_moment,
)

Phase = Literal["ordered", "critical", "chaotic"]
Stability = Literal["stable", "unstable", "half-stable", "neutral"]

# |chi - 1| below this is called critical: sigma_w printed to seven digits still counts.
_CRITICAL = 1e-6


@dataclass(frozen=True)
class FixedPoint:
    """One fixed point q of the length map, its slope there, and whether a signal stays near it."""

    q: float
    slope: float
    stability: Stability


@dataclass(frozen=True)
class MeanField:
    """What a signal and its gradient do in a wide network with independent weights.

    Fields:
        q_star: mean square of the pre-activations deep in the network; inf if it diverges. Where every q is a fixed
            point (ReLU at sigma_w = sqrt 2), one by convention and `fixed_points` says "neutral".
        c_star: correlation deep in the network of two different inputs; with dropout, of two masks of any inputs.
        chi: mean squared singular value of one layer's Jacobian, sigma_w^2 E phi'(h)^2.
        slope_q, slope_c: slopes of the length map at q_star and of the correlation map at c_star.
        depth_scale_q, depth_scale_c: layers after which a distance from the fixed point has fallen by e; inf where it
            falls slower than exponentially.
        phase: "ordered" (gradients vanish), "critical", "chaotic" (gradients explode).
        fixed_points: all fixed points of the length map that were found.
    """

    q_star: float
    c_star: float
    chi: float
    slope_q: float
    slope_c: float
    depth_scale_q: float
    depth_scale_c: float
    phase: Phase
    fixed_points: tuple[FixedPoint, ...]


def mean_field(activation: object, sigma_w: Number, sigma_b: Number = 0.0, *, dropout: Number = 0.0) -> MeanField:
    """Fixed points, slopes, depth scales and phase of an infinitely wide network.

    q <- sigma_w^2 E phi(sqrt(q) Z)^2 + sigma_b^2;  c <- (sigma_w^2 E phi(u1) phi(u2) + sigma_b^2) / q*;
    chi = sigma_w^2 E phi'(sqrt(q*) Z)^2. Of several stable q* the one that unit inputs flow to is taken.

    Args:
        activation: a name, an `Activation` or a callable.
        sigma_w: weights have entry variance sigma_w^2 / fan-in.
        sigma_b: standard deviation of the biases.
        dropout: probability that a unit is dropped, the others divided by 1 - dropout. q and chi then have sigma_w^2 /
            (1 - dropout) for sigma_w^2; the map for c, of two inputs (or of one input twice) under two masks, keeps
            sigma_w^2, so that c = 1 is no fixed point and depth_scale_c stays finite.

    Raises:
        ValueError: a sigma below zero or not finite; dropout outside [0, 1); an activation whose Gaussian moments
            diverge.

    Source: Poole et al. 2016; Schoenholz et al. 2017, eqs. (3)-(9) and section 5 for dropout.

    Example:
        >>> field = mean_field("tanh", 1.5, 0.05)
        >>> field.phase, round(field.q_star, 4), round(field.c_star, 4)
        ('chaotic', 0.7984, 0.0521)
    """
    phi = as_activation(activation)
    sigma_w, sigma_b = checked_sigma("sigma_w", sigma_w), checked_sigma("sigma_b", sigma_b)
    keep = 1.0 - checked_dropout(dropout)
    plain, sigma_w = sigma_w, sigma_w / keep**0.5
    points = length_fixed_points(phi, sigma_w, sigma_b)
    q = _reached(phi, sigma_w, sigma_b, points)
    # Far out an activation is its asymptote; that is what a diverging signal sees.
    seen = min(q, 1e9)
    chi = sigma_w**2 * slope_moment(phi, seen)
    slope_q = sigma_w**2 * length_slope(phi, seen)
    if q == 0.0 or np.isinf(q):
        # The map for c is that of the tangent at zero (or of the homogeneous function), normalised.
        c_star, slope_c = 1.0, 1.0
    else:
        c_star, slope_c = correlation_fixed_point(phi, plain, sigma_b, seen, keep)
    phase: Phase = "critical" if abs(chi - 1) < _CRITICAL else "ordered" if chi < 1 else "chaotic"
    return MeanField(q, c_star, chi, slope_q, slope_c, depth_scale(slope_q), depth_scale(slope_c), phase, points)


def checked_sigma(name: str, sigma: Number) -> float:
    """Return sigma as a float, or say what is wrong with it."""
    if not (np.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"{name} is a standard deviation: it must be finite and >= 0, got {sigma}.")
    return float(sigma)


def checked_dropout(dropout: Number) -> float:
    """Return the probability of dropping a unit as a float, or say what is wrong with it."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is the probability of dropping a unit, in [0, 1), got {dropout}.")
    return float(dropout)


def depth_scale(slope: float) -> float:
    """Layers over which a distance shrinks by e, -1 / log |slope|; inf at slope one."""
    slope = abs(slope)
    if slope == 0.0:
        return 0.0
    return float("inf") if abs(slope - 1) < 1e-12 else float(-1.0 / np.log(slope))


def length_fixed_point(activation: Activation, sigma_w: Number, sigma_b: Number) -> float:
    """The q* that unit inputs flow to; inf where they diverge."""
    return _reached(activation, sigma_w, sigma_b, length_fixed_points(activation, sigma_w, sigma_b))


def length_map(activation: Activation, sigma_w: float, sigma_b: float) -> Callable[[float], float]:
    """q -> sigma_w^2 E phi(sqrt(q) Z)^2 + sigma_b^2."""
    return lambda q: sigma_w**2 * second_moment(activation, q) + sigma_b**2


def length_fixed_points(activation: Activation, sigma_w: float, sigma_b: float) -> tuple[FixedPoint, ...]:
    """All fixed points of the length map between 0 and 1e9, in order, tangential ones included."""
    phi = activation
    if is_scale_invariant(phi):
        gain = sigma_w**2 * second_moment(phi, 1.0)
        if abs(gain - 1) < 1e-12:
            return (FixedPoint(1.0, gain, "neutral"),) if sigma_b == 0 else ()
        if sigma_b == 0:
            return (FixedPoint(0.0, gain, "stable" if gain < 1 else "unstable"),)
        return (FixedPoint(sigma_b**2 / (1 - gain), gain, "stable"),) if gain < 1 else ()
    grid, V, _, _ = moment_table(phi)
    gap = np.log(sigma_w**2 * V + sigma_b**2 + 1e-300) - np.log(grid)

    def exact_gap(log_q: float) -> float:
        q = float(np.exp(log_q))
        return float(np.log(sigma_w**2 * second_moment(phi, q) + sigma_b**2 + 1e-300) - log_q)

    roots: list[tuple[float, bool]] = []
    if sigma_b == 0.0 and second_moment(phi, 0.0) == 0.0:
        roots.append((0.0, False))
    logs = np.log(grid)
    # Below 1e-9 nothing but the tangent at zero is seen: a gap at rounding there is no root.
    for i in np.flatnonzero((gap[:-1] > 0) != (gap[1:] > 0)):
        if max(abs(gap[i]), abs(gap[i + 1])) > 1e-13:
            roots.append((float(np.exp(brentq(exact_gap, logs[i], logs[i + 1], xtol=1e-15, rtol=1e-15))), False))
    size = np.abs(gap)
    for i in np.flatnonzero((size[1:-1] < size[:-2]) & (size[1:-1] <= size[2:]) & (size[1:-1] < 0.05)) + 1:
        if (gap[i - 1] > 0) == (gap[i + 1] > 0) == (gap[i] > 0):
            best = minimize_scalar(lambda x: abs(exact_gap(x)), bounds=(logs[i - 1], logs[i + 1]), method="bounded",
                                   options={"xatol": 1e-9})  # fmt: skip
            if best.fun < 1e-9:
                roots.append((float(np.exp(best.x)), True))
            elif (exact_gap(best.x) > 0) != (gap[i] > 0):
                for a, b in ((logs[i - 1], best.x), (best.x, logs[i + 1])):
                    roots.append((float(np.exp(brentq(exact_gap, a, b, xtol=1e-15, rtol=1e-15))), False))
    return tuple(_classify(phi, sigma_w, q, double) for q, double in sorted(roots))


def _classify(phi: Activation, sigma_w: float, q: float, double: bool) -> FixedPoint:
    slope = sigma_w**2 * length_slope(phi, q)
    if double:
        return FixedPoint(q, slope, "half-stable")
    if abs(abs(slope) - 1) < 1e-9 and q == 0.0:
        # Slope one at zero: the next order decides.
        pulled = sigma_w**2 * second_moment(phi, 1e-4) < 1e-4
        return FixedPoint(q, slope, "stable" if pulled else "unstable")
    return FixedPoint(q, slope, "stable" if abs(slope) < 1 else "unstable")


def _reached(phi: Activation, sigma_w: float, sigma_b: float, points: tuple[FixedPoint, ...]) -> float:
    """The fixed point that q = sigma_w^2 + sigma_b^2, the first layer's value for unit inputs, flows to."""
    if any(p.stability == "neutral" for p in points):
        return 1.0
    start = sigma_w**2 + sigma_b**2
    if start == 0.0:
        return 0.0
    up = sigma_w**2 * second_moment(phi, start) + sigma_b**2 > start
    if up:
        above = [p.q for p in points if p.q >= start * (1 - 1e-12) and p.stability != "unstable"]
        return min(above) if above else float("inf")
    below = [p.q for p in points if p.q <= start * (1 + 1e-12) and p.stability != "unstable"]
    return max(below) if below else 0.0
