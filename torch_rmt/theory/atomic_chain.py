"""The law of square layers whose every factor is a few atoms: a free product, with exact gaps and atoms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Complex, Float

from torch_rmt.measures import Discrete, free_mul, free_power
from torch_rmt.measures.base import SpectralMeasure

Points = Complex[np.ndarray, " points"]
Reals = Float[np.ndarray, " points"]

_KNOTS = 96  # of each interval


@dataclass(frozen=True, eq=False)
class AtomicChain:
    """A `Solver` on top of `free_mul`.

    Between atomic factors the density may end like 1 / sqrt(distance) and atoms may stand beside bands or inside a gap:
    the subordination functions of the product say where, and a table along t does not.

    Fields:
        product: the free product of the laws, each scaled to mean one.
    """

    product: SpectralMeasure

    @classmethod
    def of(cls, laws: Sequence[tuple[Discrete, float]]) -> AtomicChain:
        """From laws of mean one and how often each is taken."""
        return cls(free_mul(*(free_power(law, count) for law, count in laws)))

    @cached_property
    def edges(self) -> tuple[tuple[float, float], ...]:
        """(log low, log high) of each interval of the spectrum; -inf for a hard edge at zero."""
        with np.errstate(divide="ignore"):
            return tuple((float(np.log(low)), float(np.log(high))) for low, high in self.product.support())

    def atoms(self) -> tuple[tuple[float, float], ...]:
        """(log location, mass); -inf for an atom at zero."""
        with np.errstate(divide="ignore"):
            return tuple((float(np.log(location)), mass) for location, mass in self.product.atoms())

    def solve(self, t: Reals) -> tuple[np.ndarray, Points]:
        """(no inner unknowns, M) at real t inside the spectrum, NaN outside."""
        inside = np.zeros(t.shape, dtype=bool)
        for low, high in self.edges:
            inside |= (t > low) & (t < high)
        u = np.full(t.shape, np.nan + 0j)
        if inside.any():
            z = np.exp(t[inside]) + 0j
            u[inside] = z * self.product.stieltjes(z) - 1.0
        return np.zeros((0, len(t)), dtype=complex), u

    def solve_above(self, log_z: Points) -> tuple[np.ndarray, Points]:
        """(no inner unknowns, M) at log z with 0 < Im log z <= pi."""
        z = _raised(log_z)
        return np.zeros((0, len(z)), dtype=complex), z * np.asarray(self.product.stieltjes(z)) - 1.0

    def potential(self, log_z: Points, w: np.ndarray, u: Points) -> Points:
        """Integral of log(z - lambda)."""
        value = np.full(log_z.shape, np.nan + 0j)
        known = np.isfinite(u)
        if known.any():
            value[known] = self.product.log_potential(_raised(log_z[known]))
        return value

    def knots(self) -> tuple[np.ndarray, ...]:
        """Ascending t through each interval, closer towards its ends."""
        share = np.sin(np.pi / 2 * (np.arange(_KNOTS) + 0.5) / _KNOTS) ** 2
        ends = [(low if np.isfinite(low) else high - 60.0, high) for low, high in self.edges]
        return tuple(low + (high - low) * share for low, high in ends)


def _raised(log_z: Points) -> Points:
    """z in the closed upper half-plane, the negative axis included."""
    z = np.exp(log_z)
    return np.asarray(z.real + 1j * np.maximum(z.imag, 0.0))
