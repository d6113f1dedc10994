"""Solver of the subordination equations: Newton, continued from far above the axis down to the point itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Complex, Float

from torch_rmt.measures.geometry import Geometry, LogGeometry
from torch_rmt.measures.semicircular import semicircle_row, solve_beside_semicircle
from torch_rmt.measures.stability import is_pair, is_stable, linear_solve, map_slopes, tangent_of

_TOLERANCE = 1e-12  # largest residual of a solution that is handed out
_INTERIOR = 1e-11  # imaginary part (relative) from which a solution counts as interior, hence unique
_MUTE = 1e5  # radii from where a coordinate says nothing about its imaginary part
_STALLED = 1e-9  # relative size of Newton steps that are taken for rounding once they shrink no more
COARSE = 16  # every so manieth point is solved by continuation, the others start from their neighbours
_REPELLING = 1e-3  # excess over one of a slope that no rounding explains


_Solutions = tuple[np.ndarray, np.ndarray]  # coordinates, one row a law, and which of them are proved


class ConvergenceError(ArithmeticError):
    """The subordination equations could not be solved to tolerance; the message says where and what to do."""


@dataclass(frozen=True)
class Subordination:
    """Solution of the subordination equations at n points, for K laws.

    Attributes:
        points: w_i with G_i(w_i) = G(z) (sums) or M_i(w_i) = Lambda_i M(z) (products), one row a law.
        coordinates: w_i, or log w_i with 0 <= Im, for products.
        common: F = 1/G (sums) or log P, P = (1 + M)/M (products).
        slope: derivative of `common` by z (sums) or by log z (products).
        residual: largest error of the K equations at each point, relative.
    """

    points: Complex[np.ndarray, "k n"]
    coordinates: Complex[np.ndarray, "k n"]
    common: Complex[np.ndarray, " n"]
    slope: Complex[np.ndarray, " n"]
    residual: Float[np.ndarray, " n"]


def _reflect(geometry: Geometry, w: np.ndarray) -> np.ndarray:
    """Bring coordinates back into 0 <= Im <= ceiling."""
    w = w.copy()
    w.imag = np.abs(w.imag)
    w.imag = np.where(w.imag > geometry.ceiling, np.abs(2 * geometry.ceiling - w.imag), w.imag)
    return w


def _newton(
    geometry: Geometry, zeta: np.ndarray, w: np.ndarray, iterations: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Newton on the active points; returns w, the size of the last step and whether the equations are solved."""
    w = w.copy()
    size = np.full(zeta.shape, np.inf)
    active = np.arange(zeta.size)
    for _ in range(iterations):
        here = w[:, active]
        h, dh = geometry.fields(here)
        rho, c = geometry.residual(zeta[active], here, h)
        step = linear_solve(geometry, dh, c, -rho)
        unit = geometry.length(here)
        with np.errstate(all="ignore"):
            relative = np.max(np.abs(step) / unit, axis=0)
            step = np.where(relative > 0.5, step * (0.5 / relative), step)
        step = np.where(np.isfinite(step), step, 1e-3j * unit)
        w[:, active] = _reflect(geometry, here + step)
        relative = np.where(np.isfinite(relative), relative, np.inf)
        stalled = (relative < _STALLED) & (relative > 0.25 * size[active])  # all rounding from here
        size[active] = np.where(stalled, np.minimum(size[active], relative), relative)
        active = active[~((relative < tolerance) | stalled)]
        if not active.size:
            break
    quiet = size < tolerance
    rest = np.flatnonzero(~quiet)
    if rest.size:  # the steps may be all rounding
        quiet[rest] = _residual(geometry, zeta[rest], w[:, rest])[0] < 0.1 * _TOLERANCE
    return w, size, quiet


_Fields = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | float]


def _residual(geometry: Geometry, zeta: np.ndarray, w: np.ndarray) -> _Fields:
    """Backward error (of the coordinates and of the point, relative), h, h' and the common weight at a solution."""
    h, dh = geometry.fields(w)
    rho, c = geometry.residual(zeta, w, h)
    unit = geometry.length(w)
    share = np.abs(h) + np.abs(dh) * unit
    own = unit + np.abs(zeta)
    terms = own + share[::-1] if is_pair(geometry) else own + share + (geometry.counts * share).sum(axis=0)
    with np.errstate(all="ignore"):
        return np.max(np.abs(rho) / terms, axis=0), h, dh, c


def _is_real(geometry: Geometry, w: np.ndarray) -> Bool[np.ndarray, "k n"]:
    """Whether coordinates stand for real points: for products also in the middle of a strip of width 2 pi.

    A coordinate far outside its law comes from a G near 0, which magnifies rounding by the same factor once more; where
    it is all rounding the others speak for it.
    """
    distance = geometry.distance(w)
    mute = (distance > _MUTE) & (distance > 10.0 * distance.min(axis=0))
    return np.asarray((geometry.turn(w) <= _INTERIOR * np.maximum(1.0, distance)) | mute)


def in_bulk(geometry: Geometry, w: Complex[np.ndarray, "k n"]) -> Bool[np.ndarray, " n"]:
    """Whether solutions on the axis belong to points inside the continuous part: there the coordinates are not real."""
    return np.asarray(~np.all(_is_real(geometry, w), axis=0))


def _settle(geometry: Geometry, zeta: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, Bool[np.ndarray, " n"]]:
    """Decide which candidate solutions at their final points are the right ones; make the real ones exactly real."""
    residual, _, dh, c = _residual(geometry, zeta, w)
    good = residual < _TOLERANCE
    unit = geometry.length(w)
    axis = zeta.imag == 0
    if isinstance(geometry, LogGeometry):
        axis = axis | (zeta.imag == np.pi)
    inside = np.all(w.imag >= geometry.floor(zeta) - 1e-9 * unit, axis=0) & ~axis
    # if one coordinate is interior so are all, however near to the axis rounding leaves the others
    inside |= (
        np.any(
            (w.imag > _INTERIOR * unit) & (w.imag < geometry.ceiling - _INTERIOR) & ~_is_real(geometry, w),
            axis=0,
        )
        & axis
    )
    # an interior fixed point attracts; a repelling one is a real one, blurred (powers of products are no such maps)
    if np.ndim(c) == 0 and (np.all(geometry.counts == 1.0) or not isinstance(geometry, LogGeometry)):
        inside &= ~np.any(np.abs(map_slopes(geometry, dh)) > 1.0 + _REPELLING, axis=0)
    accepted = good & inside
    rest = np.flatnonzero(axis & ~inside)
    if rest.size:
        real, fine = _real_solution(geometry, zeta[rest], w[:, rest])
        w = w.copy()
        w[:, rest[fine]] = real[:, fine]
        accepted[rest[fine]] = True
        # in an exponentially thin tail the solution is interior, but nearer to the axis than rounding
        thin = rest[~fine & good[rest]]
        _, _, dh, c = _residual(geometry, zeta[thin], w[:, thin])
        accepted[thin] = is_stable(geometry, zeta[thin], w[:, thin], dh, c)
    return w, accepted


def _real_solution(geometry: Geometry, zeta: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, Bool[np.ndarray, " n"]]:
    """Polish solutions on the boundary of the half-plane, where the stable one is the right one."""

    def snap(w: np.ndarray) -> np.ndarray:
        w = w.copy()
        step = np.pi
        w.imag = np.round(w.imag / step) * step if isinstance(geometry, LogGeometry) else 0.0
        return w

    w = snap(w)
    for _ in range(3):
        h, dh = geometry.fields(w)
        rho, c = geometry.residual(zeta, w, h)
        step = linear_solve(geometry, dh, c, -rho)
        unit = geometry.length(w)
        step = np.where(np.isfinite(step) & (np.abs(step) < 0.1 * unit), step, 0.0)
        w = snap(w + step)
        if np.all(np.abs(step) <= 1e-15 * unit):
            break
    residual, _, dh, c = _residual(geometry, zeta, w)
    return w, (residual < _TOLERANCE) & is_stable(geometry, zeta, w, dh, c)


def _descend(geometry: Geometry, z: Complex[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """Continuation from far above each point straight down to it."""
    scale = geometry.scale
    height = np.maximum(geometry.start * scale, z.imag)
    current = z.real + 1j * height
    zeta = np.asarray(geometry.coordinate(current))
    w = np.broadcast_to(zeta, (len(geometry.factors), z.size)).copy()
    for _ in range(4):
        w = w - geometry.residual(zeta, w, geometry.fields(w)[0])[0]
    w, _, _ = _newton(geometry, zeta, w, 30, 1e-10)
    ratio = np.full(z.shape, 0.05)
    log = isinstance(geometry, LogGeometry)
    jump = 0.05 * (np.abs(z) if log else np.full(z.shape, scale)) + 1e-290
    done, lost = np.zeros(z.shape, dtype=bool), np.zeros(z.shape, dtype=bool)
    result = w.copy()
    for _ in range(400):
        todo = np.flatnonzero(~(done | lost))
        if not todo.size:
            break
        down = np.maximum(height[todo] * ratio[todo], z.imag[todo])
        final = down <= np.maximum(jump[todo], z.imag[todo])
        down = np.where(final, z.imag[todo], down)
        there = z.real[todo] + 1j * down
        target = np.asarray(geometry.coordinate(there))
        h, dh = geometry.fields(w[:, todo])
        c = geometry.residual(zeta[todo], w[:, todo], h)[1]
        tangent = tangent_of(geometry, dh, c)
        with np.errstate(all="ignore"):
            guess = w[:, todo] + tangent * (target - zeta[todo])
        bad = ~np.all(np.isfinite(guess) & (guess.imag > 0) & (guess.imag < geometry.ceiling), axis=0)
        guess[:, bad] = w[:, todo[bad]]
        new, _, quiet = _newton(geometry, target, guess, 10, 1e-7)
        with np.errstate(all="ignore"):
            surprise = np.max(np.abs(new - guess) / geometry.length(new), axis=0)
        ok = quiet & np.all(new.imag >= (1 - 1e-6) * geometry.floor(target) - 1e-12, axis=0)
        if final.any():
            last = np.flatnonzero(final)
            fine, _, _ = _newton(geometry, target[last], new[:, last], 30, 1e-14)
            fine, right = _settle(geometry, target[last], fine)
            ok[last] = right
            result[:, todo[last[right]]] = fine[:, right]
            done[todo[last[right]]] = True
            jump[todo[last[~right]]] *= 0.02
            lost |= jump < 1e-16 * np.maximum(np.abs(z), 0.0 if log else scale)
            ok[last] = False  # a failed jump goes on from where it was
        move = todo[ok]
        w[:, move], zeta[move], height[move] = new[:, ok], target[ok], down[ok]
        ratio[move] = np.where(surprise[ok] < 0.02, np.maximum(ratio[move] ** 1.5, 1e-6), ratio[move])
        slow = todo[~ok & ~final]
        ratio[slow] = np.sqrt(ratio[slow])
    return result, done


def _interpolated(geometry: Geometry, at: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Cubic through the neighbours' coordinates and tangents; straight where a tangent is steep, as at an edge."""
    right = np.clip(np.searchsorted(x, at), 1, x.size - 1)
    used, index = np.unique(np.concatenate([right - 1, right]), return_inverse=True)
    place, known = geometry.abscissa(x[used]), w[:, used]
    h, dh = geometry.fields(known)
    with np.errstate(all="ignore"):
        c = geometry.residual(np.asarray(geometry.coordinate(x[used].astype(complex))), known, h)[1]
        tangent = tangent_of(geometry, dh, c) * geometry.pace(x[used])
    first, last = index[: at.size], index[at.size :]
    width = place[last] - place[first]
    share = np.clip((geometry.abscissa(at) - place[first]) / np.where(width > 0, width, 1.0), 0.0, 1.0)
    low, high = known[:, first], known[:, last]
    change = high - low
    bend_low, bend_high = tangent[:, first] * width - change, tangent[:, last] * width - change
    gentle = np.maximum(np.abs(bend_low), np.abs(bend_high)) < 2.0 * np.abs(change) + 0.1 * geometry.length(low)
    bend = share * (1.0 - share) * ((1.0 - share) * bend_low - share * bend_high)
    return np.asarray(low + share * change + np.where(gentle, bend, 0.0))


def _from_neighbours(
    geometry: Geometry, z: np.ndarray, x: np.ndarray, w: np.ndarray
) -> tuple[np.ndarray, Bool[np.ndarray, " n"]]:
    """Newton from interpolated solutions at neighbours on the axis; a wrong guess is found out, never believed."""
    guess = _interpolated(geometry, z.real, x, w)
    zeta = np.asarray(geometry.coordinate(z))
    near, _, _ = _newton(geometry, zeta, guess, 24, 1e-14)
    return _settle(geometry, zeta, near)


def _solve_axis(geometry: Geometry, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Many points of the axis: some by continuation or a curve that is known, the rest from their neighbours."""
    row = semicircle_row(geometry)
    return along_axis(
        len(geometry.factors),
        z,
        partial(_descend, geometry),
        partial(_from_neighbours, geometry),
        None if row is None else lambda at: solve_beside_semicircle(geometry, at, row, _settle),
    )


def along_axis(
    rows: int,
    points: np.ndarray,
    alone: Callable[[np.ndarray], _Solutions],
    beside: Callable[[np.ndarray, np.ndarray, np.ndarray], _Solutions],
    begin: Callable[[np.ndarray], _Solutions] | None = None,
) -> _Solutions:
    """Solve at many points of the axis: some alone (or as `begin` does), the others beside those, what is left alone.

    `beside` takes points, and places and coordinates of solved neighbours.
    """
    order = np.argsort(points.real)
    at = points[order]
    if begin is not None:
        w, done = begin(at)
    else:
        w = np.empty((rows, at.size), dtype=complex)
        done = np.zeros(at.shape, dtype=bool)
        anchors = np.unique(np.append(np.arange(0, at.size, COARSE), at.size - 1))
        w[:, anchors], done[anchors] = alone(at[anchors])
    for _ in range(2):  # those beside an edge get nearer neighbours in the second round
        fresh, known = np.flatnonzero(~done), np.flatnonzero(done)
        if not fresh.size or known.size < 2:
            break
        near, right = beside(at[fresh], at.real[known], w[:, known])
        w[:, fresh[right]] = near[:, right]
        done[fresh[right]] = True
    left = np.flatnonzero(~done)
    if left.size:
        w[:, left], done[left] = alone(at[left])
    back = np.empty_like(order)
    back[order] = np.arange(order.size)
    return w[:, back], done[back]


def _solve_known(
    geometry: Geometry, z: np.ndarray, known: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Points of the axis among points whose solution is known."""
    w, done = _from_neighbours(geometry, z, *known)
    left = np.flatnonzero(~done)
    if left.size:
        w[:, left], done[left] = _solve_unaided(geometry, z[left])
    return w, done


def _solve_unaided(geometry: Geometry, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points of which nothing is known."""
    many = z.size > 4 * COARSE or semicircle_row(geometry) is not None
    return (_solve_axis if many and not np.any(z.imag) else _descend)(geometry, z)


def solve(
    geometry: Geometry,
    z: Complex[np.ndarray, " n"],
    known: tuple[Float[np.ndarray, " m"], Complex[np.ndarray, "k m"]] | None = None,
) -> Subordination:
    """Solve the subordination equations at points of the closed upper half-plane (not 0 for products).

    A solution is handed out only with a proof that it is the right one: interior (then it is unique) or real and
    stable (Denjoy-Wolff), with a residual below 1e-12. `known` are points of the axis, in order, and their coordinates:
    they only save time.

    Raises:
        ConvergenceError: where this fails.
    """
    on_axis = not np.any(z.imag)
    if on_axis and known is not None:
        w, done = _solve_known(geometry, z, known)
    else:
        w, done = _solve_unaided(geometry, z)
    for hair in (1e-13, -1e-13, 1e-12):  # isolated points, as where a coordinate is infinite: step aside by rounding
        retry = np.flatnonzero(~done)
        if not retry.size:
            break
        size = np.maximum(np.abs(z[retry]), 0.0 if isinstance(geometry, LogGeometry) else geometry.scale)
        aside = z[retry] + hair * size
        w[:, retry], done[retry] = _solve_unaided(geometry, aside)
        z = z.copy()
        z[retry] = aside
    if not done.all():
        where = z[np.flatnonzero(~done)[0]]
        raise ConvergenceError(
            f"the subordination equations were not solved at {int((~done).sum())} of {z.size} points, "
            f"first at z = {where}; "
            "merge nodes that nearly coincide, or ask at a point further from an edge of the support"
        )
    zeta = np.asarray(geometry.coordinate(z))
    residual, h, dh, c = _residual(geometry, zeta, w)
    tangent = tangent_of(geometry, dh, c)
    with np.errstate(all="ignore"):
        slope = 1.0 + (geometry.counts * dh * tangent).sum(axis=0)
    common = zeta + (geometry.counts * h).sum(axis=0)
    return Subordination(np.asarray(geometry.point(w)), w, common, slope, residual)
