"""Support of a free convolution: a mesh that follows the mass, then every edge as a branch point."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from torch_rmt.measures.geometry import Geometry, LogGeometry
from torch_rmt.measures.subordination import Subordination

_SMALL = 1e-5  # mass of an interval below which its inside is not looked at further
_SECTIONS = 8  # points an edge's bracket is cut by in one round


class Convolved(Protocol):
    """What the search needs of a free convolution."""

    geometry: Geometry

    @property
    def hull(self) -> tuple[float, float]: ...
    def cdf_and_density(self, x: ArrayLike) -> tuple[np.ndarray, np.ndarray]: ...
    def subordination(self, z: ArrayLike) -> Subordination: ...
    def quantile(self, p: ArrayLike) -> np.ndarray: ...
    def atoms(self) -> tuple[tuple[float, float], ...]: ...


def in_bulk(measure: Convolved, x: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Whether points of the axis are inside the continuous part: there the coordinates are not real."""
    solution = measure.subordination(x)
    turn = np.abs(np.sin(solution.coordinates.imag)) if isinstance(measure.geometry, LogGeometry) else (
        np.abs(solution.coordinates.imag) / measure.geometry.length(solution.coordinates)
    )
    return np.asarray(np.max(turn, axis=0) > 1e-10)


def _middle(low: np.ndarray, high: np.ndarray, log: bool) -> np.ndarray:
    middle = 0.5 * (low + high)
    if log:
        with np.errstate(all="ignore"):
            geometric = np.sign(middle) * np.sqrt(np.abs(low * high))
        middle = np.where((low * high > 0) & (np.abs(middle) > 0), geometric, middle)
    return middle


def _mesh(measure: Convolved) -> Float[np.ndarray, " n"]:
    """Points such that every interval between neighbours has little mass or a density that is nearly straight."""
    log = isinstance(measure.geometry, LogGeometry)
    low, high = measure.hull
    level = np.concatenate([[1e-7, 1e-5, 1e-3], np.linspace(0.01, 0.99, 60), [1 - 1e-3, 1 - 1e-5, 1 - 1e-7]])
    x = np.unique(np.concatenate([measure.quantile(level), [low, high]]))
    for location, _ in measure.atoms():  # an atom is no point of the mesh: its two sides are
        gap = 1e-9 * max(abs(location), 1e-3 * (high - low))
        x = np.unique(np.concatenate([x[np.abs(x - location) > gap], [location - gap, location + gap]]))
    x = x[x != 0] if log else x
    total, density = measure.cdf_and_density(x)
    for _ in range(60):
        width = np.diff(x)
        mass = np.diff(total)
        for location, weight in measure.atoms():
            mass = mass - weight * ((x[:-1] < location) & (location <= x[1:]))
        straight = 0.5 * (density[1:] + density[:-1]) * width
        uneven = np.abs(straight - mass) > 0.2 * np.maximum(straight, mass)
        hidden = (density[1:] == 0) & (density[:-1] == 0) & (mass > 1e-11)
        split = ((mass > _SMALL) & uneven) | hidden | (mass > 0.02)
        dip = np.zeros(x.size, dtype=bool)
        dip[1:-1] = (density[1:-1] < density[:-2]) & (density[1:-1] < density[2:]) & (density[1:-1] > 0)
        tight = width <= 1e-4 * (np.abs(x[1:]) + np.abs(x[:-1]))
        split |= (dip[1:] | dip[:-1]) & ~tight
        split &= width > 1e-13 * (np.abs(x[1:]) + np.abs(x[:-1]))
        if not split.any() or x.size > 20000:
            break
        fresh = _middle(x[:-1][split], x[1:][split], log)
        more_total, more_density = measure.cdf_and_density(fresh)
        order = np.argsort(np.concatenate([x, fresh]), kind="stable")
        x = np.concatenate([x, fresh])[order]
        total, density = np.concatenate([total, more_total])[order], np.concatenate([density, more_density])[order]
    return x


def find_support(measure: Convolved) -> tuple[tuple[float, float], ...]:
    """Intervals of the continuous part of a free convolution, edges to rounding."""
    log = isinstance(measure.geometry, LogGeometry)
    x = _mesh(measure)
    bulk = in_bulk(measure, x)
    if not bulk.any():
        return ()
    change = np.flatnonzero(bulk[1:] != bulk[:-1])
    edges = _edges(measure, x[change], x[change + 1], bulk[change], log).tolist()
    if bulk[0]:
        edges.insert(0, measure.hull[0])
    if bulk[-1]:
        edges.append(measure.hull[1])
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _edges(
    measure: Convolved, low: np.ndarray, high: np.ndarray, low_in_bulk: np.ndarray, log: bool
) -> Float[np.ndarray, " n"]:
    """Sections of brackets with one end in the bulk and one outside."""
    fraction = np.arange(1, _SECTIONS)[:, None] / _SECTIONS
    for _ in range(20):
        if not low.size or np.all(high - low <= 4e-16 * np.maximum(np.abs(low), np.abs(high))):
            break
        wide = log & (low * high > 0) & (np.abs(np.log(np.abs(high / low))) > 1.0) if log else np.zeros(low.shape, bool)
        cuts = low + fraction * (high - low)
        if log:
            with np.errstate(all="ignore"):
                cuts = np.where(wide, low * (high / low) ** fraction, cuts)
        same = in_bulk(measure, cuts.ravel()).reshape(cuts.shape) == low_in_bulk
        first = np.where(same.all(axis=0), _SECTIONS - 1, np.argmin(same, axis=0))
        grid = np.concatenate([low[None], cuts, high[None]])
        column = np.arange(low.size)
        low, high = grid[first, column], grid[first + 1, column]
    return np.asarray(0.5 * (low + high))
