"""The transforms of free probability: M (psi), eta, R and S, with their inverses."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch

import numpy as np
from jaxtyping import Complex

from torch_rmt.measures.base import SpectralMeasure
from torch_rmt.measures.classical import MarchenkoPastur, Semicircle
from torch_rmt.measures.discrete import PointMass
from torch_rmt.measures.fuss_catalan import FussCatalan
from torch_rmt.measures.geometry import Factor
from torch_rmt.measures.half_plane import Numbers, fold
from torch_rmt.measures.subordination import ConvergenceError

_START = 1e-3  # share of the way at which the leading term of the inverse is near enough for Newton


def _shift(factor: Factor, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """h = 1/G - w and h' in either half-plane."""
    folded, below = fold(w)
    h, dh = factor.shift(folded)
    return np.where(below, np.conj(h), h), np.where(below, np.conj(dh), dh)


def m_transform(measure: SpectralMeasure, z: Numbers) -> Complex[np.ndarray, "..."]:
    """M(z) = z G(z) - 1 = sum_k m_k z^-k, without cancellation at large z; psi(u) = M(1/u).

    >>> abs(complex(m_transform(PointMass(1.0), 3.0)))
    0.5
    """
    points = np.asarray(z, dtype=complex)
    flat = points.ravel()
    h, _ = _shift(Factor(measure), flat)
    return np.asarray((-h / (flat + h)).reshape(points.shape))


def eta_transform(measure: SpectralMeasure, u: Numbers) -> Complex[np.ndarray, "..."]:
    """eta(u) = psi(u) / (1 + psi(u)), psi(u) = integral of u t / (1 - u t) rho(dt), for u not 0.

    >>> abs(complex(eta_transform(PointMass(2.0), 0.25)))
    0.5
    """
    points = np.asarray(u, dtype=complex)
    flat = 1.0 / points.ravel()
    h, _ = _shift(Factor(measure), flat)
    return np.asarray((-h / flat).reshape(points.shape))


_Step = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _follow(
    w: np.ndarray, target: Callable[[np.ndarray, np.ndarray], np.ndarray], newton: _Step, name: str
) -> np.ndarray:
    """Newton along s -> target(s, index), s from `_START` to 1; the steps shrink where Newton does not settle."""
    w = w.copy()
    s, ratio = np.full(w.shape, _START), np.full(w.shape, 4.0)
    todo = np.arange(w.size)
    begun = False
    for _ in range(400):
        ahead = np.minimum(s[todo] * ratio[todo], 1.0) if begun else s[todo]
        begun = True
        aim = target(ahead, todo)
        guess, size = w[todo], np.full(todo.shape, np.inf)
        for _ in range(10):
            guess, size = newton(guess, aim)
            if np.all(size < 1e-13):
                break
        good = (size < 1e-12) & np.isfinite(guess)
        w[todo[good]], s[todo[good]] = guess[good], ahead[good]
        ratio[todo] = np.where(good, np.minimum(1e3, ratio[todo] ** 1.5), np.sqrt(ratio[todo]))
        todo = todo[~(good & (ahead >= 1.0))]
        if not todo.size:
            return w
    raise ConvergenceError(
        f"the inverse of {name} could not be continued from 0 to the point asked for; "
        "a branch point (an edge of the support) lies between: ask nearer to 0"
    )


def inverse_stieltjes(measure: SpectralMeasure, g: Numbers) -> Complex[np.ndarray, "..."]:
    """K(g) with G(K(g)) = g, the branch with K ~ 1/g at 0, continued along the ray from 0 to g.

    Raises:
        ConvergenceError: where the ray meets a branch point: a real g beyond G at the edge of the support.

    >>> round(complex(inverse_stieltjes(Semicircle(), 0.5)).real, 12)
    2.5
    """
    points = np.asarray(g, dtype=complex)
    flat = points.ravel()
    factor = Factor(measure)
    centre = measure.mean
    # start so small that the first target is far outside the support
    shrink = np.minimum(1.0, 1.0 / (np.maximum(np.abs(flat), 1e-300) * 50 * max(factor.radius, 1e-300))) / _START

    def target(s: np.ndarray, index: np.ndarray) -> np.ndarray:
        grown = np.exp(np.log(s) / np.log(_START) * np.log(np.minimum(_START * shrink[index], 1.0)))
        return np.asarray(1.0 / (flat[index] * grown))

    def newton(w: np.ndarray, f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(all="ignore"):
            h, dh = _shift(factor, w)
            step = (f - w - h) / (1.0 + dh)
            return w + step, np.abs(step) / (np.abs(w) + 1e-3 * factor.radius)

    start = target(np.full(flat.shape, _START), np.arange(flat.size)) + centre
    return np.asarray(_follow(start, target, newton, "G").reshape(points.shape))


def inverse_m(measure: SpectralMeasure, u: Numbers) -> Complex[np.ndarray, "..."]:
    """z with M(z) = u, the branch with z ~ mean / u at 0, continued along the ray from 0 to u.

    Raises:
        ValueError: for a law of mean zero, whose M has no inverse near 0.
        ConvergenceError: where the ray meets a branch point.

    >>> round(complex(inverse_m(PointMass(2.0), -0.5)).real, 12)
    -2.0
    """
    points = np.asarray(u, dtype=complex)
    flat = points.ravel()
    factor = Factor(measure)
    centre = measure.mean
    if abs(centre) <= 1e-12 * max(factor.radius, 1e-300):
        raise ValueError("M and S have no inverse near 0 for a law of mean zero; shift the law or use its square")
    shrink = np.minimum(1.0, abs(centre) / (np.maximum(np.abs(flat), 1e-300) * 50 * factor.radius)) / _START

    def target(s: np.ndarray, index: np.ndarray) -> np.ndarray:
        grown = np.exp(np.log(s) / np.log(_START) * np.log(np.minimum(_START * shrink[index], 1.0)))
        return np.asarray(flat[index] * grown)

    def newton(w: np.ndarray, m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(all="ignore"):
            h, dh = _shift(factor, w)
            step = np.log((1.0 + m) / m * -h / w) / (1.0 - w * dh / h)
            step = np.where(np.abs(step) > 1.0, step / np.abs(step), step)
            return w * np.exp(step), np.abs(step)

    start = centre / target(np.full(flat.shape, _START), np.arange(flat.size))
    return np.asarray(_follow(start, target, newton, "M").reshape(points.shape))


@singledispatch
def r_transform(measure: SpectralMeasure, z: Numbers) -> Complex[np.ndarray, "..."]:
    """R(z) = K(z) - 1/z with G(K(z)) = z; it adds under `free_add`.

    In closed form for the laws registered here (`r_transform.register` takes more), else by continuation from 0.

    Raises:
        ConvergenceError: beyond a branch point, see `inverse_stieltjes`.

    >>> complex(r_transform(Semicircle(2.0), 0.25))
    (0.5+0j)
    """
    points = np.asarray(z, dtype=complex)
    result = np.full(points.shape, measure.mean, dtype=complex)
    away = np.asarray(points != 0)
    if away.any():
        result[away] = -_shift(Factor(measure), inverse_stieltjes(measure, points[away]))[0]
    return result


@r_transform.register
def _(measure: Semicircle, z: Numbers) -> Complex[np.ndarray, "..."]:
    return np.asarray(measure.mean + measure.variance * np.asarray(z, dtype=complex))


@r_transform.register
def _(measure: MarchenkoPastur, z: Numbers) -> Complex[np.ndarray, "..."]:
    return np.asarray(measure.scale / (1.0 - measure.ratio * measure.scale * np.asarray(z, dtype=complex)))


@r_transform.register
def _(measure: PointMass, z: Numbers) -> Complex[np.ndarray, "..."]:
    return np.full(np.shape(np.asarray(z)), measure.location, dtype=complex)


@singledispatch
def s_transform(measure: SpectralMeasure, u: Numbers) -> Complex[np.ndarray, "..."]:
    """S(u) = (1 + u) / (u M^-1(u)); it multiplies under `free_mul`. The mean must not be 0.

    In closed form for the laws registered here (`s_transform.register` takes more), else by continuation from 0.

    Raises:
        ValueError: for a law of mean zero.
        ConvergenceError: beyond a branch point, see `inverse_m`.

    >>> complex(s_transform(MarchenkoPastur(1.0), -0.5))
    (2+0j)
    """
    points = np.asarray(u, dtype=complex)
    away = np.asarray(points != 0)
    w = inverse_m(measure, points[away])
    result = np.full(points.shape, 1.0 / measure.mean, dtype=complex)
    if away.any():
        result[away] = -1.0 / _shift(Factor(measure), w)[0]
    return result


@s_transform.register
def _(measure: MarchenkoPastur, u: Numbers) -> Complex[np.ndarray, "..."]:
    return np.asarray(1.0 / (measure.scale * (1.0 + measure.ratio * np.asarray(u, dtype=complex))))


@s_transform.register
def _(measure: FussCatalan, u: Numbers) -> Complex[np.ndarray, "..."]:
    return np.asarray((1.0 + np.asarray(u, dtype=complex)) ** -measure.order)


@s_transform.register
def _(measure: PointMass, u: Numbers) -> Complex[np.ndarray, "..."]:
    return np.full(np.shape(np.asarray(u)), 1.0 / measure.location, dtype=complex)
