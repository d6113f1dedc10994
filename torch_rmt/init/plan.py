"""Which weights a critical initialisation sets, to what, and which it leaves alone and why."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from torch import nn

from torch_rmt.describe import ForwardGraph, Link, read_links
from torch_rmt.init.blocks import branch_ends, left_alone
from torch_rmt.theory import Activation, gaussian_expectation
from torch_rmt.theory.critical import CriticalPoint, critical_point

# Variance of the Jacobian's squared singular values that the activations may cause over the whole depth.
# A convention: the typical singular value is then within a quarter of one, and the activation still bends.
_SPREAD = 0.25


@dataclass(frozen=True)
class Setting:
    """What one weight will be drawn with.

    Fields:
        link: the weight in its place.
        activation: of the layer, None for a readout.
        sigma_w: sqrt(fan-in) times the standard deviation; None where the output is scaled to `q` as
            measured.
        sigma_b: standard deviation of the biases.
        q: the mean square of the pre-activation aimed at; of the tensor `entry`, the share of its mean square.
        entry: where a residual block begins, for a weight that ends one of its branches.
    """

    link: Link
    activation: Activation | None
    sigma_w: float | None
    sigma_b: float
    q: float
    entry: int | None = None


def isometry_q(activation: Activation, depth: int, spread: float = _SPREAD) -> float:
    """The q at which `depth` layers spread the Jacobian's squared singular values by a variance of `spread`.

    Solves depth * (mu_2 / mu_1^2 - 1) = spread with mu_k = E phi'(sqrt(q) Z)^(2k): dynamical isometry at
    finite depth. One if even q = 1 spreads less, or if every q spreads more.

    Source: Pennington, Schoenholz and Ganguli 2018, eq. (22).

    >>> from torch_rmt.theory import as_activation
    >>> q = isometry_q(as_activation("tanh"), 40)
    >>> 0.01 < q < 0.05
    True
    """

    def excess(log_q: float) -> float:
        q = float(np.exp(log_q))
        first = gaussian_expectation(lambda h: activation.derivative(h) ** 2, q, activation.kinks)
        second = gaussian_expectation(lambda h: activation.derivative(h) ** 4, q, activation.kinks)
        return depth * (second / first**2 - 1) - spread

    low, high = math.log(1e-8), 0.0
    if excess(high) <= 0:
        return 1.0
    if excess(low) >= 0:
        return 1.0  # a kink at 0: small q brings nothing
    return float(np.exp(brentq(excess, low, high, xtol=1e-6)))


def make_plan(
    module: nn.Module, graph: ForwardGraph, *, sigma_b: float | None, q_star: float | None
) -> tuple[list[Setting], dict[str, str]]:
    """Return the settings in the order of the calls and, by name, why each other weight is left alone.

    Raises:
        ValueError: the activation has no critical point of the kind asked for; the message says what it has.
    """
    links = read_links(graph)
    left = left_alone(module, graph, links)
    ends, normed = branch_ends(graph)
    after = _activation_after(graph, links)
    depth: dict[str, int] = {}
    for i in range(len(links)):
        activation = after[i]
        if activation is not None:
            depth[activation.name] = depth.get(activation.name, 0) + 1
    points: dict[str, CriticalPoint] = {}
    settings: list[Setting] = []
    planned_q: dict[int, float] = {}
    done: dict[str, float] = {}
    for i, link in enumerate(links):
        if link.use.name in left:
            continue
        if link.use.parameter in done:  # a tied weight is drawn once, for its first use
            planned_q[i] = done[link.use.parameter]
            continue
        following = after[i]
        if following is not None and following.name not in points:
            points[following.name] = _point(following, depth[following.name], sigma_b, q_star)
        point = None if following is None else points[following.name]
        setting = _setting(link, following, point, planned_q.get(link.parent) if link.parent is not None else None)
        if link.use.output in ends:
            entry, share = ends[link.use.output]
            setting = Setting(link, following, None, 0.0, share, entry)
        settings.append(setting)
        planned_q[i] = done[link.use.parameter] = setting.q
    return settings, left | normed


def _point(activation: Activation, depth: int, sigma_b: float | None, q_star: float | None) -> CriticalPoint:
    point = critical_point(activation, sigma_b=sigma_b, q_star=q_star)
    if point.kind == "line" and point.q_star == 0.0:
        q = isometry_q(activation, depth)
        if sigma_b is None:
            return critical_point(activation, q_star=q)
        return CriticalPoint(point.sigma_w, sigma_b, q, point.chi, point.slope_q, point.kind)
    usable = math.isfinite(point.sigma_w) and math.isfinite(point.sigma_b) and math.isfinite(point.q_star)
    # A q* that was asked for may be one that signals leave again, slowly (ELU, SELU): that is the caller's choice.
    if not usable or (point.kind == "none" and q_star is None):
        raise ValueError(f"no critical initialisation for {activation.name}: {point.advice}")
    return point


def _setting(link: Link, following: Activation | None, point: CriticalPoint | None, q_before: float | None) -> Setting:
    if q_before is None:
        # After the input or a pool: nothing is known of the law of what comes in, so the output is measured.
        q = 1.0 if point is None else point.q_star
        return Setting(link, following, None, 0.0 if point is None else point.sigma_b, q)
    before = link.activation
    slope = value = 0.0
    if before is None:
        slope, value = 1.0, q_before
    else:
        slope = gaussian_expectation(lambda h: before.derivative(h) ** 2, q_before, before.kinks)
        value = gaussian_expectation(lambda h: before.value(h) ** 2, q_before, before.kinks)
    keep = 1.0 - link.before.dropout  # what is kept is divided by keep, so its square by keep once more
    slope, value = slope / keep, value / keep
    weight = 1.0 / slope
    if point is None or point.kind == "scale-invariant":
        return Setting(link, following, math.sqrt(weight), 0.0, weight * value)
    bias = point.q_star - weight * value
    if bias >= -1e-9 * point.q_star:
        if point.sigma_b == 0.0 or bias < 1e-12 * point.q_star:
            return Setting(link, following, math.sqrt(weight), 0.0, weight * value)
        return Setting(link, following, math.sqrt(weight), math.sqrt(bias), point.q_star)
    # Two activations meet whose critical points do not: the signal comes first, for one layer.
    return Setting(link, following, math.sqrt(point.q_star / value), 0.0, point.q_star)


def _activation_after(graph: ForwardGraph, links: list[Link]) -> list[Activation | None]:
    after: list[Activation | None] = [None] * len(links)
    for link in links:
        if link.parent is not None and after[link.parent] is None:
            after[link.parent] = link.activation
    return after
