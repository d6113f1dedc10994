"""Sums of free rectangular matrices: the law of (A + B)^T (A + B)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Complex, Float

from torch_rmt.measures.base import Atom, Interval, SpectralMeasure
from torch_rmt.measures.classical import MarchenkoPastur
from torch_rmt.measures.convolution import FreeConvolution
from torch_rmt.measures.cumulants import moments_from_rectangular_cumulants, rectangular_cumulants
from torch_rmt.measures.discrete import PointMass
from torch_rmt.measures.edges import Points
from torch_rmt.measures.geometry import Factor
from torch_rmt.measures.rectangular_solver import RectangularGeometry, solve_rectangular
from torch_rmt.measures.subordination import Subordination

_FLOOR = 1e-20  # of the hull: the smallest point at which it is asked for
_GAPPED = 1e-10  # the same where M comes to -1 across a gap: nothing is there
_REAL = 1e-13  # relative imaginary part that is rounding


class RectangularSum(FreeConvolution):
    """Law of a sum of free rectangular matrices; `rectangular_sum` makes it."""

    geometry: RectangularGeometry

    def __init__(self, factors: tuple[Factor, ...], n_in: float | int, n_out: float | int) -> None:
        self.n_in, self.n_out = n_in, n_out
        smaller, larger = sorted((float(n_in), float(n_out)))
        self.geometry = RectangularGeometry(factors, smaller / larger, n_in / smaller)

    def __repr__(self) -> str:
        parts = ", ".join(f"{f.count:g} x {f.law!r}" for f in self.factors)
        return f"rectangular sum, {self.n_in:g} to {self.n_out:g}, of {parts}"

    @cached_property
    def hull(self) -> Interval:
        """From 0 to the square of the sum of the largest singular values."""
        return 0.0, self.geometry.scale**2

    @cached_property
    def residual(self) -> float:
        """Largest error of the equations, in logarithms, at the points of the mesh."""
        return float(self._solve(self._off_atoms(self.mesh.x).astype(complex), self.mesh).residual.max())

    def _solve(self, z: Complex[np.ndarray, " n"], known: Points | None = None) -> Subordination:
        known = known or self.__dict__.get("mesh")
        return solve_rectangular(self.geometry, z, None if known is None else (known.x, known.coordinates))

    @cached_property
    def _least(self) -> float:
        gapped = (
            self.geometry.ratio < 1.0
            and 1.0 - sum(f.count * r for f, r in zip(self.factors, self._ranks, strict=True)) < 1e-9
        )
        return (_GAPPED if gapped else _FLOOR) * self.hull[1]

    def _off_zero(self, z: Complex[np.ndarray, " n"]) -> Complex[np.ndarray, " n"]:
        return np.where(np.abs(z) < self._least, self._least, z)

    def _off_atoms(self, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return np.asarray(np.maximum(super()._off_atoms(x), self._least))

    def _transform(self, z: Complex[np.ndarray, " n"], s: Subordination) -> tuple[np.ndarray, np.ndarray]:
        m, slope = s.common / self.geometry.lift, s.slope / self.geometry.lift
        return (1.0 + m) / z, (slope - (1.0 + m)) / z**2

    def _potential(self, z: Complex[np.ndarray, " n"], s: Subordination) -> np.ndarray:
        """(1 + M) log z - integral of log z over M; log z is (1 + M)(1 + ratio M) / h, the M add up at one h."""
        g, r, y = self.geometry, self.geometry.ratio, self.geometry.coordinate(z)
        a, u = g.transforms(s.coordinates)[0], s.common
        omega = g.omegas(y, a)
        log_y = np.log(y)
        # (1 + ratio u, 1 + u) / y are Stieltjes transforms, below the axis; the omegas are above it
        wide, narrow = _log_below((1.0 + r * u) / y), _log_below((1.0 + u) / y)
        total = _integral(u, wide + log_y, narrow + log_y, r)
        value = 2.0 * (g.lift + u) * log_y - total
        for f, one, w, at, (first, second) in zip(
            self.factors, a, s.points, s.coordinates, np.swapaxes(omega, 0, 1), strict=True
        ):
            log_w = 2.0 * _log_above(at)
            own = f.law.log_potential(w)
            own = np.where((at.real < 0) & (w.imag == 0), np.conj(own), own)  # a real w that has gone round zero
            own = own + 2j * np.pi * (log_w.imag > np.pi + 1e-9)
            inner = _integral(one, wide + _log_above(first), narrow + _log_above(second), r)
            value = value + f.count * (inner - (g.lift + one) * log_w + g.lift * own)
        return np.asarray(value / g.lift)

    @cached_property
    def _ranks(self) -> tuple[float, ...]:
        """Of each law's matrix, over the smaller dimension, taken once."""
        zero = [sum(mass for location, mass in f.law.atoms() if location == 0.0) for f in self.factors]
        return tuple(self.geometry.lift * (1.0 - mass) for mass in zero)

    def atoms(self) -> tuple[Atom, ...]:
        """At 0 what the ranks leave, added up; elsewhere atoms of one law less twice the rank of all the others.

        A vector x that A maps to theta stays one where the others vanish on x, and their transposes on A x.
        """
        total = sum(f.count * rank for f, rank in zip(self.factors, self._ranks, strict=True))
        lift = self.geometry.lift
        kernel = 1.0 - min(1.0, total) / lift
        found = {0.0: kernel} if kernel > 1e-13 else {}
        for f, rank in zip(self.factors, self._ranks, strict=True):
            for location, mass in f.law.atoms():
                left = mass - 2.0 * (total - rank) / lift
                if location > 0 and left > 1e-13:
                    found[location] = found.get(location, 0.0) + left
        return tuple(sorted(found.items()))

    def moments(self, count: int) -> Float[np.ndarray, " n"]:
        """From the rectangular cumulants, which add."""
        lift, ratio = self.geometry.lift, self.geometry.ratio
        total = np.zeros(count)
        for f in self.factors:
            total = total + f.count * rectangular_cumulants(lift * f.law.moments(count), ratio)
        return moments_from_rectangular_cumulants(total, ratio) / lift

    def moment(self, k: int) -> float:
        """From the rectangular cumulants, which add."""
        if k < 0:
            raise ValueError(f"moments are defined here for k >= 0, got k = {k}")
        return float(self.moments(k)[-1]) if k else 1.0


def _integral(a: np.ndarray, wide: np.ndarray, narrow: np.ndarray, ratio: float) -> np.ndarray:
    """Integral of log(1 + a) + log(1 + ratio a) from 0; the logarithms are given, on their right branch."""
    with np.errstate(all="ignore"):
        first = np.where(a == -1.0, 0.0, (1.0 + a) * narrow)
        second = np.where(ratio * a == -1.0, 0.0, (1.0 / ratio + a) * wide)
    return np.asarray(first + second - 2.0 * a)


def _log_above(x: np.ndarray) -> np.ndarray:
    """Logarithm of points of the closed upper half-plane but for rounding."""
    angle = np.angle(x)
    angle = np.where(np.abs(x.imag) <= _REAL * np.abs(x), np.where(x.real < 0, np.pi, 0.0), angle)
    return np.asarray(np.log(np.abs(x)) + 1j * np.where(angle < 0, np.where(x.real < 0, np.pi, 0.0), angle))


def _log_below(x: np.ndarray) -> np.ndarray:
    """Logarithm of points of the closed lower half-plane but for rounding."""
    return np.asarray(np.conj(_log_above(np.conj(x))))


def rectangular_sum(laws: Sequence[SpectralMeasure], widths: Sequence[int | float]) -> SpectralMeasure:
    """Law of (A_1 + ... + A_K)^T (A_1 + ... + A_K), free rectangular matrices from width n_in to width n_out.

    `laws[k]` is the law of A_k^T A_k, of the dimension of the input, `widths[0]`; `widths[1]` is that of the output.
    With M = z G - 1 and h = (1 + M)(1 + (n_in / n_out) M) / z the M add at equal h: M(h) = M_1(h) + ... + M_K(h).
    For equal widths h = G(sqrt z)^2 of the symmetrised singular laws, which then add freely.
    Source: Benaych-Georges 2009 (M as a function of h is his rectangular R-transform); solved by operator-valued
    subordination, Belinschi, Mai and Speicher 2017.

    Raises:
        ValueError: if there are not two widths, a width is not positive, a law reaches below zero, or its atom at 0 is
            smaller than its shape forces (a matrix to a narrower space has a kernel).

    >>> law = rectangular_sum([MarchenkoPastur(0.5), MarchenkoPastur(0.5, 2.0)], [100, 200])  # two Gaussian matrices
    >>> law
    MarchenkoPastur(ratio=0.5, variance=3.0)
    >>> round(rectangular_sum([PointMass(1.0), MarchenkoPastur(0.5, 2.0)], [100, 200]).mean, 12)
    3.0
    """
    if len(widths) != 2 or not laws:
        raise ValueError(f"a rectangular sum needs at least one law and two widths, got {len(laws)} and {len(widths)}")
    n_in, n_out = widths
    if any(not (np.isfinite(width) and width > 0) for width in widths):
        raise ValueError(f"widths must be positive, got {list(widths)}")
    ratio, gaussian, factors = n_in / n_out, 0.0, []
    queue: list[tuple[SpectralMeasure, float]] = [(law, 1.0) for law in laws]
    while queue:
        law, count = queue.pop(0)
        if law.bounds()[0] < 0:
            raise ValueError(f"{law!r} is no law of A^T A: it reaches below zero")
        kernel = sum(mass for location, mass in law.atoms() if location == 0.0)
        if kernel < 1.0 - 1.0 / ratio - 1e-9:
            raise ValueError(
                f"{law!r} has mass {kernel:g} at 0, but a matrix from width {n_in} to {n_out} has at least "
                f"{1 - 1 / ratio:g}: pass the law of A^T A, of the dimension of its input"
            )
        if kernel > 1.0 - 1e-15:
            continue
        if isinstance(law, MarchenkoPastur) and abs(law.ratio / ratio - 1.0) < 1e-12:
            gaussian += count * law.scale
        elif isinstance(law, RectangularSum) and abs(law.n_in / law.n_out / ratio - 1.0) < 1e-12:
            queue = [(f.law, f.count * count) for f in law.factors] + queue
        else:
            factors.append(Factor(law, count))
    if gaussian > 0:
        factors.append(Factor(MarchenkoPastur(ratio, gaussian)))
    if not factors:
        return PointMass(0.0)
    merged: dict[int, Factor] = {}
    for f in factors:
        count = f.count + (merged[id(f.law)].count if id(f.law) in merged else 0.0)
        merged[id(f.law)] = Factor(f.law, count)
    kept = tuple(merged.values())
    return kept[0].law if len(kept) == 1 and kept[0].count == 1.0 else RectangularSum(kept, n_in, n_out)
