"""What a measure can do when only its Stieltjes transform is known: moments, distribution function, quantiles."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Complex, Float
from scipy.special import log1p

from torch_rmt.measures.half_plane import Numbers

_CONTOUR_POINTS = 160  # on a circle of 1.5 times the radius the error is 1.5^-320
_DECADES = 16.0  # of height that a vertical line crosses on its way down to the axis
_PANELS, _NODES = 36, 8  # Gauss-Legendre panels of one unit of log height: 1e-12, found by tuning


@runtime_checkable
class Transformed(Protocol):
    """What the functions of this module need of a measure."""

    def stieltjes(self, z: Numbers) -> np.ndarray:
        """G(z)."""
        ...

    def log_potential(self, z: Numbers) -> np.ndarray:
        """L(z)."""
        ...

    def cdf(self, x: Numbers) -> np.ndarray:
        """F(x)."""
        ...

    def cdf_and_density(self, x: Numbers) -> tuple[np.ndarray, np.ndarray]:
        """F(x) and the density."""
        ...

    def bounds(self) -> tuple[float, float]:
        """Hull of the mass."""
        ...

    def atoms(self) -> tuple[tuple[float, float], ...]:
        """Point masses."""
        ...


def _circle(hull: tuple[float, float], stretch: float | int) -> tuple[float, float]:
    low, high = hull
    centre, radius = 0.5 * (low + high), 0.5 * (high - low)
    return centre, stretch * max(radius, 1e-3 * abs(centre), 1e-300)


def contour_moments(
    measure: Transformed, count: int, hull: tuple[float, float], unit: float | int = 1.0
) -> Float[np.ndarray, " n"]:
    """m_k / unit^k, k = 1 .. count: (1 / 2 pi i) times the integral of (z / unit)^k G(z) dz, the trapezoidal rule."""
    centre, radius = _circle(hull, 1.5)
    angle = np.pi * (np.arange(_CONTOUR_POINTS) + 0.5) / _CONTOUR_POINTS
    arm = radius * np.exp(1j * angle)
    z = centre + arm
    power = np.cumprod(np.broadcast_to(z / unit, (count, z.size)), axis=0)
    return np.asarray((power * (np.asarray(measure.stieltjes(z)) * arm)).mean(axis=1).real)


def potential(measure: Transformed, z: Complex[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
    """Integral of log(z - t) rho(dt) at points of the closed upper half-plane, from the Stieltjes transform alone."""
    centre, radius = _circle(measure.bounds(), 8.0)
    flat = z.ravel()
    top = np.where(flat.imag > radius, flat.imag, radius)
    far = flat.real + 1j * top
    result = _far_potential(measure, far, centre, radius)
    descend = flat.imag < top
    if descend.any():
        nodes, weights = np.polynomial.legendre.leggauss(_NODES)
        x, start, stop = flat.real[descend], top[descend], flat.imag[descend]
        depth = np.minimum(np.log(start / np.maximum(stop, 1e-300)), _DECADES * np.log(10.0))
        unit = (np.arange(_PANELS)[:, None] + 0.5 * (nodes + 1.0)).ravel() / _PANELS
        weight = np.tile(weights, _PANELS) * 0.5 / _PANELS
        height = start[:, None] * np.exp(-depth[:, None] * unit)
        values = np.asarray(measure.stieltjes(x[:, None] + 1j * height))
        result[descend] -= 1j * (values * height * weight).sum(axis=1) * depth
    return np.asarray(result.reshape(z.shape))


def _far_potential(
    measure: Transformed, z: Complex[np.ndarray, " n"], centre: float, radius: float
) -> Complex[np.ndarray, " n"]:
    """Cauchy's formula on a circle around the support: no moments, no density."""
    angle = np.pi * (np.arange(_CONTOUR_POINTS) + 0.5) / _CONTOUR_POINTS
    arm = 0.25 * radius * np.exp(1j * angle)
    mass = np.asarray(measure.stieltjes(centre + arm)) * arm / _CONTOUR_POINTS
    delta = z[:, None] - centre
    log_delta = np.log(delta)
    lower = np.conj(mass)
    upper_part = log1p(-arm / delta) * mass
    lower_part = log1p(-np.conj(arm) / delta) * lower
    return np.asarray(log_delta[:, 0] + 0.5 * (upper_part + lower_part).sum(axis=1))


def distribution(
    measure: Transformed, x: Float[np.ndarray, "..."], hull: tuple[float, float]
) -> Float[np.ndarray, "..."]:
    """F(x) = 1 - Im L(x + i0) / pi, with the ends of the hull made exact."""
    low, high = hull
    inner = np.asarray((x >= low) & (x < high))
    result = np.where(x < low, 0.0, 1.0)
    if inner.any():
        with np.errstate(all="ignore"):
            result[inner] = np.clip(1.0 - np.asarray(measure.log_potential(x[inner])).imag / np.pi, 0.0, 1.0)
    return np.asarray(result)


def quantiles(
    measure: Transformed,
    p: Float[np.ndarray, "..."],
    hull: tuple[float, float],
    table: tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]] | None = None,
) -> Float[np.ndarray, "..."]:
    """Smallest x with F(x) >= p: Newton steps on F kept inside a shrinking bracket, atoms found by their mass.

    A table (x, F) of points that are known already gives narrower first brackets.
    """
    low, high = hull
    levels = p.ravel()
    result = np.where(levels <= 0.0, low, high)
    open_ = (levels > 0.0) & (levels < 1.0)
    atoms = measure.atoms()
    if atoms:
        where = np.array([location for location, _ in atoms])
        above = np.asarray(measure.cdf(where))
        for (location, mass), top in zip(atoms, above, strict=True):
            hit = open_ & (levels <= top + 1e-13) & (levels > top - mass + 1e-13)
            result[hit] = location
            open_ &= ~hit
    todo = np.flatnonzero(open_)
    if todo.size:
        lower, upper = np.full(todo.shape, low), np.full(todo.shape, high)
        if table is not None:
            x, reached = table
            after = np.searchsorted(np.maximum.accumulate(reached), levels[todo] + 1e-13)
            before = np.searchsorted(np.maximum.accumulate(reached), levels[todo] - 1e-13) - 1
            lower = np.where(before >= 0, np.maximum(x[np.maximum(before, 0)], low), low)
            upper = np.where(after < x.size, np.minimum(x[np.minimum(after, x.size - 1)], high), high)
        result[todo] = _invert(measure, levels[todo], lower, upper)
    return np.asarray(result.reshape(p.shape))


def _split(low: Float[np.ndarray, " n"], high: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Middle of a bracket: geometric where it spans a decade of one sign, else arithmetic."""
    middle = 0.5 * (low + high)
    positive = (low >= 0) & (high > 8 * low)
    negative = (high <= 0) & (low < 8 * high)
    near, far = np.where(positive, low, -high), np.where(positive, high, -low)
    geometric = np.sqrt(np.maximum(np.maximum(near, far * 1e-6), 1e-300) * np.maximum(far, 0))
    return np.asarray(np.where(positive, geometric, np.where(negative, -geometric, middle)))


def _invert(
    measure: Transformed,
    p: Float[np.ndarray, " n"],
    lower: Float[np.ndarray, " n"],
    upper: Float[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    x = _split(lower, upper)
    active = np.arange(p.size)
    for step in range(200):
        value = x[active]
        reached, density = measure.cdf_and_density(value)
        error = reached - p[active]
        above = error >= 0
        upper[active] = np.where(above, value, upper[active])
        lower[active] = np.where(above, lower[active], value)
        with np.errstate(all="ignore"):
            newton = value - error / density
        inside = (newton > lower[active]) & (newton < upper[active]) & (step % 4 != 3)
        move = np.where(inside, newton, _split(lower[active], upper[active]))
        small = np.abs(error) <= 2e-15
        tight = upper[active] - lower[active] <= 4e-16 * np.maximum(np.abs(lower[active]), np.abs(upper[active]))
        settled = inside & (np.abs(move - value) <= 1e-15 * np.abs(value))
        x[active] = np.where(small, value, np.where(tight, upper[active], move))
        active = active[~(small | tight | settled)]
        if not active.size:
            break
    return x
