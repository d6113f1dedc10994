"""Laws that are sums of point masses: what measurements give."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from jaxtyping import Complex, Float

from torch_rmt.measures.base import Atom, Interval, SpectralMeasure
from torch_rmt.measures.half_plane import Numbers, fold, unfold

_BLOCK = 1 << 15  # numbers held at once when points meet nodes: a few tables fit the second-level cache


class Discrete(SpectralMeasure):
    """Sum of point masses, rho = sum_i weights_i delta(nodes_i), as measured spectra are.

    Weights default to equal ones and are normalised to sum one; equal nodes are merged; nodes are kept in order.

    Raises:
        ValueError: nodes empty or not finite; weights of another shape, negative, not finite or all zero.

    >>> float(Discrete([0.0, 2.0], [1.0, 3.0]).mean)
    1.5
    """

    def __init__(self, nodes: Numbers, weights: Numbers | None = None) -> None:
        t = np.array(nodes, dtype=float).ravel()
        p = np.ones(t.shape) if weights is None else np.array(weights, dtype=float).ravel()
        if t.size == 0 or not np.all(np.isfinite(t)):
            raise ValueError("Discrete needs at least one node and only finite ones: drop NaN or infinite values first")
        if p.shape != t.shape:
            raise ValueError(f"Discrete needs one weight a node: {t.size} nodes, {p.size} weights")
        if not np.all(np.isfinite(p)) or np.any(p < 0) or p.sum() <= 0:
            raise ValueError("Discrete needs finite weights >= 0 with a positive sum: a law has no negative mass")
        kept = p > 0
        t, inverse = np.unique(t[kept], return_inverse=True)
        p = np.bincount(inverse, weights=p[kept])
        p = p / p.sum()
        t.setflags(write=False)
        p.setflags(write=False)
        self.nodes: Float[np.ndarray, " n"] = t
        self.weights: Float[np.ndarray, " n"] = p

    def __repr__(self) -> str:
        where = ", ".join(f"{t:g}" for t in self.nodes[:3])
        more = f", ... ({len(self.nodes)} in all)" if len(self.nodes) > 3 else ""
        return f"{type(self).__name__}({where}{more})"

    def _blocks(self, z: Complex[np.ndarray, " m"]) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Rows of the table z - nodes, as real and imaginary parts, a cache-sized block at a time."""
        rows = max(1, _BLOCK // self.nodes.size)
        for i in range(0, z.size, rows):
            part = z[i : i + rows, None]
            yield slice(i, i + rows), part.real - self.nodes, part.imag

    def stieltjes(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G(z) = sum_i weights_i / (z - nodes_i)."""
        points = np.asarray(z, dtype=complex)
        flat = points.ravel()
        g = np.empty_like(flat)
        with np.errstate(all="ignore"):
            for rows, d, y in self._blocks(flat):
                q = 1.0 / (d * d + y * y)
                g.imag[rows] = -y[:, 0] * (q @ self.weights)
                q *= d
                g.real[rows] = q @ self.weights
        return g.reshape(points.shape)

    def stieltjes_and_slope(self, z: Numbers) -> tuple[Complex[np.ndarray, "..."], Complex[np.ndarray, "..."]]:
        """Both sums from one table; real arithmetic is several times faster than complex division."""
        points = np.asarray(z, dtype=complex)
        g, slope = self._cauchy_sums(points.ravel(), self.weights[:, None])
        return g.reshape(points.shape), slope.reshape(points.shape)

    def _cauchy_sums(
        self, z: Complex[np.ndarray, " m"], weights: Float[np.ndarray, "n k"]
    ) -> tuple[Complex[np.ndarray, "k m"], Complex[np.ndarray, "k m"]]:
        """Sums of weights / (z - nodes) and their derivatives, one row a column of weights."""
        g, slope = np.empty((2, weights.shape[1], z.size), dtype=complex)
        with np.errstate(all="ignore"):
            for rows, d, y in self._blocks(z):
                q = 1.0 / (d * d + y * y)
                d *= q
                q *= y
                g.real[:, rows], g.imag[:, rows] = (d @ weights).T, -(q @ weights).T
                slope.imag[:, rows] = 2.0 * ((d * q) @ weights).T
                slope.real[:, rows] = ((q - d) * (q + d) @ weights).T
        return g, slope

    @cached_property
    def _moved(self) -> Float[np.ndarray, "n 2"]:
        return np.stack([self.weights, self.weights * self.nodes], axis=1)

    def shift(self, z: Complex[np.ndarray, " m"]) -> tuple[Complex[np.ndarray, " m"], Complex[np.ndarray, " m"]]:
        """h = 1/G - z = -M / G and h', with M = sum_i weights_i nodes_i / (z - nodes_i): no cancellation far out."""
        (g, m), (dg, dm) = self._cauchy_sums(z, self._moved)
        with np.errstate(all="ignore"):
            h = -m / g
            return h, -(dm + h * dg) / g

    def slope(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """G'(z) = -sum_i weights_i / (z - nodes_i)^2."""
        return self.stieltjes_and_slope(z)[1]

    def log_potential(self, z: Numbers) -> Complex[np.ndarray, "..."]:
        """L(z) = sum_i weights_i log(z - nodes_i)."""
        points, below = fold(z)
        flat = points.ravel()
        result = np.empty_like(flat)
        with np.errstate(all="ignore"):
            for rows, d, y in self._blocks(flat):
                result.imag[rows] = np.arctan2(y, d) @ self.weights
                result.real[rows] = 0.5 * np.log(d * d + y * y) @ self.weights
        return unfold(result.reshape(points.shape), below)

    def support(self) -> tuple[Interval, ...]:
        """Empty: there is no continuous part."""
        return ()

    def atoms(self) -> tuple[Atom, ...]:
        """Nodes with their weights."""
        return tuple(zip(self.nodes.tolist(), self.weights.tolist(), strict=True))

    def bounds(self) -> Interval:
        """Smallest and largest node."""
        return float(self.nodes[0]), float(self.nodes[-1])

    def density(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """Zero everywhere: there is no continuous part."""
        return np.zeros(np.shape(np.asarray(x, dtype=float)))

    def cdf(self, x: Numbers) -> Float[np.ndarray, "..."]:
        """Sum of the weights of the nodes <= x."""
        steps = np.concatenate([[0.0], np.cumsum(self.weights)])
        steps[-1] = 1.0
        return np.asarray(steps[np.searchsorted(self.nodes, np.asarray(x, dtype=float), side="right")])

    def quantile(self, p: Numbers) -> Float[np.ndarray, "..."]:
        """Smallest node with F(node) >= p."""
        levels = np.asarray(p, dtype=float)
        if not np.all((levels >= 0) & (levels <= 1)):
            raise ValueError("quantile levels must lie in [0, 1]")
        index = np.searchsorted(np.cumsum(self.weights), levels - 1e-14, side="left")
        return np.asarray(self.nodes[np.minimum(index, self.nodes.size - 1)])

    def moment(self, k: int) -> float:
        """m_k = sum_i weights_i nodes_i^k."""
        if k < 0:
            raise ValueError(f"moments are defined here for k >= 0, got k = {k}")
        return float(self.weights @ self.nodes**k)

    @property
    def variance(self) -> float:
        """Second central moment, without cancellation."""
        return float(self.weights @ (self.nodes - self.mean) ** 2)


class PointMass(Discrete):
    """All the mass at one location: the law of a multiple of the identity.

    >>> PointMass(3.0).atoms()
    ((3.0, 1.0),)
    """

    def __init__(self, location: float | int) -> None:
        super().__init__([location])

    @property
    def location(self) -> float:
        """Where the mass sits."""
        return float(self.nodes[0])


class Bernoulli(Discrete):
    """Two point masses: `high` with probability `mass`, `low` with the rest. By default a projection of that rank.

    >>> Bernoulli(0.25).mean
    0.25
    """

    def __init__(self, mass: float | int, *, low: float | int = 0.0, high: float | int = 1.0) -> None:
        if not 0.0 <= mass <= 1.0:
            raise ValueError(f"the mass of a Bernoulli law must lie in [0, 1], got {mass}")
        super().__init__([low, high], [1.0 - mass, mass])


def empirical(samples: Numbers) -> Discrete:
    """Law of a drawn spectrum: equal weight on every sample.

    >>> float(empirical([1.0, 2.0, 3.0]).mean)
    2.0
    """
    return Discrete(samples)
