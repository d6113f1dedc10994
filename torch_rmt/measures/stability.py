"""The linearised subordination equations: Newton's steps, tangents, and whether a solution attracts."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool

from torch_rmt.measures.geometry import Geometry

_EDGE = 1e-6  # excess over one of the slope of a real solution that may be the rounding of an edge


def is_pair(geometry: Geometry) -> bool:
    """Whether there are two laws, each taken once: then the equations are simpler and do not cancel."""
    return len(geometry.factors) == 2 and geometry.total == 2.0


def linear_solve(geometry: Geometry, dh: np.ndarray, c: np.ndarray | float, rhs: np.ndarray) -> np.ndarray:
    """Solve sum_j [delta_ij (1 + h_i') - c_i n_j h_j'] d_j = rhs_i at every point."""
    counts = geometry.counts
    with np.errstate(all="ignore"):
        if is_pair(geometry) and np.ndim(c) == 0:
            determinant = 1.0 - dh[0] * dh[1]
            return np.asarray(np.stack([rhs[0] + dh[1] * rhs[1], rhs[1] + dh[0] * rhs[0]]) / determinant)
        if len(rhs) == 1:
            return np.asarray(rhs / (1.0 + dh - c * counts * dh))
    matrix = -(c * np.ones_like(dh)).T[:, :, None] * (counts * dh).T[:, None, :]
    if np.ndim(c) == 0:  # the sum on the diagonal without cancellation
        np.einsum("nii->ni", matrix)[:] = 1.0 - ((counts - 1.0) * dh).T
    else:
        np.einsum("nii->ni", matrix)[:] += 1.0 + dh.T
    sound = np.isfinite(matrix).all(axis=(1, 2)) & (np.abs(matrix).max(axis=(1, 2)) < 1e150)
    matrix[~sound] = np.eye(len(rhs))
    try:
        solution = np.linalg.solve(matrix, rhs.T[:, :, None])[:, :, 0].T
    except np.linalg.LinAlgError:
        solution = np.linalg.solve(matrix + 1e-14 * np.eye(len(rhs)), rhs.T[:, :, None])[:, :, 0].T
    solution[:, ~sound] = np.nan
    return np.asarray(solution)


def tangent_of(geometry: Geometry, dh: np.ndarray, c: np.ndarray | float) -> np.ndarray:
    """Derivative of the coordinates by the coordinate of the point."""
    return linear_solve(geometry, dh, c, c * np.ones_like(dh))


def is_stable(
    geometry: Geometry, zeta: np.ndarray, w: np.ndarray, dh: np.ndarray, c: np.ndarray | float
) -> Bool[np.ndarray, " n"]:
    """Whether a real solution is the attracting fixed point of the map that defines it.

    No slope exceeds one. Edges, where one is one, are let through. The slopes are asked, not what they do to F: where
    G nearly vanishes F hardly moves.
    """
    if np.ndim(c):  # rectangular: a coordinate on the point's side of its strip moves with it, else against it
        sense = np.where(np.abs(w.imag - zeta.imag) < 1.0, 1.0, -1.0) * tangent_of(geometry, dh, c)
        return np.asarray(np.all(sense.real > -1e-6, axis=0))
    slopes = map_slopes(geometry, dh.real)
    stable = np.all((slopes < 1.0 + _EDGE) | ~np.isfinite(slopes), axis=0)
    return np.asarray(stable & np.all(np.abs(dh.imag) <= 1e-6 * (1.0 + np.abs(dh.real)), axis=0))


def map_slopes(geometry: Geometry, dh: np.ndarray) -> np.ndarray:
    """Slopes at a solution of all the maps that define it: of each law taken n times, and of laws joined one by one.

    The map of two laws has slope h_1' h_2', that of a law taken n times (n - 1) h', and laws that are joined have
    h_12' = (h_1' + h_2' + 2 h_1' h_2') / (1 - h_1' h_2').
    """

    def rest(slope: np.ndarray) -> np.ndarray:
        room = 1.0 - slope
        return np.where(np.abs(room) > 1e-12, room, 1e-12) if np.iscomplexobj(room) else np.maximum(room, 1e-12)

    slopes = []
    joined = np.zeros(dh.shape[1:])
    with np.errstate(all="ignore"):
        for own, n in zip(dh, geometry.counts[:, 0], strict=True):
            if n != 1.0:
                slopes.append((n - 1.0) * own)
                own = n * own / rest(slopes[-1])
            slopes.append(joined * own)
            joined = (joined + own + 2.0 * slopes[-1]) / rest(slopes[-1])
    return np.stack(slopes)
