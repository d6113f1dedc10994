"""The law of phi'(h)^2 with few nodes for arguments far from it, where a short Gauss rule is exact to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from torch_rmt.measures.gauss_rule import gauss_rule
from torch_rmt.theory.activation import Activation
from torch_rmt.theory.contour import corners
from torch_rmt.theory.gaussian import panel_rule
from torch_rmt.theory.slope_law import NodeLaw, Points, cauchy_sums, log_sums, slope_law

Rule = tuple[Float[np.ndarray, " nodes"], Float[np.ndarray, " nodes"]]

_SIZES = (12, 24, 48)
_DIGITS = 34.0  # -log of the error of a rule: rounding
_AXES = np.cosh(_DIGITS / 2.0 / np.array(_SIZES[::-1]))  # from where on each rule serves
_PANEL, _ORDER = 0.3, 14  # in units of the activation, whose own scale is one
_BENT = 15.0  # beyond, an activation is straight, or turns (a sine) at extrema that are known
_TURNS = 40  # more extrema than that, as of a sine of huge arguments, and the real axis has no short rule
_BESIDE = np.array([-0.15, -0.06, -0.02, 0.0, 0.02, 0.06, 0.15])
_FEW = 256  # points for which one rule costs less than sorting them by size


@dataclass(frozen=True, eq=False)
class FarNodeLaw(NodeLaw):
    """A `NodeLaw` that answers for w far from its support by the Gauss rules of 12, 24 or 48 of its real nodes.

    s -> s/(w - s) and s -> log(w - s) are analytic within the ellipse through w with foci at the ends of the support,
    of semi-axes' sum rho: the rule of n nodes is exact to rho^-2n, and serves where that is below exp(-34). In deep
    networks subordination holds w off the support but for the neighbourhood of hard edges.

    Fields:
        real: nodes s on the real axis, and weights, good for smooth functions of s.

    Source: Trefethen 2013, Approximation Theory and Approximation Practice, Theorem 19.3, for the ellipse.
    """

    real: Rule = (np.empty(0), np.empty(0))

    @cached_property
    def _rules(self) -> tuple[Rule, ...]:
        # the rule of a rule: polynomials up to twice the size less one do not see the difference
        rules = [gauss_rule(*self.real, _SIZES[-1])]
        for size in _SIZES[-2::-1]:
            rules.append(gauss_rule(*rules[-1], size))
        return tuple(rules[::-1])

    @cached_property
    def _ends(self) -> tuple[float, float]:
        ends = [s for s, _ in self.atoms] + [end for interval in self.ranges for end in interval]
        return min(ends), max(ends)

    def scaled(self, factor: float) -> NodeLaw:
        """The law of factor * s."""
        law = super().scaled(factor)
        real = self.real[0] * factor, self.real[1]
        return FarNodeLaw(law.nodes, law.weights, law.atoms, law.ranges, law.floor, real)

    def thinned(self, drop: float) -> NodeLaw:
        """The law of slopes behind a dropout mask."""
        law, (s, weights) = super().thinned(drop), self.real
        if drop > 0.0:
            s, weights = np.append(0.0, s * (1.0 - drop) ** -2), np.append(drop, (1.0 - drop) * weights)
        return FarNodeLaw(law.nodes, law.weights, law.atoms, law.ranges, law.floor, (s, weights))

    def _sizes(self, w: Points) -> Int[np.ndarray, " points"]:
        """For each point the number of the rule that serves; len(_SIZES) where none does."""
        low, high = self._ends
        # (rho + 1/rho)/2 of the ellipse through w is half the sum of the distances from its foci; NaN counts as near
        axis = np.fmax((np.abs(w - low) + np.abs(w - high)) / (high - low), 0.0)
        return np.asarray(len(_SIZES) - np.searchsorted(_AXES, axis, side="right"))

    def _by_rule(self, w: Points, work: Callable[..., tuple[Points, ...]]) -> tuple[Points, ...]:
        if len(self.nodes) <= _SIZES[-1] or not len(w):
            return work(self.nodes, self.weights, w)
        size = self._sizes(w)
        near = size == len(_SIZES)
        if len(w) <= _FEW:
            # one rule for all that any serves
            size = np.where(near, size, int(size[~near].max(initial=0)))
        parts = [(np.flatnonzero(size == k), rule) for k, rule in enumerate((*self._rules, (self.nodes, self.weights)))]
        parts = [(where, rule) for where, rule in parts if where.size]
        if len(parts) == 1:
            return work(*parts[0][1], w)
        found = [(where, work(*rule, w[where])) for where, rule in parts]
        result = tuple(np.empty(len(w), dtype=complex) for _ in found[0][1])
        for where, values in found:
            for whole, value in zip(result, values, strict=True):
                whole[where] = value
        return result

    def transform(self, w: Points) -> tuple[Points, Points, Points]:
        """M(w) = E[s / (w - s)], 1 + M(w) without cancellation, and M'(w), for Im w >= 0."""
        value, above, slope = self._by_rule(w, cauchy_sums)
        return value, above, slope

    def mean_log(self, w: Points) -> Points:
        """E log(1 - s / w), Im w >= 0; the branch that vanishes at infinity."""
        return self._by_rule(w, lambda *parts: (log_sums(*parts),))[0]


def far_slope_law(activation: Activation, q: float, *, order: int) -> NodeLaw:
    """`slope_law`, with the rules for far arguments where it has many nodes."""
    law = slope_law(activation, q, order=order)
    turns = corners(activation, float(np.sqrt(q)))
    if len(law.nodes) <= _SIZES[-1] or len(turns) > _TURNS:
        return law
    return FarNodeLaw(law.nodes, law.weights, law.atoms, law.ranges, law.floor, _real_rule(activation, q, turns))


def _real_rule(activation: Activation, q: float, corners_of: list[float]) -> Rule:
    """s on the real axis, by panels fine enough for s^95, which peaks sharply at the extrema and kinks of s."""
    deviation = float(np.sqrt(q))
    reach = 9.2 * deviation
    turns = np.array([*corners_of, *activation.kinks])
    near = min(reach, _BENT)
    fine = np.linspace(-near, near, int(2.0 * near / min(_PANEL, deviation)) + 2)
    edges = np.unique(
        np.concatenate(
            [fine, np.linspace(-reach, reach, 64 if reach > near else 2), (turns[:, None] + _BESIDE).ravel()]
        )
    )
    edges = edges[np.abs(edges) <= reach]
    h, weights = panel_rule(edges[np.diff(edges, prepend=-np.inf) > 1e-6 * deviation], deviation, _ORDER)
    s = np.asarray(activation.derivative(h), dtype=np.float64) ** 2
    half = len(s) // 2
    if 2 * half == len(s) and np.allclose(s, s[::-1], rtol=1e-12, atol=0.0):
        # an even s: half of it will do
        s, weights = s[half:], weights[half:] + weights[half - 1 :: -1]
    kept = weights > 1e-17
    return s[kept], weights[kept]
