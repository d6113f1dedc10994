"""Critical initialisation: the (sigma_w, sigma_b) at which gradients neither vanish nor explode, and its kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.optimize import brentq

from torch_rmt.theory.activation import Activation, Number, as_activation
from torch_rmt.theory.mean_field import checked_dropout, checked_sigma
from torch_rmt.theory.moments import (
    is_scale_invariant,
    length_slope,
    moment_table,
    second_moment,
    slope_moment,
)

Kind = Literal["scale-invariant", "line", "half-stable", "none"]


@dataclass(frozen=True)
class CriticalPoint:
    """A point (sigma_w, sigma_b) with chi = 1 at its q_star.

    Fields:
        sigma_w, sigma_b: standard deviations (times sqrt(fan-in) for the weights).
        q_star: mean square of the pre-activations there. For a scale-invariant activation every q is a fixed point
            and this is the one asked for, or 1.
        chi: sigma_w^2 E phi'^2 at q_star; one, except where `kind` is "none".
        slope_q: slope of the length map at q_star; below one where signals return to q_star.
        kind: "scale-invariant" (ReLU: any q, no bias); "line" (tanh: a critical sigma_w for each sigma_b, q_star
            stable); "half-stable" (GELU: an isolated point with chi = slope_q = 1); "none" (what was asked for has no
            stable critical point; `advice` says what to do).
        advice: empty, or in words.
    """

    sigma_w: float
    sigma_b: float
    q_star: float
    chi: float
    slope_q: float
    kind: Kind
    advice: str = ""


def critical_point(
    activation: object,
    *,
    sigma_b: Number | None = None,
    sigma_w: Number | None = None,
    q_star: Number | None = None,
    dropout: Number = 0.0,
) -> CriticalPoint:
    """Return the critical point with the given sigma_b, sigma_w or q*, or the natural one if none is given.

    At criticality sigma_w^2 = 1 / E phi'(sqrt(q) Z)^2 and sigma_b^2 = q - sigma_w^2 E phi(sqrt(q) Z)^2; so the points
    are a curve in q, and the given quantity picks q. Natural: ReLU and its kin at sigma_b = 0; a line at its end
    with the smallest sigma_b; GELU and SiLU at their half-stable point. Dropout multiplies both moments by
    1 / (1 - dropout): sigma_w falls by sqrt(1 - dropout) and all else stays.

    Raises:
        ValueError: more than one of the three given, a value below zero, or dropout outside [0, 1).

    Source: Schoenholz et al. 2017 (lines); Roberts, Yaida and Hanin 2022, chapter 5 (half-stable points).

    Example:
        >>> round(critical_point("tanh", sigma_b=0.05).sigma_w, 6)
        1.122539
        >>> critical_point("relu").kind, critical_point("gelu").kind
        ('scale-invariant', 'half-stable')
        >>> round(critical_point("relu", dropout=0.5).sigma_w, 12)
        1.0
    """
    phi, root = as_activation(activation), (1.0 - checked_dropout(dropout)) ** 0.5
    given = {"sigma_b": sigma_b, "sigma_w": sigma_w, "q_star": q_star}
    if sum(value is not None for value in given.values()) > 1:
        raise ValueError("give at most one of sigma_b, sigma_w and q_star: each alone fixes the critical point.")
    sigma_b, sigma_w, q_star = (None if v is None else checked_sigma(name, v) for name, v in given.items())
    point = _plain(phi, sigma_b, None if sigma_w is None else sigma_w / root, q_star)
    return replace(point, sigma_w=point.sigma_w * root)


def _plain(phi: Activation, sigma_b: float | None, sigma_w: float | None, q_star: float | None) -> CriticalPoint:
    """The critical point without dropout."""
    if is_scale_invariant(phi):
        return _scale_invariant(phi, sigma_b, sigma_w, q_star)
    if q_star is not None:
        return _at(phi, q_star)
    if sigma_w is not None:
        if sigma_w == 0:
            raise ValueError("sigma_w = 0 passes no gradient: a critical point has sigma_w > 0.")
        target = sigma_w**-2
        return _choose(phi, _roots(phi, lambda q, V, D: D / target - 1), f"sigma_w = {sigma_w:g}")
    if sigma_b is not None:
        if sigma_b == 0.0 and second_moment(phi, 0.0) == 0.0 and slope_moment(phi, 0.0) > 0:
            end = _at(phi, 0.0)
            if end.kind == "line":
                return end
        candidates = _roots(phi, lambda q, V, D: (V / D + sigma_b**2) / q - 1)
        return _choose(phi, candidates, f"sigma_b = {sigma_b:g}")
    return _natural(phi)


def critical_curve(activation: object, q: float) -> tuple[float, float]:
    """(sigma_w^2, sigma_b^2) with chi = 1 and fixed point q; sigma_b^2 < 0 means that there is none at this q."""
    phi = as_activation(activation)
    weight = 1.0 / slope_moment(phi, q)
    return weight, q - weight * second_moment(phi, q)


def _scale_invariant(
    phi: Activation, sigma_b: float | None, sigma_w: float | None, q_star: float | None
) -> CriticalPoint:
    critical = slope_moment(phi, 1.0) ** -0.5
    if sigma_b:
        advice = (
            f"{phi.name} is scale invariant: with sigma_b > 0 the signal grows by sigma_b^2 a layer at chi = 1. "
            "Use sigma_b = 0."
        )
        return CriticalPoint(critical, sigma_b, float("inf"), 1.0, 1.0, "none", advice)
    if sigma_w is not None and abs(sigma_w / critical - 1) > 1e-9:
        chi = (sigma_w / critical) ** 2
        advice = f"{phi.name} is critical at sigma_w = {critical:.10g} only."
        return CriticalPoint(sigma_w, 0.0, float("nan"), chi, chi, "none", advice)
    return CriticalPoint(critical, 0.0, 1.0 if q_star is None else q_star, 1.0, 1.0, "scale-invariant")


def _at(phi: Activation, q: float) -> CriticalPoint:
    slope_moment_here = slope_moment(phi, q)
    if slope_moment_here < 1e-300:
        return CriticalPoint(
            float("inf"),
            0.0,
            q,
            0.0,
            0.0,
            "none",
            f"{phi.name} has no slope at q = {q:g}: take another q_star.",
        )
    weight, bias = critical_curve(phi, q)
    if -1e-9 * q < bias < 0:
        bias = 0.0
    slope_q = weight * length_slope(phi, q)
    if bias < 0:
        advice = (
            f"no sigma_b makes q = {q:g} a critical fixed point of {phi.name}: sigma_b^2 would be {bias:.4g}. "
            "Choose another q_star, or none for the natural point."
        )
        return CriticalPoint(weight**0.5, float("nan"), q, 1.0, slope_q, "none", advice)
    kind: Kind = "line"
    advice = ""
    if q == 0.0 and abs(slope_q - 1) < 1e-9:
        # At zero both slopes are one whatever the activation: the next order of V decides.
        probe = 1e-4
        if weight * second_moment(phi, probe) > probe:
            kind = "none"
    elif abs(slope_q - 1) < 1e-7:
        kind = "half-stable"
    elif slope_q > 1:
        kind = "none"
    if kind == "none":
        advice = (
            f"at q = {q:g} the gradients of {phi.name} are critical but q itself is an unstable fixed point "
            f"(slope {slope_q:.6g}): signals leave it. Use critical_point({phi.name!r}) with no further argument."
        )
    return CriticalPoint(weight**0.5, max(bias, 0.0) ** 0.5, q, 1.0, slope_q, kind, advice)


def _roots(phi: Activation, condition: Callable[[float, float, float], float]) -> list[float]:
    """All q in [1e-9, 1e9] with condition(q, V(q), D(q)) = 0, scanned on the table, then polished."""
    grid, V, D, _ = moment_table(phi)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        values = np.array([condition(*row) for row in zip(grid, V, D, strict=True)])
    roots = []
    for i in np.flatnonzero((values[:-1] > 0) != (values[1:] > 0)):
        if not np.isfinite(values[i : i + 2]).all() or np.abs(values[i : i + 2]).max() < 1e-12:
            continue

        def exact(log_q: float) -> float:
            q = float(np.exp(log_q))
            return condition(q, second_moment(phi, q), slope_moment(phi, q))

        roots.append(_crossing(exact, grid[i], grid[i + 1]))
    return roots


def _crossing(function: Callable[[float], float], low: float, high: float) -> float:
    """q between two points of the table where a function of log q changes sign.

    A root that falls on a point of the table may have its change of sign hidden by rounding: it is the nearer end.
    """
    ends = float(np.log(low)), float(np.log(high))
    first, last = function(ends[0]), function(ends[1])
    if first * last >= 0.0:
        return float(low if abs(first) <= abs(last) else high)
    return float(np.exp(brentq(function, *ends, xtol=1e-15, rtol=1e-15)))


def _choose(phi: Activation, candidates: list[float], asked: str) -> CriticalPoint:
    points = [_at(phi, q) for q in candidates]
    for point in points:
        if point.kind != "none":
            return point
    if points:
        return points[0]
    natural = _natural(phi)
    where = (
        f" It has one of kind {natural.kind} at sigma_w = {natural.sigma_w:.6g}, sigma_b = {natural.sigma_b:.6g}."
        if natural.kind != "none"
        else ""
    )
    nan = float("nan")
    return CriticalPoint(nan, nan, nan, nan, nan, "none", f"{phi.name} has no critical point with {asked}.{where}")


def _natural(phi: Activation) -> CriticalPoint:
    if second_moment(phi, 0.0) == 0.0 and slope_moment(phi, 0.0) > 1e-12:
        end = _at(phi, 0.0)
        if end.kind == "line":
            return end
    half = half_stable_point(phi)
    ends = [_at(phi, q) for q in _roots(phi, lambda q, V, D: V / D / q - 1)]
    stable = [point for point in ends if point.kind == "line"]
    if stable:
        return stable[0]
    if half is not None:
        return half
    nan = float("nan")
    way = "Ask with critical_point(activation, q_star=...), or add a normalisation layer."
    if _at(phi, 1.0).kind == "none":  # sigma_b^2 has no zero over q, so that one q says its sign at all
        why = "sigma_b^2 would be negative" if critical_curve(phi, 1.0)[1] < 0 else "signals would not return to it"
        way = f"No q_star serves: {why}. Add a normalisation layer or take another activation."
    advice = f"{phi.name} has neither a critical line that starts at sigma_b = 0 nor a half-stable point. {way}"
    return CriticalPoint(nan, nan, nan, nan, nan, "none", advice)


def half_stable_point(activation: object) -> CriticalPoint | None:
    """The isolated point with chi = 1 and slope of the length map 1 at a q* > 0, or None.

    Both slopes are one where E[h phi phi'] / q = E phi'^2, with sigma_b^2 >= 0.
    """
    phi = as_activation(activation)
    if is_scale_invariant(phi):
        return None
    grid, _, D, P = moment_table(phi)
    values = P / np.maximum(D, 1e-300) - 1

    def exact(log_q: float) -> float:
        q = float(np.exp(log_q))
        return length_slope(phi, q) / slope_moment(phi, q) - 1

    for i in np.flatnonzero((values[:-1] > 0) != (values[1:] > 0)):
        # Far out, and close to zero, both are asymptotically homogeneous and differ by rounding alone.
        if np.abs(values[i : i + 2]).max() < 1e-7:
            continue
        point = _at(phi, _crossing(exact, grid[i], grid[i + 1]))
        if point.kind == "half-stable":
            return point
    return None
