"""The correlation map: how the angle between two inputs changes from layer to layer."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from torch_rmt.theory.activation import Activation, ArrayFunction
from torch_rmt.theory.gaussian import IN_DEVIATIONS, gaussian_rule, legendre, panel_rule
from torch_rmt.theory.moments import closed_moments, second_moment, slope_moment

HERMITE_TERMS = 240
# Nodes of a panel: with 10, 12, 14 or 20 the pairs of erf, GELU and sine keep the same distance from the closed forms.
_INNER = 11
_POINT = np.zeros(1), np.ones(1)


def pair_expectation(
    function: ArrayFunction, variance: float, correlation: float, kinks: tuple[float, ...] = ()
) -> float:
    """E f(u1) f(u2) for jointly Gaussian u of one variance and correlation 0 <= c <= 1.

    With u_i = sqrt(c) s + sqrt(1 - c) t_i the expectation is E_s[g(s)^2], g(s) = E_t f: two integrals in one
    dimension, each split at the kinks.
    """
    if not 0.0 <= correlation <= 1.0:
        raise ValueError(f"the correlation must be in [0, 1], got {correlation}.")
    own = variance * (1.0 - correlation)
    if own <= 1e-15 * variance:
        h, weights = gaussian_rule(variance, kinks)
        return float(weights @ function(h) ** 2)
    width = float(np.sqrt(own))
    shared = np.sqrt(variance * correlation)
    s, s_weights = panel_rule(_outer_edges(float(shared), width, kinks), float(shared), 14) if shared > 0 else _POINT
    edges = _inner_edges(s, width, kinks)
    unit, unit_weights = legendre(_INNER)
    half = np.diff(edges, axis=1)[:, :, None] / 2
    h = edges[:, :-1, None] + half * (1 + unit)
    density = np.exp(-0.5 * ((h - s[:, None, None]) / width) ** 2) * half
    g = (function(h) * density) @ unit_weights
    # Normalised by the same rule, so that a constant comes out exactly.
    mass = (density @ unit_weights).sum(axis=1)
    return float(s_weights @ (g.sum(axis=1) / mass) ** 2)


def value_pair(activation: Activation, q: float, c: float) -> float:
    """E phi(h1) phi(h2) of variance q and correlation c, in closed form where the activation has one.

    Without a closed form c must not be negative.
    """
    closed = closed_moments(activation)
    exact = float("nan") if closed is None else closed.pair(q, c)
    return pair_expectation(activation.value, q, c, activation.kinks) if np.isnan(exact) else exact


def slope_pair(activation: Activation, q: float, c: float) -> float:
    """E phi'(h1) phi'(h2) of variance q and correlation c, in closed form where the activation has one."""
    closed = closed_moments(activation)
    exact = float("nan") if closed is None else closed.pair_slope(q, c)
    return pair_expectation(activation.derivative, q, c, activation.kinks) if np.isnan(exact) else exact


def _outer_edges(deviation: float, width: float, kinks: tuple[float, ...]) -> Float[np.ndarray, " edges"]:
    """Panel edges of s: g has features as wide as the inner Gaussian, around each kink and around zero."""
    steps = np.array([0.7, 1.4, 2.2, 3.0, 4.2, 6.0, 9.0]) * width
    if width < 2.0:  # and as wide as the activation's own scale
        steps = np.concatenate([steps, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]])
    centres = np.array([0.0, *kinks])
    marks = (centres[:, None] + np.concatenate([-steps, [0.0], steps])).ravel()
    own = deviation * np.concatenate([-IN_DEVIATIONS, IN_DEVIATIONS])
    edges = np.unique(np.concatenate([own, marks[np.abs(marks) < own.max()]]))
    kept: Float[np.ndarray, " edges"] = edges[np.concatenate([[True], np.diff(edges) > 1e-9 * deviation])]
    return kept


def _inner_edges(
    centre: Float[np.ndarray, " outer"], width: float, kinks: tuple[float, ...]
) -> Float[np.ndarray, "outer edges"]:
    """Panel edges for each centre: steps of the Gaussian's width, clipped to its reach, and marks around each kink."""
    reach = 9.0 * width
    own = centre[:, None] + width * np.array([-9.0, -6.0, -4.2, -2.8, -1.4, 0.0, 1.4, 2.8, 4.2, 6.0, 9.0])
    features = [np.array(kinks, dtype=np.float64)]
    if width > 0.7:  # the activation's own scale is narrower than the Gaussian
        near = np.array([1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 18.0])
        near = np.concatenate([-near, [0.0], near])
        features.append((np.array([0.0, *kinks])[:, None] + near).ravel())
    marks = np.unique(np.concatenate(features))
    clipped = np.clip(marks[None, :], centre[:, None] - reach, centre[:, None] + reach)
    return np.sort(np.concatenate([own, clipped], axis=1), axis=1)


def hermite_coefficients(
    function: ArrayFunction, q: float, kinks: tuple[float, ...] = ()
) -> Float[np.ndarray, " terms"]:
    """a_k = E f(sqrt(q) Z) He_k(Z) / sqrt(k!), k = 0 to 239: E f(u1) f(u2) = sum_k a_k^2 c^k at correlation c."""
    h, weights = gaussian_rule(q, kinks, order=28)
    z = h / np.sqrt(q)
    terms = np.empty(HERMITE_TERMS)
    before, now = np.zeros_like(z), np.sqrt(weights)
    values = function(h) * np.sqrt(weights)
    for k in range(HERMITE_TERMS):
        terms[k] = values @ now
        before, now = now, (z * now - np.sqrt(k) * before) / np.sqrt(k + 1)
    return terms


def correlation_fixed_point(
    activation: Activation, sigma_w: float, sigma_b: float, q: float, keep: float = 1.0
) -> tuple[float, float]:
    """The stable fixed point c* in [0, 1] of c <- (sigma_w^2 E phi(u1) phi(u2) + sigma_b^2) / q, and the slope there.

    The map is a power series with coefficients >= 0, hence convex: Newton from the left cannot miss the root. Without
    closed forms the start comes from the Hermite series, the last steps from the integrals themselves. With dropout
    only a share `keep` of the units is kept: q has 1 / keep in front of E phi^2, the map between two masks has not.

    Source: Poole et al. 2016, eq. (5); Daniely, Frostig and Singer 2016 for the series.
    """
    chi = sigma_w**2 * slope_moment(activation, q)
    # Normalised by the map's own value at c = 1, so that q off its fixed point by rounding does not move the root.
    scale = sigma_w**2 / keep * second_moment(activation, q) + sigma_b**2
    slope_at_one = chi * q / scale
    if keep == 1.0 and slope_at_one <= 1.0 + 1e-10:
        return 1.0, slope_at_one
    if closed_moments(activation) is not None:
        return _newton_on_the_map(activation, sigma_w, sigma_b, q, scale)
    series = sigma_w**2 * hermite_coefficients(activation.value, q, activation.kinks) ** 2 / scale
    series[0] += sigma_b**2 / scale
    series[np.abs(series) < 1e-17] = 0.0
    poly = np.polynomial.Polynomial(series)
    slope = poly.deriv()
    c = 0.0
    for _ in range(60):
        step = (poly(c) - c) / (1.0 - slope(c))
        if not (step > 1e-16 and c + step < 1.0):
            break
        c += float(step)
    if series[0] == 0.0:
        return 0.0, float(series[1])

    def residual(c: float) -> float:
        both = pair_expectation(activation.value, q, c, activation.kinks)
        return (sigma_w**2 * both + sigma_b**2) / scale - c

    def slope_at(c: float) -> float:
        # Where the series has converged its slope is exact; the integral takes over near one.
        if c**HERMITE_TERMS < 1e-9:
            return float(slope(c))
        return sigma_w**2 * q / scale * pair_expectation(activation.derivative, q, c, activation.kinks)

    if c**HERMITE_TERMS < 1e-16:  # what the series leaves out is below rounding
        return c, float(slope(c))
    for _ in range(30):
        d = slope_at(c)
        if d >= 1.0:  # right of the minimum of the convex gap: go back towards the root
            c = 1.0 - 2.0 * (1.0 - c)
            continue
        step = residual(c) / (1.0 - d)
        c = min(max(c + step, 0.0), 1.0)
        if abs(step) < 1e-12:
            break
        if abs(step) < 1e-7:
            # Quadratic convergence: one more residual with the same slope ends at rounding.
            c = min(max(c + residual(c) / (1.0 - d), 0.0), 1.0)
            break
    d = sigma_w**2 * q / scale * pair_expectation(activation.derivative, q, c, activation.kinks)
    return float(c), float(d)


def _newton_on_the_map(
    activation: Activation, sigma_w: float, sigma_b: float, q: float, scale: float
) -> tuple[float, float]:
    """The same from closed forms: the gap f(c) - c is convex and falls until the root, from c = 0 on."""
    c = 0.0
    for _ in range(100):
        gap = (sigma_w**2 * value_pair(activation, q, c) + sigma_b**2) / scale - c
        slope = sigma_w**2 * q / scale * slope_pair(activation, q, c)
        # An odd function without bias keeps c = 0, but for rounding.
        step = gap / (1.0 - slope) if slope < 1.0 and gap > 2e-16 else 0.0
        c = min(c + step, 1.0)
        if step <= 1e-16:
            break
    return c, sigma_w**2 * q / scale * slope_pair(activation, q, c)
