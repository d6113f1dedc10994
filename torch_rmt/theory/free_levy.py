"""Freely infinitely divisible laws with finitely many jumps: sums of free Wisharts, a Wigner and a constant."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Complex
from numpy.typing import ArrayLike

from torch_rmt.measures.base import Atom
from torch_rmt.theory.rational_curve import (
    Polynomial,
    RationalCurveLaw,
    log_from_above,
    log_from_below,
    plus,
    strip,
)


@dataclass(frozen=True)
class FreeLevy(RationalCurveLaw):
    """Law with R(g) = drift + gaussian g + sum over (size, rate) of rate size / (1 - size g).

    A jump of given size and rate is a free Poisson law (rate size + ... Marchenko-Pastur of ratio 1/rate and variance
    rate size); `gaussian` is the variance of a free semicircle. z = R(G) + 1/G is rational in G and, the law being
    freely infinitely divisible, G is the only root of the lower half-plane (Bercovici-Voiculescu 1993).

    Raises:
        ValueError: a negative gaussian variance or rate, or no term besides the drift.

    >>> law = FreeLevy(gaussian=1.0)                     # the semicircle
    >>> law.support()
    ((-2.0, 2.0),)
    """

    drift: float = 0.0
    gaussian: float = 0.0
    jumps: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if self.gaussian < 0.0 or any(rate < 0.0 for _, rate in self.jumps):
            raise ValueError("a free Levy law needs gaussian >= 0 and every rate >= 0")
        if self.gaussian == 0.0 and not any(size != 0.0 and rate > 0.0 for size, rate in self.jumps):
            raise ValueError("the law is a point mass: give a gaussian part or a jump, or use PointMass")

    @cached_property
    def _curves(self) -> tuple[tuple[Polynomial, Polynomial], ...]:
        top, bottom = strip([self.gaussian, self.drift]), np.array([1.0])
        for size, rate in self.jumps:
            factor = np.array([-size, 1.0])
            top = plus(np.polymul(top, factor), rate * size * bottom)
            bottom = np.polymul(bottom, factor)
        s = np.array([1.0, 0.0])
        return ((plus(np.polymul(top, s), bottom), np.polymul(bottom, s)),)

    def atoms(self) -> tuple[Atom, ...]:
        """The atom at the drift, of mass 1 - sum of rates where that is positive and there is no Gaussian part."""
        mass = 1.0 - sum(rate for size, rate in self.jumps if size != 0.0)
        return ((self.drift, mass),) if self.gaussian == 0.0 and mass > 0.0 else ()

    def r_transform(self, g: ArrayLike) -> Complex[np.ndarray, "..."]:
        """R(g), so that R(G(z)) + 1/G(z) = z."""
        point = np.asarray(g, dtype=complex)
        value = self.drift + self.gaussian * point
        for size, rate in self.jumps:
            value = value + rate * size / (1.0 - size * point)
        return value

    def free_cumulant(self, k: int) -> float:
        """Free cumulant of order k >= 1: the sum of rate size^k, with the drift and the Gaussian at orders 1 and 2."""
        jumps = sum(rate * size**k for size, rate in self.jumps)
        return jumps + (self.drift if k == 1 else 0.0) + (self.gaussian if k == 2 else 0.0)

    def _transform(self, s: Complex[np.ndarray, "..."], z: Complex[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
        return s

    def _potential(self, s: Complex[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
        # zG - 1 - integral of z dG, term by term
        value = 0.5 * self.gaussian * s**2 - log_from_below(s)
        for size, rate in self.jumps:
            gap = 1.0 - size * s
            log = log_from_above(gap) if size > 0 else log_from_below(gap)
            value = value + rate * (size * s / gap + log)
        return np.asarray(value)
