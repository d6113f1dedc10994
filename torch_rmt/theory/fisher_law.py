"""The law of the Fisher matrix of one hidden layer, as an average over 2 x 2 blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Complex, Float
from numpy.typing import ArrayLike

from torch_rmt.measures.base import Atom, Interval, SpectralMeasure
from torch_rmt.measures.half_plane import fold, unfold
from torch_rmt.theory.rational_curve import log_from_above, log_from_below

_ORDER = 40  # Gauss-Legendre nodes a piece: rounding error at 32 (found by tuning), with a margin


def _mass_below(value: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Distribution function of MP(1) in closed form, l = 4 sin^2(angle)."""
    angle = np.arcsin(np.sqrt(np.clip(value, 0.0, 4.0) / 4.0))
    return np.asarray((2.0 * angle + np.sin(2.0 * angle)) / np.pi)


@dataclass(frozen=True)
class FisherLaw(SpectralMeasure):
    """Law of the Fisher matrix of one hidden layer with all widths equal (Pennington and Worah 2018).

    G(z) = (1/2) E tr (z - B)^-1 with B = zeta v v^T + diag(eta' - zeta, eta - zeta), v = (s2, s1), s_i^2 independent of
    law MP(1): half the spectrum for either layer of weights, coupled through zeta. The two eigenvalues of B interlace
    with the diagonal: one lies between its entries, one above; so the distribution function is a single integral.

    Fields:
        eta: E phi(Z)^2.
        eta_prime: E phi'(Z)^2.
        zeta: (E phi'(Z))^2; at most eta (of the centred phi) and eta'.
    """

    eta: float
    eta_prime: float
    zeta: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.zeta <= min(self.eta, self.eta_prime):
            raise ValueError(
                f"an activation has 0 <= zeta <= min(eta, eta'), "
                f"got eta {self.eta}, eta' {self.eta_prime}, zeta {self.zeta}"
            )
        if self.eta <= 0.0 or self.eta_prime <= 0.0:
            raise ValueError("a constant activation has no Fisher spectrum: eta and eta' must be positive")

    @cached_property
    def _diagonal(self) -> tuple[float, float]:
        first, second = self.eta_prime - self.zeta, self.eta - self.zeta
        return (min(first, second), max(first, second))

    @property
    def _top(self) -> float:
        """Largest eigenvalue of B, at l1 = l2 = 4."""
        low, high = self._diagonal
        return 0.5 * (low + high) + 4.0 * self.zeta + float(np.hypot(0.5 * (high - low), 4.0 * self.zeta))

    def support(self) -> tuple[Interval, ...]:
        """From the smaller diagonal entry up by 4 zeta at most, and from the larger up; where they meet stays an end.

        The density has an inverse square root at the larger entry, so that even where the two meet they are kept apart.
        """
        if self.zeta == 0.0:
            return ()
        low, high = self._diagonal
        bands = ((low, min(low + 4.0 * self.zeta, high)), (high, self._top))
        return bands if high > low else bands[1:]

    def atoms(self) -> tuple[Atom, ...]:
        """Half the mass at the common diagonal entry where eta = eta' (linear: at zero); two atoms where zeta = 0."""
        low, high = self._diagonal
        if self.zeta == 0.0:
            return ((low, 0.5), (high, 0.5)) if high > low else ((low, 1.0),)
        return ((low, 0.5),) if high == low else ()

    def _rule(self, x: Float[np.ndarray, " n"]) -> tuple[Float[np.ndarray, "n nodes"], Float[np.ndarray, "n nodes"]]:
        """Values l1 and weights of MP(1), split at each x where t(l1) passes 0 or 4, and graded there.

        l1 = 4 sin^2(angle), of density (4/pi) cos^2; t is linear in l1, so the splits are known.
        """
        a, b = self._diagonal
        with np.errstate(all="ignore"):
            zero = (x - b) / self.zeta
            four = ((x - a) / self.zeta - 4.0) * (x - b) / (x - a)
        cuts = np.stack([np.zeros_like(x), zero, four, np.full_like(x, 4.0)], axis=1)
        cuts = np.sort(np.clip(np.nan_to_num(cuts, nan=0.0, posinf=4.0, neginf=0.0), 0.0, 4.0), axis=1)
        angles = np.arcsin(np.sqrt(cuts / 4.0))
        nodes, weights = np.polynomial.legendre.leggauss(_ORDER)
        turn = 0.5 * np.pi * (nodes + 1.0)
        unit, slope = 0.5 * (1.0 - np.cos(turn)), 0.25 * np.pi * np.sin(turn) * weights
        length = np.diff(angles, axis=1)[:, :, None]
        angle = (angles[:, :-1, None] + length * unit).reshape(len(x), -1)
        weight = (length * slope).reshape(len(x), -1) * (4.0 / np.pi) * np.cos(angle) ** 2
        return 4.0 * np.sin(angle) ** 2, weight

    def _t(self, z: np.ndarray, ell: Float[np.ndarray, "n nodes"]) -> tuple[np.ndarray, np.ndarray]:
        """t and dt/dz, where det(z - B) = zeta (z - b)(t - l2)."""
        a, b = self._diagonal
        with np.errstate(all="ignore"):
            t = (z - a) * (1.0 / self.zeta - ell / (z - b))
            slope = 1.0 / self.zeta + ell * (b - a) / (z - b) ** 2
        return t, slope

    def stieltjes(self, z: ArrayLike) -> Complex[np.ndarray, "..."]:
        """G(z) = (1/2) [1/(z - b) + E t'(z) g(t)], g the Stieltjes transform of MP(1): the average over l2 is exact."""
        flat, below = fold(np.asarray(z, dtype=complex).ravel())
        _, b = self._diagonal
        if self.zeta == 0.0:
            with np.errstate(all="ignore"):
                value = np.asarray(sum(mass / (flat - location) for location, mass in self.atoms()))
        else:
            ell, weight = self._rule(flat.real)
            t, slope = self._t(flat[:, None], ell)
            with np.errstate(all="ignore"):
                g = _transform_of_unit_law(t)
                value = 0.5 * (1.0 / (flat - b) + (weight * slope * g).sum(axis=1))
        return unfold(value, below).reshape(np.shape(z))

    def log_potential(self, z: ArrayLike) -> Complex[np.ndarray, "..."]:
        """E log(z - t) over the law: the logarithm of the determinant, averaged over l2 in closed form."""
        flat, below = fold(np.asarray(z, dtype=complex).ravel())
        _, b = self._diagonal
        if self.zeta == 0.0:
            value = np.asarray(sum(mass * log_from_above(flat - location) for location, mass in self.atoms()))
        else:
            ell, weight = self._rule(flat.real)
            t, _ = self._t(flat[:, None], ell)
            g = _transform_of_unit_law(t)
            inner = log_from_above(1.0 - g) - log_from_below(g) + g / (1.0 - g)
            value = 0.5 * (log_from_above(flat - b) + np.log(self.zeta) + (weight * inner).sum(axis=1))
        return unfold(value, below).reshape(np.shape(z))

    def density(self, x: ArrayLike) -> Float[np.ndarray, "..."]:
        """Density of the continuous part: (1/2) E t'(x) rho(t), rho the density of MP(1)."""
        points = np.asarray(x, dtype=float)
        inside = np.zeros(points.shape, dtype=bool)
        for low, high in self.support():
            inside |= (points > low) & (points < high)
        value = np.zeros(points.shape)
        if inside.any():
            at = points[inside]
            ell, weight = self._rule(at)
            t, slope = self._t(at[:, None], ell)
            within = (t > 0.0) & (t < 4.0)
            safe = np.where(within, t, 4.0)
            rho = np.sqrt(np.maximum(4.0 - safe, 0.0) / safe) / (2.0 * np.pi)
            value[inside] = 0.5 * (weight * slope * rho).sum(axis=1)
        return value

    def cdf(self, x: ArrayLike) -> Float[np.ndarray, "..."]:
        """F(x) = (1/2) [1{x >= b} + E F_MP(t(x, l1))]: one integral of a closed form."""
        points = np.asarray(x, dtype=float)
        flat = points.ravel()
        _, b = self._diagonal
        if self.zeta == 0.0:
            value = sum(mass * (flat >= location) for location, mass in self.atoms())
            return np.asarray(value, dtype=float).reshape(points.shape)
        value = np.where(flat >= b, 0.5, 0.0)
        away = flat != b
        if away.any():
            ell, weight = self._rule(flat[away])
            t, _ = self._t(flat[away][:, None], ell)
            value[away] += 0.5 * np.clip((weight * _mass_below(t)).sum(axis=1), 0.0, 1.0)
        low, high = self.bounds()
        value = np.where(flat >= high, 1.0, np.where(flat < low, 0.0, value))
        return np.asarray(value.reshape(points.shape))

    def moment(self, k: int) -> float:
        """Moment of order k; the mean is (eta + eta')/2 exactly."""
        if k == 1:
            return 0.5 * (self.eta + self.eta_prime)
        if self.zeta == 0.0:
            return float(sum(mass * location**k for location, mass in self.atoms()))
        return super().moment(k)


def _transform_of_unit_law(t: np.ndarray) -> Complex[np.ndarray, "..."]:
    """Stieltjes transform of MP(1), 2/(t (1 + sqrt(1 - 4/t))), from above the axis."""
    t = np.asarray(t, dtype=complex)
    with np.errstate(all="ignore"):
        return np.asarray(2.0 / (t + np.sqrt(t - 4.0) * np.sqrt(t)))
