"""Support of a free convolution: a mesh that follows the mass, then every edge as a branch point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Complex, Float

from torch_rmt.measures.geometry import Geometry, LogGeometry
from torch_rmt.measures.subordination import in_bulk

_SMALL = 1e-6  # mass of an interval below which its inside is not looked at further
_COARSE = 0.02  # largest mass of an interval of the mesh
_ROUNDS, _LIMIT = 80, 20000  # of refinement; points
_HIDDEN = 1e-5  # of the hull, from an atom
_ATTEMPTS = (0, 1, 2, 4, 7)  # rounds at whose start an edge is solved for; a hard or thin one never yields
_SECTIONS = 16  # pieces into which an edge's bracket is cut in one round


@dataclass(frozen=True)
class Points:
    """What is known at points of the axis, in order: F, the density and its slope, the subordination coordinates."""

    x: Float[np.ndarray, " n"]
    cdf: Float[np.ndarray, " n"]
    density: Float[np.ndarray, " n"]
    slope: Float[np.ndarray, " n"]
    coordinates: Complex[np.ndarray, "k n"]

    def merged(self, other: Points) -> Points:
        """Both sets in order, the first kept where a point occurs twice."""
        x, index = np.unique(np.concatenate([self.x, other.x]), return_index=True)
        return Points(
            x,
            np.concatenate([self.cdf, other.cdf])[index],
            np.concatenate([self.density, other.density])[index],
            np.concatenate([self.slope, other.slope])[index],
            np.concatenate([self.coordinates, other.coordinates], axis=1)[:, index],
        )


@runtime_checkable
class Convolved(Protocol):
    """What the search needs of a free convolution."""

    geometry: Geometry

    @property
    def hull(self) -> tuple[float, float]:
        """An interval that holds all the mass."""
        ...

    def evaluate(self, x: np.ndarray, known: Points | None = None) -> Points:
        """All that is known at points of the axis."""
        ...

    def atoms(self) -> tuple[tuple[float, float], ...]:
        """Point masses."""
        ...


def _middle(low: np.ndarray, high: np.ndarray, log: bool) -> np.ndarray:
    """Midpoint, the geometric one for products."""
    middle = 0.5 * (low + high)
    if not log:
        return np.asarray(middle)
    return np.asarray(np.where(low * high > 0, np.sign(low) * np.sqrt(np.abs(low)) * np.sqrt(np.abs(high)), middle))


def _first_points(measure: Convolved) -> Float[np.ndarray, " n"]:
    """Sums (or products) of the laws' quantiles, the hull, and both sides of every atom."""
    log = isinstance(measure.geometry, LogGeometry)
    low, high = measure.hull
    level = np.concatenate([[1e-6, 1e-4], np.linspace(0.005, 0.995, 40), [1 - 1e-4, 1 - 1e-6]])
    start = 1.0 if log else 0.0
    x = np.full(level.shape, start)
    for factor in measure.geometry.factors:
        quantile = np.asarray(factor.law.quantile(level))
        x = x * np.abs(quantile) ** factor.count if log else x + factor.count * quantile
    x = x[(x > 1e-100 * high)] if log else x
    x = np.concatenate([x, [low, high], np.linspace(low, high, 34)[1:-1]])
    if log:
        x = np.concatenate([x, np.geomspace(1e-30 * max(high, -low), max(high, -low), 16)])
        if low < 0:
            x = np.concatenate([x, -x])
    for location, _ in measure.atoms():  # an atom is no point of the mesh: its two sides are
        gap = 1e-9 * abs(location) + (0.0 if log else 1e-12 * (high - low))
        beside = 2.0 * _blur(measure, location)
        sides = [location - beside, location - gap, location + gap, location + beside]
        x = np.concatenate([x[np.abs(x - location) > gap], sides])
    return np.unique(x[(x != 0) & (x >= low) & (x <= high)] if log else x)


def _blur(measure: Convolved, location: float) -> float:
    """Distance from an atom below which rounding hides whether the density is positive: G is real to its last digits.

    None in logarithms beside 0.
    """
    low, high = measure.hull
    return _HIDDEN * (abs(location) if isinstance(measure.geometry, LogGeometry) else high - low)


def build_mesh(measure: Convolved) -> Points:
    """Points such that every interval between neighbours has little mass or a density that is nearly straight."""
    log = isinstance(measure.geometry, LogGeometry)
    points = measure.evaluate(_first_points(measure))
    atoms = measure.atoms()
    for _ in range(_ROUNDS):
        x, density = points.x, points.density
        width, mass = np.diff(x), np.diff(points.cdf)
        for location, weight in atoms:
            mass = mass - weight * ((x[:-1] < location) & (location <= x[1:]))
        straight = 0.5 * (density[1:] + density[:-1]) * width
        uneven = np.abs(straight - mass) > 0.05 * np.maximum(straight, mass)
        bulk = density > 0
        hidden = ~bulk[1:] & ~bulk[:-1] & (mass > 1e-11)
        # falling, then rising: a minimum inside, which may be a gap unless both ends are near it
        fall, rise = -points.slope[:-1] * width, points.slope[1:] * width
        dip = bulk[1:] & bulk[:-1] & (fall > 0) & (rise > 0)
        dip &= np.maximum(fall, rise) > 0.1 * np.minimum(density[:-1], density[1:])
        size = np.abs(x[1:]) + np.abs(x[:-1])
        split = ((mass > _SMALL) & uneven) | hidden | (mass > _COARSE) | dip
        split &= width > 1e-13 * size
        if not split.any() or x.size > _LIMIT:
            break
        points = points.merged(measure.evaluate(_middle(x[:-1][split], x[1:][split], log), points))
    return points


def find_support(measure: Convolved, mesh: Points) -> tuple[tuple[float, float], ...]:
    """Intervals of the continuous part of a free convolution, edges to rounding."""
    bulk = in_bulk(measure.geometry, mesh.coordinates)
    for location, _ in measure.atoms():  # what is hidden by an atom is as its surroundings
        first, middle, last = np.searchsorted(mesh.x, location + _blur(measure, location) * np.array([-1.0, 0.0, 1.0]))
        bulk[first:middle] = first > 0 and bulk[first - 1]
        bulk[middle:last] = last < mesh.x.size and bulk[last]
    change = np.flatnonzero(bulk[1:] != bulk[:-1])
    edges = _find_edges(measure, mesh, mesh.x[change], mesh.x[change + 1], bulk[change]).tolist()
    if bulk.any() and bulk[0]:
        edges.insert(0, measure.hull[0])
    if bulk.any() and bulk[-1]:
        edges.append(measure.hull[1])
    return _joined(list(zip(edges[::2], edges[1::2], strict=True)))


def _joined(intervals: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Join intervals whose gap is below what rounding can tell from an edge."""
    joined: list[tuple[float, float]] = []
    for low, high in intervals:
        if joined and low - joined[-1][1] <= 1e-8 * max(high - low, joined[-1][1] - joined[-1][0]):
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return tuple(joined)


def _find_edges(
    measure: Convolved, mesh: Points, low: np.ndarray, high: np.ndarray, low_in_bulk: np.ndarray
) -> Float[np.ndarray, " n"]:
    """Cut brackets, one end in the bulk and one outside, until the branch point can be solved for; or to rounding."""
    edge = np.full(low.shape, np.nan)
    todo = np.arange(low.size)
    for round_ in range(20):
        if not todo.size:
            break
        if round_ in _ATTEMPTS:
            outside = np.where(low_in_bulk[todo], high[todo], low[todo])
            inside = np.where(low_in_bulk[todo], low[todo], high[todo])
            found = branch_points(measure, mesh, outside, inside)
            near = np.isfinite(found)
            edge[todo[near]] = found[near]
            todo = todo[~near]
        if todo.size:
            low[todo], high[todo], mesh = _cut(measure, mesh, low[todo], high[todo], low_in_bulk[todo])
        narrow = high[todo] - low[todo] <= 4e-16 * np.maximum(np.abs(low[todo]), np.abs(high[todo]))
        edge[todo[narrow]] = 0.5 * (low + high)[todo[narrow]]
        todo = todo[~narrow]
    edge[todo] = 0.5 * (low + high)[todo]
    return edge


def _cut(
    measure: Convolved, mesh: Points, low: np.ndarray, high: np.ndarray, low_in_bulk: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Points]:
    """One round: each bracket cut in pieces, the piece kept where bulk and outside meet."""
    fraction = np.arange(1, _SECTIONS)[:, None] / _SECTIONS
    cuts = low + fraction * (high - low)
    if isinstance(measure.geometry, LogGeometry):
        wide = (low * high > 0) & (np.maximum(np.abs(low), np.abs(high)) > 2 * np.minimum(np.abs(low), np.abs(high)))
        with np.errstate(all="ignore"):
            cuts = np.where(wide, low * (high / low) ** fraction, cuts)
    fresh = measure.evaluate(np.unique(cuts), mesh)
    same = in_bulk(measure.geometry, fresh.coordinates)[np.searchsorted(fresh.x, cuts)] == low_in_bulk
    first = np.where(same.all(axis=0), _SECTIONS - 1, np.argmin(same, axis=0))
    grid = np.concatenate([low[None], cuts, high[None]])
    column = np.arange(low.size)
    return grid[first, column], grid[first + 1, column], mesh.merged(fresh)


def branch_points(
    measure: Convolved, mesh: Points, outside: Float[np.ndarray, " n"], inside: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Edges by the secant rule on dz/dF = 0, F = 1/G (or log P) real, from a known point outside the support each.

    Along real F the point z is smooth, with a double point at the edge: no root is lost to rounding there. NaN where
    the rule does not settle between the two points, or where dz/dF has another zero on the way.
    """
    geometry = measure.geometry
    w = mesh.coordinates[:, np.searchsorted(mesh.x, outside)]
    start = geometry.common_at(outside, w)
    with np.errstate(all="ignore"):
        w, d0, _ = geometry.along(w, start)
        sense = np.sign(d0)
        unit = geometry.length(w).max(axis=0)
        # z'' = dD/dF from a small step, whose sign does not matter
        f0, f1 = start, start + 1e-5 * unit
        for _ in range(16):
            w, d1, z = geometry.along(w, f1)
            step = -d1 * (f1 - f0) / (d1 - d0)
            step = np.where(np.isfinite(step), np.clip(step, -0.5 * unit, 0.5 * unit), 0.0)
            f0, d0, f1 = f1, d1, f1 + step
            if np.all(np.abs(step) <= 1e-9 * (np.abs(f1) + unit)):
                break
        settled = np.abs(step) <= 1e-6 * (np.abs(f1) + geometry.length(w).max(axis=0))
        slack = 1e-9 * np.abs(outside - inside)
        good = settled & (z >= np.minimum(inside, outside) - slack) & (z <= np.maximum(inside, outside) + slack)
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):  # one way from the outside point to the edge, without another edge
            _, stretch, _ = geometry.along(w, f0 + share * (start - f0))
            good &= stretch * sense > 0
    return np.where(good, z, np.nan)
