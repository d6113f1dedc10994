"""The law of a function of a Gaussian variable: what an activation's derivative is, layer after layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Complex, Float
from numpy.polynomial import chebyshev
from scipy.special import erf, ndtr

from torch_rmt.measures.base import Atom, Interval, SpectralMeasure
from torch_rmt.measures.discrete import Discrete
from torch_rmt.measures.half_plane import Numbers, fold, unfold

_REACH = 8.5  # standard deviations: 2e-17 of the mass is left out
_PANEL = 0.5  # width of a panel in standard deviations, halved where fn is not resolved
_RESOLVED = 1e-14  # of a panel's largest value: what its last Chebyshev coefficients may be
_ORDER = 16  # Gauss-Legendre nodes and Chebyshev coefficients a panel
_HALVINGS = 22  # panels that shrink towards a critical point, where the image turns back
_CLOSE = 1.0  # image radii within which a point's pole is subtracted from a panel's integrand

# row j holds the coefficients of the Chebyshev polynomial T_j in powers
_TO_POWERS = np.stack([np.append(chebyshev.cheb2poly([0] * j + [1]), np.zeros(_ORDER - 1 - j)) for j in range(_ORDER)])


class GaussianPushforward(SpectralMeasure):
    """Law of fn(sqrt(variance) Z), Z standard normal, for fn real, smooth between its kinks.

    The line is cut at the kinks and at the critical points of fn into panels on which fn is monotone. On each, G is a
    Gauss-Legendre sum; where z is near the panel's image the pole at fn(t) = z is subtracted and integrated exactly,
    so that G holds up to the axis. Pieces on which fn is constant are atoms. The distribution function is exact.

    Raises:
        ValueError: variance not positive, or fn not finite somewhere within 8.5 standard deviations.

    >>> law = GaussianPushforward(lambda h: (h > 0) * 1.0, 2.0, kinks=(0.0,))  # derivative of ReLU, squared
    >>> law.atoms()
    ((0.0, 0.5), (1.0, 0.5))
    """

    def __init__(
        self, fn: Callable[[np.ndarray], np.ndarray], variance: float | int, kinks: Sequence[float | int] = ()
    ) -> None:
        if not (np.isfinite(variance) and variance > 0):
            raise ValueError(f"variance must be a finite number > 0, got {variance}; fn(0) alone is a PointMass")
        self.fn, self.gaussian_variance, self.kinks = fn, float(variance), tuple(float(k) for k in kinks)
        sigma = np.sqrt(self.gaussian_variance)
        cuts = np.unique(np.clip([-_REACH, *(k / sigma for k in self.kinks), _REACH], -_REACH, _REACH))
        edges = [np.linspace(a, b, int(np.ceil((b - a) / _PANEL)) + 1) for a, b in pairwise(cuts.tolist())]
        left, right = np.concatenate([e[:-1] for e in edges]), np.concatenate([e[1:] for e in edges])
        left, right = self._monotone(*self._resolved(left, right))
        values = self._values(left, right)
        size = np.abs(values).max()
        flat = np.ptp(values, axis=1) <= 8 * np.finfo(float).eps * np.abs(values).max(axis=1)
        # the short panels beside a critical point are no atoms, unless they continue one
        plateaus = values[flat & (right - left > 1e-4)].mean(axis=1)
        flat &= (right - left > 1e-4) | np.isin(values.mean(axis=1), plateaus)
        mass = ndtr(right) - ndtr(left)
        self._atoms = _gather(values[flat].mean(axis=1), mass[flat], size)
        keep = ~flat
        self._left, self._right, self._mass = left[keep], right[keep], mass[keep]
        self._nodes, weight = _nodes(self._left, self._right)
        self._values_at = values[keep]
        self._gauss = weight * np.exp(-0.5 * self._nodes**2) / np.sqrt(2 * np.pi)
        self._weight = weight
        # the panels' polynomials with two derivatives, in powers of the panel's own variable in [-1, 1]
        powers = _fit(self._values_at) @ _TO_POWERS
        self._polynomials = np.stack([powers, _derivative(powers), _derivative(_derivative(powers))])
        ends = np.stack([powers @ (-1.0) ** np.arange(_ORDER), powers.sum(axis=1)])
        lowest, highest = self._values_at.min(axis=1), self._values_at.max(axis=1)
        # rounding at an end must not carry a function of one sign across zero
        ends = np.where(lowest >= 0, np.maximum(ends, 0.0), np.where(highest <= 0, np.minimum(ends, 0.0), ends))
        joint = (self._left[1:] == self._right[:-1]) & (np.abs(ends[0, 1:] - ends[1, :-1]) <= 1e-13 * size)
        one, two = ends[1, :-1][joint], ends[0, 1:][joint]
        # neighbours share an end bit by bit, so that their logarithms cancel
        ends[1, :-1][joint] = ends[0, 1:][joint] = np.where(one * two <= 0, 0.0, one)
        self._ends = ends

    def __repr__(self) -> str:
        return f"GaussianPushforward({getattr(self.fn, '__name__', self.fn)!s}, variance={self.gaussian_variance})"

    def _values(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        t, _ = _nodes(left, right)
        values = np.asarray(self.fn(np.sqrt(self.gaussian_variance) * t.ravel()), dtype=float).reshape(t.shape)
        if not np.all(np.isfinite(values)):
            raise ValueError(f"the function is not finite within {_REACH} standard deviations of 0: its law is no law")
        return values

    def _resolved(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Halve panels until the polynomial through their nodes is fn to rounding."""
        for _ in range(20):
            values = self._values(left, right)
            tail = np.abs(_fit(values)[:, -2:]).max(axis=1)
            coarse = (tail > _RESOLVED * np.abs(values).max(axis=1)) & (right - left > 1e-6)
            if not coarse.any():
                break
            middle = 0.5 * (left + right)[coarse]
            left, right = np.sort(np.concatenate([left, middle])), np.sort(np.concatenate([right, middle]))
        return left, right

    def _monotone(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cut panels at critical points, and shrink them geometrically towards these."""
        coefficients = _fit(self._values(left, right))
        slope = chebyshev.chebder(coefficients, axis=1)
        size = np.abs(coefficients[:, 1:]).sum(axis=1)
        critical: list[float] = []
        for i in range(left.size):
            if size[i] <= 1e-14 * max(1.0, float(np.abs(coefficients[i, 0]))):
                continue
            row = slope[i].copy()
            row[np.abs(row) < 1e-14 * np.abs(row).max()] = 0.0
            roots = chebyshev.chebroots(np.trim_zeros(row, "b")) if np.count_nonzero(row) else np.zeros(0)
            real = roots[(np.abs(roots.imag) < 1e-5) & (np.abs(roots.real) <= 1 + 1e-9)].real
            critical += (0.5 * (left[i] + right[i]) + 0.5 * (right[i] - left[i]) * real).tolist()
        if not critical:
            return left, right
        steps = _PANEL * 0.5 ** np.arange(_HALVINGS)
        fresh = np.concatenate([[c, *(c - steps), *(c + steps)] for c in critical])
        cuts = np.unique(np.concatenate([left, right, fresh[(fresh > -_REACH) & (fresh < _REACH)]]))
        joint = np.concatenate([[True], np.diff(cuts) > 1e-9])
        cuts = cuts[joint]
        return cuts[:-1], cuts[1:]

    def _cauchy(
        self,
        z: Complex[np.ndarray, " n"],
        weights: np.ndarray,
        residue: Callable[[np.ndarray, np.ndarray], np.ndarray],
        with_slope: bool = False,
    ) -> tuple[Complex[np.ndarray, " n"], Complex[np.ndarray, " n"]]:
        """Sum over panels of the integral of psi(t) / (z - fn(t)), and its derivative if psi is the Gaussian density.

        psi at the nodes is in `weights`; `residue` is psi / fn' at a pole.
        """
        if not self._values_at.size:
            return np.zeros_like(z), np.zeros_like(z)
        nodes = _Sum(self._values_at.ravel(), weights.ravel())
        result, slope = nodes.stieltjes_and_slope(z) if with_slope else (nodes.stieltjes(z), np.zeros_like(z))
        low, high = self._ends.min(axis=0), self._ends.max(axis=0)
        outside = np.maximum(np.maximum(low - z.real[:, None], z.real[:, None] - high), 0.0)
        near = np.hypot(outside, z.imag[:, None]) <= _CLOSE * (high - low)
        for which, panel in _pairs(near):
            t0, ok = self._pole(z[which], panel)
            which, panel, t0 = which[ok], panel[ok], t0[ok]
            share = residue(t0, panel)
            with np.errstate(all="ignore"):
                after, until = self._from_ends(z[which], t0, panel)
                rising = self._ends[1, panel] > self._ends[0, panel]
                exact = np.log(after) - np.log(until)
                exact = np.where(rising, exact, np.conj(np.log(np.conj(after)) - np.log(np.conj(until))))
                inverse = 1.0 / (t0[:, None] - self._nodes[panel])
                rest = exact - (self._weight[panel] * inverse).sum(axis=1)
                # beside a node the sum and what is subtracted from it must see the same distance
                node = np.abs(inverse).argmax(axis=1)
                seen = 1.0 / (z[which] - self._values_at[panel, node])
                same = 1.0 / self._from_node(t0, panel, node)
                weight = weights[panel, node]
                term = share * rest + weight * (same - seen)
                np.add.at(result, which, np.where(np.isfinite(term), term, 0.0))
                if with_slope:
                    first, second = self._derivatives(t0, panel)
                    change = 1.0 / after - 1.0 / until + (self._weight[panel] * inverse**2).sum(axis=1)
                    term = share * (rest * (-t0 - second / first) + change) / first - weight * (same**2 - seen**2)
                    np.add.at(slope, which, np.where(np.isfinite(term), term, 0.0))
        return result, slope

    def _from_ends(self, z: np.ndarray, t: np.ndarray, panel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distance of a pole from its panel's ends; close to an end from the image, which neighbours share."""
        from_ends = []
        for end, value in ((self._left[panel], self._ends[0, panel]), (self._right[panel], self._ends[1, panel])):
            delta = t - end
            close = np.abs(delta) < 1e-8 * (self._right[panel] - self._left[panel])
            if close.any():
                image = np.where(z == value, 1e-300j, z - value)[close]
                delta[close] = image / self._derivatives(t[close], panel[close])[0]
            from_ends.append(delta)
        return from_ends[0], from_ends[1]

    def _from_node(self, t: np.ndarray, panel: np.ndarray, node: np.ndarray) -> np.ndarray:
        """Polynomial at t less its value at a node of the panel, without cancellation."""
        half = 0.5 * (self._right[panel] - self._left[panel])
        x = (t - 0.5 * (self._right[panel] + self._left[panel])) / half
        quotient = (_powers(x)[:, :-1] * self._deflated[panel, node]).sum(axis=1)
        return np.asarray(quotient * (t - self._nodes[panel, node]) / half)

    @cached_property
    def _deflated(self) -> np.ndarray:
        """Coefficients of (p(x) - p(node)) / (x - node) for each panel and node, by synthetic division."""
        x, _ = np.polynomial.legendre.leggauss(_ORDER)
        powers = self._polynomials[0]
        result = np.zeros((powers.shape[0], _ORDER, _ORDER - 1))
        result[:, :, -1] = powers[:, -1:]
        for j in range(_ORDER - 2, 0, -1):
            result[:, :, j - 1] = powers[:, j : j + 1] + x * result[:, :, j]
        return result

    def _pole(self, z: np.ndarray, panel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Solve fn(t) = z on the panel's own polynomial; whether a root was found near the panel."""
        polynomial, slope = self._polynomials[0, panel], self._polynomials[1, panel]
        first, last = self._ends[0, panel], self._ends[1, panel]
        with np.errstate(all="ignore"):
            x = (2 * z - first - last) / (last - first)
            x = np.where(np.abs(x) > 1.5, 1.5 * x / np.abs(x), x)
        size = np.full(x.shape, np.inf)
        todo = np.arange(x.size)
        for _ in range(14):
            here = x[todo]
            powers = _powers(here)
            with np.errstate(all="ignore"):
                step = ((powers * polynomial[todo]).sum(axis=1) - z[todo]) / (powers * slope[todo]).sum(axis=1)
                step = np.where(np.abs(step) > 0.5, 0.5 * step / np.abs(step), step)
            step = np.where(np.isfinite(step), step, 0.0)
            x[todo], far = here - step, np.abs(here) > 3
            before, size[todo] = size[todo], np.abs(step)
            stalled = (size[todo] < 1e-10) & (size[todo] > 0.25 * before)  # all rounding from here
            todo = todo[~((size[todo] < 1e-13) | stalled | far)]
            if not todo.size:
                break
        ok = (np.abs(x) < 2.5) & (size < 1e-8)
        rising = last > first
        half = 0.5 * (self._right[panel] - self._left[panel])
        t = 0.5 * (self._right[panel] + self._left[panel]) + half * x
        # above the axis z has its root above where fn rises, below where it falls; rounding must not say otherwise
        axis = z.imag == 0
        t.imag = np.where(axis & ok, np.where(rising, np.abs(t.imag), -np.abs(t.imag)), t.imag)
        return t, ok

    def _derivatives(self, t: np.ndarray, panel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """fn' and fn'' of the standardised argument, from the panel's polynomial."""
        half = 0.5 * (self._right[panel] - self._left[panel])
        x = (t - 0.5 * (self._right[panel] + self._left[panel])) / half
        first, second = (_powers(x) * self._polynomials[1:, panel]).sum(axis=2)
        return first / half, second / half**2

    def _residue(self, t: np.ndarray, panel: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(-0.5 * t**2) / np.sqrt(2 * np.pi) / self._derivatives(t, panel)[0])

    def stieltjes(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G(z) = E 1/(z - fn(sqrt(variance) Z))."""
        points, below = fold(z)
        flat = points.ravel()
        with np.errstate(all="ignore"):
            result, _ = self._cauchy(flat, self._gauss, self._residue)
            for location, mass in self._atoms:
                result = result + mass / (flat - location)
        return unfold(result.reshape(points.shape), below)

    def stieltjes_and_slope(self, z: Numbers) -> tuple[Complex[np.ndarray, "..."], Complex[np.ndarray, "..."]]:
        """G and G' from one table and one search for poles."""
        points, below = fold(z)
        flat = points.ravel()
        with np.errstate(all="ignore"):
            result, slope = self._cauchy(flat, self._gauss, self._residue, with_slope=True)
            for location, mass in self._atoms:
                result, slope = result + mass / (flat - location), slope - mass / (flat - location) ** 2
        return unfold(result.reshape(points.shape), below), unfold(slope.reshape(points.shape), below)

    def slope(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G'(z) = -E 1/(z - fn)^2."""
        return self.stieltjes_and_slope(z)[1]

    def log_potential(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """L(z) = E log(z - fn), by parts on each panel: Cauchy integrals of the panel's distribution function."""
        points, below = fold(z)
        flat = points.ravel()
        panels = np.arange(self._left.size)
        x, _ = np.polynomial.legendre.leggauss(_ORDER)
        slope = self._slope_at_nodes(x)
        inside = ndtr(self._nodes) - ndtr(self._left)[:, None]

        def residue(t: np.ndarray, panel: np.ndarray) -> np.ndarray:
            return np.asarray(0.5 * (erf(t / np.sqrt(2)) - erf(self._left[panel] / np.sqrt(2))))

        with np.errstate(all="ignore"):
            result, _ = self._cauchy(flat, inside * slope * self._weight, residue)
            last = self._ends[1, panels]
            result = result + np.log(np.where(flat[:, None] == last, 1e-300j, flat[:, None] - last)) @ self._mass
            for location, mass in self._atoms:
                result = result + mass * np.log(flat - location)
        return unfold(result.reshape(points.shape), below)

    def _slope_at_nodes(self, x: np.ndarray) -> np.ndarray:
        half = 0.5 * (self._right - self._left)
        return np.asarray(self._polynomials[1] @ _powers(x).T / half[:, None])

    def cdf(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """Gaussian mass of the set where fn <= x, from its roots on the monotone panels."""
        points = np.asarray(x, dtype=float)
        flat = points.ravel()
        low, high = self._ends.min(axis=0), self._ends.max(axis=0)
        result = (flat[:, None] >= high) @ self._mass
        inside = (flat[:, None] > low) & (flat[:, None] < high)
        for which, panel in _pairs(inside):
            t, _ = self._pole(flat[which].astype(complex), panel)
            t = np.clip(t.real, self._left[panel], self._right[panel])
            rising = self._ends[1, panel] > self._ends[0, panel]
            part = np.where(rising, ndtr(t) - ndtr(self._left[panel]), ndtr(self._right[panel]) - ndtr(t))
            np.add.at(result, which, part)
        for location, mass in self._atoms:
            result = result + mass * (flat >= location)
        lowest, highest = self.bounds()
        result = np.where(flat < lowest, 0.0, np.where(flat >= highest, 1.0, result))
        return np.asarray(np.clip(result, 0.0, 1.0).reshape(points.shape))

    def density(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """Sum over the roots of fn(t) = x of the Gaussian density over |fn'|."""
        points = np.asarray(x, dtype=float)
        flat = points.ravel()
        low, high = self._ends.min(axis=0), self._ends.max(axis=0)
        result = np.zeros(flat.shape)
        for which, panel in _pairs((flat[:, None] >= low) & (flat[:, None] < high)):
            t, _ = self._pole(flat[which].astype(complex), panel)
            t = t.real
            with np.errstate(all="ignore"):
                term = np.exp(-0.5 * t**2) / np.sqrt(2 * np.pi) / np.abs(self._derivatives(t, panel)[0])
            np.add.at(result, which, term.real)
        return result.reshape(points.shape)

    @cached_property
    def _support(self) -> tuple[Interval, ...]:
        low, high = self._ends.min(axis=0), self._ends.max(axis=0)
        scale = float(np.abs(self._ends).max()) if self._ends.size else 0.0
        merged: list[Interval] = []
        for i in np.argsort(low):
            if merged and low[i] <= merged[-1][1] + 1e-12 * scale:
                merged[-1] = (merged[-1][0], max(merged[-1][1], float(high[i])))
            else:
                merged.append((float(low[i]), float(high[i])))
        return tuple(merged)

    def support(self) -> tuple[Interval, ...]:
        """Images of the panels, joined; an unbounded function is cut at 8.5 standard deviations."""
        return self._support

    def atoms(self) -> tuple[Atom, ...]:
        """Values on the pieces where fn is constant."""
        return self._atoms

    def moment(self, k: int) -> float:
        """E fn^k."""
        if k < 0:
            raise ValueError(f"moments are defined here for k >= 0, got k = {k}")
        return float(
            (self._gauss * self._values_at**k).sum() + sum(mass * location**k for location, mass in self._atoms)
        )


class _Sum(Discrete):
    """Nodes with weights of any sign and sum, not sorted: only for its sums."""

    def __init__(self, nodes: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> None:
        self.nodes, self.weights = nodes, weights


def _pairs(near: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Indices of (point, panel) where the mask is set; empty if nowhere."""
    which, panel = np.nonzero(near)
    return [(which, panel)] if which.size else []


def _nodes(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, w = np.polynomial.legendre.leggauss(_ORDER)
    half = 0.5 * (right - left)[:, None]
    return 0.5 * (right + left)[:, None] + half * x, half * w


def _fit(values: np.ndarray) -> np.ndarray:
    """Chebyshev coefficients of the polynomials through values at the Gauss-Legendre nodes."""
    x, _ = np.polynomial.legendre.leggauss(_ORDER)
    return np.asarray(np.linalg.solve(chebyshev.chebvander(x, _ORDER - 1), values.T).T)


def _powers(x: np.ndarray) -> np.ndarray:
    """Powers 0 to 15, one row a point: for few points much faster than any rule of fewer operations."""
    table = np.ones((x.size, _ORDER), dtype=x.dtype)
    table[:, 1:] = x[:, None]
    return np.asarray(np.cumprod(table, axis=1, out=table))


def _derivative(powers: np.ndarray) -> np.ndarray:
    """Of polynomials in powers, one a row, with as many coefficients."""
    result = np.zeros_like(powers)
    result[:, :-1] = powers[:, 1:] * np.arange(1, _ORDER)
    return result


def _gather(values: np.ndarray, mass: np.ndarray, size: float | int) -> tuple[Atom, ...]:
    """Join equal values."""
    atoms: list[Atom] = []
    for i in np.argsort(values):
        if mass[i] <= 0.0:
            continue
        if atoms and values[i] - atoms[-1][0] <= 1e-13 * size:
            atoms[-1] = (atoms[-1][0], atoms[-1][1] + float(mass[i]))
        else:
            atoms.append((float(values[i]), float(mass[i])))
    return tuple(atoms)
