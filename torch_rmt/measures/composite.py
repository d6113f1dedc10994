"""Laws made of laws: affine images and mixtures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Complex, Float

from torch_rmt.measures.base import Atom, Interval, SpectralMeasure
from torch_rmt.measures.classical import Arcsine, MarchenkoPastur, Semicircle, finite
from torch_rmt.measures.convolution import FreeProduct, FreeSum
from torch_rmt.measures.discrete import Discrete, PointMass
from torch_rmt.measures.geometry import Factor
from torch_rmt.measures.half_plane import Numbers, fold, unfold


class Affine(SpectralMeasure):
    """Law of scale * X + shift for X of law `base`, scale not 0."""

    def __init__(self, base: SpectralMeasure, scale: float | int, shift: float | int = 0.0) -> None:
        self.scale, self.shift = finite("scale", scale), finite("shift", shift)
        if scale == 0:
            raise ValueError("an affine image with scale 0 is a PointMass; use that")
        self.base = base

    def __repr__(self) -> str:
        return f"Affine({self.base!r}, scale={self.scale}, shift={self.shift})"

    @property
    def residual(self) -> float:
        """That of the base."""
        return self.base.residual

    def _back(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        points = np.asarray(z, dtype=complex)
        moved = (points - self.shift) / self.scale
        if self.scale < 0:  # a point of the axis stands for its upper side, which this map turns into the lower
            axis = points.imag == 0
            moved = np.where(axis, moved.real, moved)
        return np.asarray(moved)

    def _flip(self, z: Numbers, values: Complex[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
        if self.scale > 0:
            return values
        axis = np.asarray(np.asarray(z, dtype=complex).imag == 0)
        return np.asarray(np.where(axis, np.conj(values), values))

    def stieltjes(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G(z) = G_base((z - shift) / scale) / scale."""
        return np.asarray(self._flip(z, self.base.stieltjes(self._back(z))) / self.scale)

    def slope(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G'(z) = G_base'((z - shift) / scale) / scale^2."""
        return np.asarray(self._flip(z, self.base.slope(self._back(z))) / self.scale**2)

    def log_potential(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """L(z) = log scale + L_base((z - shift) / scale), with the branch that is real at +infinity."""
        points, below = fold(z)
        value = np.log(abs(self.scale)) + self._flip(points, self.base.log_potential(self._back(points)))
        return unfold(np.asarray(value if self.scale > 0 else value + 1j * np.pi), below)

    def support(self) -> tuple[Interval, ...]:
        """Images of the intervals."""
        ends = [sorted((self.scale * a + self.shift, self.scale * b + self.shift)) for a, b in self.base.support()]
        return tuple((a, b) for a, b in sorted(ends))

    def atoms(self) -> tuple[Atom, ...]:
        """Images of the atoms."""
        return tuple(sorted((self.scale * t + self.shift, p) for t, p in self.base.atoms()))

    def bounds(self) -> Interval:
        """Image of the hull."""
        low, high = sorted(self.scale * end + self.shift for end in self.base.bounds())
        return low, high

    def density(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """Density of the base at (x - shift) / scale, over |scale|."""
        points = np.asarray(x, dtype=float)
        return np.asarray(self.base.density((points - self.shift) / self.scale) / abs(self.scale))

    def cdf(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """F_base at the point that maps to x, reflected for a negative scale."""
        points = (np.asarray(x, dtype=float) - self.shift) / self.scale
        values = self.base.cdf(points)
        if self.scale > 0:
            return values
        for location, mass in self.base.atoms():
            values = values - mass * (points == location)
        return np.asarray(1.0 - values)

    def quantile(self, p: Numbers) -> Float[np.ndarray, "..."]:
        """Image of the base's quantile."""
        if self.scale > 0:
            return np.asarray(self.scale * self.base.quantile(p) + self.shift)
        return super().quantile(p)

    def moment(self, k: int) -> float:
        """Binomial sum of the base's moments."""
        if k < 0:
            raise ValueError(f"moments are defined here for k >= 0, got k = {k}")
        shifted = np.polynomial.polynomial.polypow([self.shift, self.scale], k)
        return float(sum(c * self.base.moment(j) for j, c in enumerate(shifted) if c != 0.0))


def affine(measure: SpectralMeasure, scale: float | int, shift: float | int = 0.0) -> SpectralMeasure:
    """Law of scale * X + shift, in closed form where the family is closed under it.

    >>> affine(Semicircle(), 2.0, 1.0)
    Semicircle(variance=4.0, mean=1.0)
    """
    scale, shift = finite("scale", scale), finite("shift", shift)
    if scale == 1.0 and shift == 0.0:
        return measure
    match measure:
        case _ if scale == 0.0:
            return PointMass(shift)
        case PointMass():
            return PointMass(scale * measure.location + shift)
        case Discrete():
            return Discrete(scale * measure.nodes + shift, measure.weights)
        case Semicircle():
            return Semicircle(measure.variance * scale**2, measure.mean * scale + shift)
        case MarchenkoPastur() if scale > 0 and shift == 0:
            return MarchenkoPastur(measure.ratio, measure.scale * scale)
        case Arcsine():
            low, high = sorted((scale * measure.low + shift, scale * measure.high + shift))
            return Arcsine(low, high)
        case Affine():
            return affine(measure.base, scale * measure.scale, scale * measure.shift + shift)
        case FreeSum():  # into the summands, so that the result still is a free sum
            first, *rest = measure.factors
            moved = Factor(affine(first.law, scale, shift / first.count), first.count)
            return FreeSum((moved, *(Factor(affine(f.law, scale), f.count) for f in rest)))
        case FreeProduct() if scale > 0 and shift == 0:
            first, *rest = measure.factors
            moved = Factor(affine(first.law, scale ** (1.0 / first.count)), first.count, first.dimension)
            return FreeProduct((moved, *rest))
        case _:
            return Affine(measure, scale, shift)


def dilate(measure: SpectralMeasure, factor: float | int) -> SpectralMeasure:
    """Law of factor * X.

    >>> dilate(MarchenkoPastur(0.5), 3.0).mean
    3.0
    """
    return affine(measure, factor)


class Mixture(SpectralMeasure):
    """Weighted sum of laws, weights >= 0 and normalised to sum one."""

    def __init__(self, parts: Sequence[SpectralMeasure], weights: Numbers | None = None) -> None:
        share = np.ones(len(parts)) if weights is None else np.array(weights, dtype=float).ravel()
        if len(parts) == 0 or share.size != len(parts):
            raise ValueError(f"a mixture needs one weight a part: {len(parts)} parts, {share.size} weights")
        if not np.all(np.isfinite(share)) or np.any(share < 0) or share.sum() <= 0:
            raise ValueError("a mixture needs finite weights >= 0 with a positive sum: a law has no negative mass")
        kept = np.flatnonzero(share > 0)
        self.parts: tuple[SpectralMeasure, ...] = tuple(parts[i] for i in kept.tolist())
        self.weights: Float[np.ndarray, " n"] = share[kept] / share.sum()

    def __repr__(self) -> str:
        return f"Mixture({list(self.parts)!r}, {self.weights.tolist()})"

    @property
    def residual(self) -> float:
        """Largest of the parts' residuals."""
        return max(part.residual for part in self.parts)

    def stieltjes(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """Weighted sum of the parts' transforms."""
        return np.asarray(sum(w * part.stieltjes(z) for w, part in zip(self.weights, self.parts, strict=True)))

    def slope(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """Weighted sum of the parts' slopes."""
        return np.asarray(sum(w * part.slope(z) for w, part in zip(self.weights, self.parts, strict=True)))

    def log_potential(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """Weighted sum of the parts' potentials."""
        return np.asarray(sum(w * part.log_potential(z) for w, part in zip(self.weights, self.parts, strict=True)))

    def support(self) -> tuple[Interval, ...]:
        """Union of the parts' intervals, overlaps merged."""
        merged: list[Interval] = []
        for low, high in sorted(interval for part in self.parts for interval in part.support()):
            if merged and low <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            else:
                merged.append((low, high))
        return tuple(merged)

    def atoms(self) -> tuple[Atom, ...]:
        """The parts' atoms, masses at equal places added."""
        total: dict[float, float] = {}
        for w, part in zip(self.weights, self.parts, strict=True):
            for location, mass in part.atoms():
                total[location] = total.get(location, 0.0) + float(w) * mass
        return tuple(sorted(total.items()))

    def density(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """Weighted sum of the parts' densities."""
        return np.asarray(sum(w * part.density(x) for w, part in zip(self.weights, self.parts, strict=True)))

    def cdf(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """Weighted sum of the parts' distribution functions."""
        return np.asarray(sum(w * part.cdf(x) for w, part in zip(self.weights, self.parts, strict=True)))

    def moment(self, k: int) -> float:
        """Weighted sum of the parts' moments."""
        return float(sum(w * part.moment(k) for w, part in zip(self.weights, self.parts, strict=True)))
