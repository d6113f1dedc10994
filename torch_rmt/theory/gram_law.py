"""The law of a sample covariance whose population is itself a Wishart plus a constant: the Gram law without bias."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Complex

from torch_rmt.measures.base import Atom
from torch_rmt.theory.free_levy import FreeLevy
from torch_rmt.theory.rational_curve import (
    Polynomial,
    RationalCurveLaw,
    log_from_above,
    log_from_below,
    plus,
)


@dataclass(frozen=True)
class SampleCovarianceLaw(RationalCurveLaw):
    """Free product of Marchenko-Pastur(ratio) and the law of drift + free Poisson jumps.

    The parameter s is the Stieltjes transform of the population at its subordination point. With u = s R(s), R the
    R-transform of the population, w = (1 + u)/s, z = w (1 + ratio u), G = s/(1 + ratio u). Physical: s below the axis,
    w and z above it.

    Fields:
        ratio: dimension / samples.
        drift, jumps: the population, as in `FreeLevy`; sizes positive.

    For the Gram matrix of Pennington and Worah 2017 this is their quartic, uniformised: drift = eta - zeta, one jump of
    size zeta/psi and rate psi, ratio = phi/psi. For every z > 0 two of the four roots are real, beyond the pole of the
    population; so at most one pair is complex, and it is the physical one.
    """

    ratio: float
    drift: float
    jumps: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if not (np.isfinite(self.ratio) and self.ratio > 0.0):
            raise ValueError(f"ratio = dimension/samples must be positive and finite, got {self.ratio}")
        if self.drift < 0.0 or any(size <= 0.0 or rate <= 0.0 for size, rate in self.jumps):
            raise ValueError("the population must be positive: drift >= 0, jump sizes and rates > 0")
        if self.drift == 0.0 and not self.jumps:
            raise ValueError("the population is zero, and so is the matrix: use PointMass(0.0)")

    @cached_property
    def _mean_part(self) -> tuple[Polynomial, Polynomial]:
        """u = s R(s) as numerator and denominator."""
        top, bottom = np.array([self.drift]), np.array([1.0])
        for size, rate in self.jumps:
            factor = np.array([-size, 1.0])
            top = plus(np.polymul(top, factor), rate * size * bottom)
            bottom = np.polymul(bottom, factor)
        return np.polymul(top, [1.0, 0.0]), bottom

    @cached_property
    def _curves(self) -> tuple[tuple[Polynomial, Polynomial], ...]:
        top, bottom = self._mean_part
        s = np.array([1.0, 0.0])
        first = plus(top, bottom)
        second = plus(self.ratio * top, bottom)
        return (
            (first, np.polymul(bottom, s)),
            (np.polymul(first, second), np.polymul(np.polymul(bottom, bottom), s)),
        )

    def atoms(self) -> tuple[Atom, ...]:
        """The atom at zero of the rank: 1 - 1/ratio, or what the population lacks."""
        lacking = 1.0 - sum(rate for _, rate in self.jumps) if self.drift == 0.0 else 0.0
        mass = max(0.0, 1.0 - 1.0 / self.ratio, lacking)
        return ((0.0, mass),) if mass > 0.0 else ()

    @property
    def population(self) -> FreeLevy:
        """Law of the population covariance."""
        return FreeLevy(drift=self.drift, jumps=self.jumps)

    def _u(self, s: Complex[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
        value = self.drift * s
        for size, rate in self.jumps:
            value = value + rate * size * s / (1.0 - size * s)
        return value

    def _transform(self, s: Complex[np.ndarray, "..."], z: Complex[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
        with np.errstate(all="ignore"):
            return np.asarray(s / (1.0 + self.ratio * self._u(s)))

    def _potential(self, s: Complex[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
        u = self._u(s)
        value = 2.0 * u - self.drift * s - log_from_below(s)
        if self.ratio != 1.0:
            value = value + (1.0 - 1.0 / self.ratio) * log_from_below(1.0 + self.ratio * u)
        for size, rate in self.jumps:
            value = value + rate * log_from_above(1.0 - size * s)
        return np.asarray(value)

    def outlier(self, strength: float) -> float | None:
        """Eigenvalue that a rank-one mean of squared singular value `strength` pulls out of the bulk, or None.

        A spike `strength` of the population, spread evenly: strength G_population(w) = 1, i.e. z at s = 1/strength.
        """
        _, (_, critical) = self._gaps[-1]
        if strength * critical <= 1.0:
            return None
        top, bottom = self._curves[-1]
        return float(np.polyval(top, 1.0 / strength) / np.polyval(bottom, 1.0 / strength))
