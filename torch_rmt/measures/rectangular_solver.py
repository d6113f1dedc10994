"""Subordination for sums of rectangular matrices: one scalar unknown a law, certified in the plane of both dimensions.

Let a_i be M = z G - 1 of the i-th law in the smaller dimension, at its own point w_i, and ratio <= 1 the smaller
dimension over the larger one, in which M is ratio * a_i. With y = sqrt(z) and s_i = sqrt(w_i), both in the upper
half-plane, the sum with u = sum_i n_i a_i obeys

    s_i^2 / ((1 + a_i)(1 + ratio a_i)) = y^2 / ((1 + u)(1 + ratio u))    for all i.

The 2 x 2 block matrices [[0, A_i], [A_i^T, 0]] are free with amalgamation over the diagonal; their subordination
functions are the pairs omega_i = y ((1 + ratio a_i)/(1 + ratio u), (1 + a_i)/(1 + u)), both with Im omega >= Im y.
Off the axis there is one such solution (Belinschi, Mai and Speicher 2017). On the axis a solution in the open
half-planes is the boundary value, since it stays there when y is moved up; so is a real one whose omega all grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from jaxtyping import Bool, Complex, Float

from torch_rmt.measures.geometry import Geometry
from torch_rmt.measures.subordination import COARSE, ConvergenceError, Subordination, along_axis

_TOLERANCE = 1e-11  # largest residual, in logarithms, of a solution that is handed out
_INTERIOR = 1e-10  # relative imaginary part from which a solution counts as interior
_NEARLY = 1e-4  # the same below which a solution may be a real one, blurred
_START = 6.0  # height in units of the largest singular value at which the point itself is a good first guess


@dataclass(frozen=True)
class RectangularGeometry(Geometry):
    """The equations in s_i = sqrt(w_i).

    Fields:
        ratio: smaller dimension over larger one.
        lift: dimension of the laws over the smaller one.
    """

    ratio: float = 1.0
    lift: float = 1.0

    @cached_property
    def scale(self) -> float:
        """Sum of the largest singular values."""
        return float(sum(f.count * np.sqrt(f.radius) for f in self.factors))

    def coordinate(self, z: np.ndarray) -> np.ndarray:
        """y = sqrt(z), in the upper half-plane."""
        return np.asarray(np.sqrt(z))

    def abscissa(self, x: np.ndarray) -> np.ndarray:
        """The singular value."""
        return np.asarray(np.sqrt(np.maximum(x, 0.0)))

    def point(self, w: np.ndarray) -> np.ndarray:
        """Its square."""
        return np.asarray(w**2)

    def length(self, w: np.ndarray) -> np.ndarray:
        """Unit in which errors of a coordinate are counted."""
        return np.asarray(np.abs(w))

    def distance(self, w: np.ndarray) -> np.ndarray:
        """Moduli in units of the largest singular values."""
        return np.asarray(np.abs(w) / np.sqrt(self._radii))

    def turn(self, w: np.ndarray) -> np.ndarray:
        """Points of the imaginary axis stand for real ones too."""
        return np.asarray(np.minimum(np.abs(w.imag), np.abs(w.real)) / np.abs(w))

    def transforms(self, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """a_i and s da_i / ds, one row a law; beyond the imaginary axis w has gone round zero."""
        a, da = np.empty_like(s), np.empty_like(s)
        for i, factor in enumerate(self.factors):
            w = np.empty_like(s[i])
            real, imag = s[i].real, s[i].imag
            w.real, w.imag = (real - imag) * (real + imag), 2.0 * np.abs(real) * imag
            h, dh = factor.shift(w)
            below = real < 0
            with np.errstate(all="ignore"):
                m, dm = -h / (w + h), 2.0 * (w / (w + h)) * ((h - w * dh) / (w + h))
            a[i] = self.lift * np.where(below, np.conj(m), m)
            da[i] = self.lift * np.where(below, np.conj(dm), dm)
        return a, da

    def pull(self, a: np.ndarray) -> np.ndarray:
        """(1/2) d log((1 + a)(1 + ratio a)) / da."""
        return np.asarray(0.5 / (1.0 + a) + 0.5 * self.ratio / (1.0 + self.ratio * a))

    def gain(self, a: np.ndarray, common: np.ndarray | float = 0.0) -> np.ndarray:
        """(1 + a)(1 + ratio a) over that of `common`."""
        r = self.ratio
        return np.asarray((1.0 + a) / (1.0 + common) * ((1.0 + r * a) / (1.0 + r * common)))

    def omegas(self, y: np.ndarray, a: np.ndarray) -> np.ndarray:
        """omega, shape (2, laws, points)."""
        u, r = (self.counts * a).sum(axis=0), self.ratio
        return np.stack([y * (1.0 + r * a) / (1.0 + r * u), y * (1.0 + a) / (1.0 + u)])

    def common_at(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        """1 / sqrt|h| at solutions on the axis, h = (1 + u)(1 + ratio u) / z."""
        u = (self.counts * self.transforms(w)[0]).sum(axis=0).real
        with np.errstate(all="ignore"):
            return np.asarray(np.sqrt(np.abs(x / self.gain(u))))

    def along(self, w: np.ndarray, f: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coordinates at a real common value f, the sign of h kept; d log y / d log f, and y^2.

        y^2 is NaN where a coordinate would have to pass zero or infinity on the way."""
        with np.errstate(all="ignore"):
            for _ in range(6):
                a, da = self.transforms(w)
                step = (np.log(np.abs(f**2 * self.gain(a) / w**2)) / 2.0) / (1.0 - self.pull(a) * da)
                step = np.where(np.isfinite(step), step, 0.0).real
                w = w * np.exp(np.clip(step, -0.3, 0.3))
                if np.all(np.abs(step) <= 1e-14):
                    break
            a, da = self.transforms(w)
            u = (self.counts * a).sum(axis=0)
            moved = (self.counts * da / (1.0 - self.pull(a) * da)).sum(axis=0)
            stretch = 1.0 + self.pull(u) * moved
            lost = np.abs(np.log(np.abs(f**2 * self.gain(a) / w**2))).max(axis=0) > 1e-9
            return w, stretch.real, np.where(lost, np.nan, np.abs(f**2 * self.gain(u)))


@dataclass(frozen=True)
class _Linear:
    """The equations at some unknowns, linearised in log s."""

    a: np.ndarray
    error: np.ndarray  # of log s_i, less what the gains ask for
    step: np.ndarray  # Newton's, in log s
    tangent: np.ndarray  # d log s / d log y
    u: np.ndarray
    u_tangent: np.ndarray  # du / d log y


def _linear(geometry: RectangularGeometry, y: np.ndarray, s: np.ndarray) -> _Linear:
    with np.errstate(all="ignore"):
        a, da = geometry.transforms(s)
        u = (geometry.counts * a).sum(axis=0)
        inverse = (y / s) ** 2 * geometry.gain(a, u)
        error = -0.5 * np.log(inverse)
        own, pull = 1.0 - geometry.pull(a) * da, geometry.pull(u)
        weight = geometry.counts * da / own
        border = 1.0 + pull * weight.sum(axis=0)
        # 1 + u near 0 is linear in the unknowns, its logarithm is not
        residual = np.where(np.abs(inverse) < 2.0, 0.5 - 0.5 * inverse, error)
        joint = -(weight * residual).sum(axis=0) / border
        step = (-residual - pull * joint) / own
        return _Linear(a, error, step, 1.0 / (own * border), u, weight.sum(axis=0) / border)


def _folded(s: np.ndarray) -> np.ndarray:
    """Back into the closed upper half-plane."""
    folded = np.empty_like(s)
    folded.real, folded.imag = s.real, np.abs(s.imag)
    return folded


def _newton(geometry: RectangularGeometry, y: np.ndarray, s: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Newton in log s; the unknowns and the size of the last step."""
    s, size = s.copy(), np.full(y.shape, np.inf)
    active = np.arange(y.size)
    for _ in range(steps):
        step = _linear(geometry, y[active], s[:, active]).step
        with np.errstate(all="ignore"):
            large = np.abs(step).max(axis=0)
            step = np.where(large > 0.5, step * (0.5 / large), step)
            good = np.isfinite(step).all(axis=0)
            s[:, active] = np.where(good, _folded(s[:, active] * np.exp(step)), s[:, active])
        stalled = (large < 1e-9) & (large > 0.25 * size[active])
        size[active] = np.where(good, large, np.inf)
        active = active[~((large < 1e-14) | stalled) & good]
        if not active.size:
            break
    return s, size


def _settle(geometry: RectangularGeometry, y: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, Bool[np.ndarray, " n"]]:
    """Which candidates are the solution at their points; those on the axis outside the bulk made exactly real."""
    good = np.zeros(y.shape, dtype=bool)
    above = y.imag > 0
    # what is nearly real is tried as real first: where u is near -1 rounding gives the omegas an imaginary part
    nearly = np.minimum(np.abs(s.imag), np.abs(s.real)) < _NEARLY * np.abs(s)
    shut = np.flatnonzero(nearly.all(axis=0) & ~above)
    if shut.size:
        real, fine = _real(geometry, y[shut], s[:, shut])
        s = s.copy()
        s[:, shut[fine]], good[shut[fine]] = real[:, fine], True
    rest = np.flatnonzero(~good)
    if rest.size:
        here = _linear(geometry, y[rest], s[:, rest])
        with np.errstate(all="ignore"):
            omega = geometry.omegas(y[rest], here.a)
            turn = omega.imag / np.abs(omega)
            inside = np.abs(here.error).max(axis=0) < _TOLERANCE * _noise(geometry, here)
            inside &= (turn > -1e-9).all(axis=(0, 1)) & (turn > _INTERIOR).any(axis=(0, 1))
            high = omega.imag >= y.imag[rest] * (1.0 - 1e-6) - 1e-12 * np.abs(omega)
        good[rest] = inside & (~above[rest] | high.all(axis=(0, 1)))
    return s, good


def _real(geometry: RectangularGeometry, y: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, Bool[np.ndarray, " n"]]:
    """Solutions with real w: s on the axis or the imaginary axis, every omega growing with y."""

    def snapped(s: np.ndarray) -> np.ndarray:
        upright = s.imag > np.abs(s.real)
        return np.asarray(np.where(upright, 1j * np.abs(s), np.sign(s.real) * np.abs(s) + 0j))

    s = snapped(s)
    for _ in range(4):
        step = _linear(geometry, y, s).step.real
        with np.errstate(all="ignore"):
            s = s * np.exp(np.where(np.abs(step) < 0.1, step, 0.0))
        if np.all(np.abs(step) < 1e-15):
            break
    here = _linear(geometry, y, s)
    with np.errstate(all="ignore"):
        r, move = geometry.ratio, geometry.transforms(s)[1] * here.tangent
        grows = np.stack([
            1.0 + r * move / (1.0 + r * here.a) - r * here.u_tangent / (1.0 + r * here.u),
            1.0 + move / (1.0 + here.a) - here.u_tangent / (1.0 + here.u),
        ])  # fmt: skip
        slope = (geometry.omegas(y, here.a) / y * grows).real
        noise = _noise(geometry, here)
        good = (np.abs(here.error).max(axis=0) < _TOLERANCE * noise) & (slope > -1e-6 - 1e-13 * noise).all(axis=(0, 1))
    return s, np.asarray(good)


def _noise(geometry: RectangularGeometry, here: _Linear) -> np.ndarray:
    """By how much the equations multiply the rounding of the a_i: they come near -1, and so does their sum u."""
    size = 1.0 + (geometry.counts * np.abs(here.a)).sum(axis=0)
    return np.asarray(1.0 + size * np.abs(geometry.pull(here.u)) + (size * np.abs(geometry.pull(here.a))).max(axis=0))


def _descend(geometry: RectangularGeometry, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Led in from far above each point straight down; a leap to the point itself is tried from every height."""
    height = np.maximum(_START * geometry.scale + np.abs(y), y.imag)
    at = y.real + 1j * height
    s, _ = _newton(geometry, at, np.broadcast_to(at, (len(geometry.factors), y.size)).copy(), 30)
    result, done = s.copy(), np.zeros(y.shape, dtype=bool)
    ratio = np.full(y.shape, 0.3)
    for _ in range(160):
        todo = np.flatnonzero(~done & (ratio < 0.995) & (height > 1e-15 * np.abs(y)))
        if not todo.size:
            break
        near = todo[height[todo] < 0.5 * geometry.scale + 2.0 * y.imag[todo]]
        if near.size:
            found, _ = _newton(geometry, y[near], s[:, near], 24)
            found, good = _settle(geometry, y[near], found)
            result[:, near[good]], done[near[good]] = found[:, good], True
            todo = todo[~done[todo]]
        down = np.maximum(height[todo] * ratio[todo], y.imag[todo])
        goal = y.real[todo] + 1j * down
        tangent = _linear(geometry, at[todo], s[:, todo]).tangent
        with np.errstate(all="ignore"):
            guess = s[:, todo] * np.exp(tangent * np.log(goal / at[todo]))
            guess = np.where(np.isfinite(guess) & (guess.imag > 0), guess, s[:, todo])
        new, size = _newton(geometry, goal, guess, 10)
        here = _linear(geometry, goal, new)
        with np.errstate(all="ignore"):
            omega = geometry.omegas(goal, here.a)
            good = (size < 1e-7) & (omega.imag >= goal.imag * (1.0 - 1e-6)).all(axis=(0, 1))
            surprise = np.abs(new / guess - 1.0).max(axis=0)
        move = todo[good]
        s[:, move], at[move], height[move] = new[:, good], goal[good], down[good]
        ratio[move] = np.where(surprise[good] < 0.05, np.maximum(ratio[move] ** 1.5, 1e-4), ratio[move])
        ratio[todo[~good]] = np.sqrt(ratio[todo[~good]])
    return result, done


def _between(at: np.ndarray, x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Linear interpolation of the neighbours' unknowns."""
    right = np.clip(np.searchsorted(x, at), 1, x.size - 1)
    width = x[right] - x[right - 1]
    share = np.clip((at - x[right - 1]) / np.where(width > 0, width, 1.0), 0.0, 1.0)
    return np.asarray(s[:, right - 1] + share * (s[:, right] - s[:, right - 1]))


def _from_neighbours(
    geometry: RectangularGeometry, y: np.ndarray, x: np.ndarray, s: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    guess = _between(y.real, x, s)
    found, _ = _newton(geometry, y, guess, 16)
    return _settle(geometry, y, found)


def solve_rectangular(
    geometry: RectangularGeometry,
    z: Complex[np.ndarray, " n"],
    known: tuple[Float[np.ndarray, " m"], Complex[np.ndarray, "k m"]] | None = None,
) -> Subordination:
    """Solve at points of the closed upper half-plane, not 0; `known` as in `subordination.solve`.

    `common` of the result is u, and `slope` du / d log z.

    Raises:
        ConvergenceError: where no solution with a proof was found.
    """
    y = np.asarray(geometry.coordinate(z))
    axis = not np.any(y.imag)
    if axis and known is not None and known[0].size > 1:
        s, done = _from_neighbours(geometry, y, geometry.abscissa(known[0]), known[1])
    elif axis and y.size > 4 * COARSE:
        s, done = along_axis(len(geometry.factors), y, partial(_descend, geometry), partial(_from_neighbours, geometry))
    else:
        s, done = _descend(geometry, y)
    for hair in (0.0, 1e-13, -1e-13, 1e-12):
        retry = np.flatnonzero(~done)
        if not retry.size:
            break
        y[retry] = y[retry] * (1.0 + hair)
        s[:, retry], done[retry] = _descend(geometry, y[retry])
    if not done.all():
        where = z[np.flatnonzero(~done)[0]]
        raise ConvergenceError(
            f"the equations of a rectangular sum were not solved at {int((~done).sum())} of {z.size} points, first at "
            f"z = {where}; merge nodes that nearly coincide, or ask further from an edge of the support"
        )
    here = _linear(geometry, y, s)
    residual = np.abs(here.error).max(axis=0) / _noise(geometry, here)
    return Subordination(s**2, s, here.u, 0.5 * here.u_tangent, residual)
