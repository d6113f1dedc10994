"""Many layers whose q differ a little, as few kinds: a Gauss rule over q, so that depth stays a multiplier."""

from __future__ import annotations

import numpy as np

from torch_rmt.measures.gauss_rule import gauss_rule

# Distance of the singularities in log(1 + q), in which the distance of q from the nodes counts; found by tuning on
# tanh, erf and GELU networks of 40 layers, where it is on the safe side.
_RADIUS = 0.5
_TOLERANCE = 1e-9


def representative_moments(
    moments: tuple[float, ...], *, radius: float = _RADIUS, tolerance: float = _TOLERANCE
) -> tuple[tuple[float, float], ...]:
    """Few (q, count) that stand for the layers' q: sum_l f(q_l) = sum_k count_k f(q_k) for every f of low degree.

    The master equation depends on the layers only through sum_l log w(u; q_l), which is smooth in q; the rule of m
    nodes is the Gauss rule of the empirical law of log(1 + q_l), exact for polynomials in it up to degree 2m - 1. Its
    nodes lie between the smallest and the largest q, its counts are positive and add up to the number of layers. The
    estimated error is below `tolerance` for functions whose singularities in log(1 + q) are `radius` away.

    Example:
        >>> rule = representative_moments(tuple(0.5 + 0.001 * k for k in range(40)))
        >>> len(rule), round(sum(count for _, count in rule), 9)
        (3, 40.0)
    """
    x = np.log1p(np.asarray(moments))
    centre, half = 0.5 * (x.max() + x.min()), 0.5 * (x.max() - x.min())
    if half <= 1e-9 * max(centre, 1e-300):
        return ((float(np.mean(moments)), float(len(moments))),)
    distinct = len(set(moments))
    for size in range(1, distinct):
        nodes, counts = gauss_rule(x, np.full(len(x), 1.0), size)
        # The squared norm of the orthogonal polynomial, to which the error of the rule is due.
        if np.prod((np.subtract.outer(x, nodes) / radius) ** 2, axis=1).sum() < tolerance:
            return tuple((float(np.expm1(node)), float(count)) for node, count in zip(nodes, counts, strict=True))
    values, counts = np.unique(np.asarray(moments), return_counts=True)
    return tuple((float(q), float(count)) for q, count in zip(values, counts, strict=True))
