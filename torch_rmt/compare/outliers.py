"""Eigenvalues beyond the edges of a law, each with the margin that says whether it means anything."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from torch_rmt.compare.distances import Tabulated
from torch_rmt.compare.report import Outlier

# A soft edge at E, where the law has mass 1/n within s of E, puts the largest of n eigenvalues at
# E + (s / 2.81) T with T of Tracy-Widom's law (real case: mean -1.21, standard deviation 1.27).
_TRACY_WIDOM_UNIT = 1.27 / 2.81
_SIGNIFICANT = 4.0


def find_outliers(
    nodes: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
    table: Tabulated,
    *,
    dim: int,
    noise: float,
    zero: float = 0.0,
) -> tuple[Outlier, ...]:
    """Return the eigenvalues that lie beyond either end of the law by more than noise moves an extreme one.

    The unit of the margin is the standard deviation of the extreme of `dim` eigenvalues at a soft edge (Tracy
    and Widom), joined by what a Kolmogorov distance of `noise` moves the law's end by, and by rounding. Nodes
    closer to each other than a hundredth of themselves count as one.

    Args:
        nodes, weights: the measurement, ascending, weights summing to one.
        table: the prediction.
        dim: number of eigenvalues.
        noise: Kolmogorov distance that finite width and probes give.
        zero: what is smaller counts as zero.

    Source of the edge law: Tracy and Widom 1996; the rule on noise is our own.
    """
    low, high = table.law.bounds()
    q = [table.quantile(p) for p in (1 / dim, min(noise, 0.5), 1 - min(noise, 0.5), 1 - 1 / dim)]
    rounding = 1e-5 * max(abs(low), abs(high)) + zero
    below = _unit(q[0] - low, q[1] - low, rounding)
    above = _unit(high - q[3], high - q[2], rounding)
    found = []
    for edge, unit, beyond in ((low, below, low - nodes), (high, above, nodes - high)):
        at = np.flatnonzero(beyond > _SIGNIFICANT * unit)
        for group in _clusters(nodes[at]):
            members = at[group]
            mass = float(weights[members].sum())
            location = float((weights[members] * nodes[members]).sum() / mass)
            found.append(Outlier(location, mass, float(edge), float(abs(location - edge) / unit)))
    return tuple(sorted(found, key=lambda o: -o.margin))


def _unit(spacing: float, shift: float, rounding: float) -> float:
    return float(np.hypot(np.hypot(_TRACY_WIDOM_UNIT * max(spacing, 0), max(shift, 0)), rounding))


def _clusters(values: Float[np.ndarray, " n"]) -> list[Float[np.ndarray, " m"] | np.ndarray]:
    """Indices of neighbours (in ascending order) that lie within a hundredth of each other."""
    if values.size == 0:
        return []
    breaks = np.flatnonzero(np.diff(values) > 0.01 * np.abs(values[:-1])) + 1
    return list(np.split(np.arange(values.size), breaks))
