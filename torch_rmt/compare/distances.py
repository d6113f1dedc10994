"""Distances between a measured point measure and a law that is known by its distribution function."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from torch_rmt.measures import SpectralMeasure
from torch_rmt.spectra import Spectrum

_GRID = 1600  # points over the law's support; the trapezoid error in W1 is then below 1e-5 of the support's width
_DECADES = 14.0  # a positive law is tabulated geometrically over this many decades below its upper end


def numerical_zero(spectrum: Spectrum) -> float:
    """Size below which a measured eigenvalue cannot be told from zero.

    float32 products lose eps * sqrt(dim) * |largest|; a squared singular value from a dense decomposition
    loses the square of that.
    """
    relative = float(np.finfo(np.float32).eps) * np.sqrt(spectrum.dim)
    if not spectrum.symmetric and spectrum.seed is None:
        relative = relative**2
    return float(relative * np.abs(spectrum.nodes[spectrum.weights > 0]).max(initial=0.0))


def points(spectrum: Spectrum) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Nodes in ascending order and their weights, averaged over the probes."""
    used = spectrum.weights > 0
    nodes = spectrum.nodes[used].astype(np.float64)
    weights = (spectrum.weights[used] / spectrum.weights.sum()).astype(np.float64)
    order = np.argsort(nodes, kind="stable")
    return nodes[order], weights[order]


class Tabulated:
    """A law's distribution function on a grid, from both sides, so that several distances share one table.

    `right` is F(x) and `left` is F(x-); they differ at atoms. The nodes of the measurement lie on the grid.
    """

    def __init__(self, law: SpectralMeasure, nodes: Float[np.ndarray, " n"], zero: float = 0.0) -> None:
        self.law = law
        self.atoms = law.atoms()
        self.windows = atom_windows(law, zero)
        self.x = np.unique(np.concatenate([_grid(law), nodes, self.windows.ravel()]))
        self.right = _cdf(law, self.x)
        self.left = self.right.copy()
        for location, mass in self.atoms:
            self.left[self.x == location] -= mass

    def kolmogorov(self, nodes: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> float:
        """As the function `kolmogorov`, without another evaluation of the law."""
        return _largest_gap(nodes, weights, self.x, self.left, self.right, self.windows)

    def positive_quantiles(self, levels: Float[np.ndarray, " n"], above: float) -> Float[np.ndarray, " n"]:
        """Quantiles of the law given x > above."""
        keep = self.x > above
        start = float(self.left[keep][0]) if keep.any() else 1.0
        wanted = start + levels * (1.0 - start)
        x, right = self.x[keep], np.maximum.accumulate(self.right[keep])
        steps, first = np.unique(right, return_index=True)
        return np.asarray(np.exp(np.interp(wanted, steps, np.log(x[first]))))

    def log_mean(self, above: float) -> float:
        """E[log x | x > above]."""
        x, mass = self._cells(above)
        return float((mass * np.log(x)).sum() / mass.sum()) if mass.sum() > 0 else float("nan")

    def log_deviation(self, above: float) -> float:
        """Standard deviation of log x given x > above; zero where nothing is above."""
        x, mass = self._cells(above)
        if mass.sum() <= 0:
            return 0.0
        return float(np.sqrt((mass * (np.log(x) - self.log_mean(above)) ** 2).sum() / mass.sum()))

    def quantile(self, p: float) -> float:
        """Smallest point of the grid with F(x) >= p."""
        return float(self.x[min(int(np.searchsorted(self.right, p - 1e-12)), self.x.size - 1)])

    def _cells(self, above: float) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Geometric middles of the cells above a positive point and their masses, atoms appended."""
        keep = self.x > above
        x, left, right = self.x[keep], self.left[keep], self.right[keep]
        atoms = np.array([atom for atom in self.atoms if atom[0] > above], dtype=np.float64).reshape(-1, 2)
        middle = np.concatenate([np.sqrt(x[1:] * x[:-1]), atoms[:, 0]])
        mass = np.concatenate([np.maximum(left[1:] - right[:-1], 0), atoms[:, 1]])
        return middle, mass


def _cdf(law: SpectralMeasure, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Distribution function at ascending points, 0 and 1 outside the law's bounds; a solver that failed is caught."""
    low, high = law.bounds()
    values = np.asarray(law.cdf(x), dtype=np.float64)
    values = np.where(x < low, 0.0, np.where(x >= high, 1.0, values))
    if not np.isfinite(values).all() or (np.diff(values) < -1e-4).any():
        raise ArithmeticError(
            f"the distribution function of {type(law).__name__} is not finite or falls: its solver failed"
        )
    return values


def _grid(law: SpectralMeasure) -> Float[np.ndarray, " n"]:
    pieces = [np.array([location for location, _ in law.atoms()], dtype=np.float64)]
    intervals = law.support()
    for low, high in intervals:
        n = max(_GRID // len(intervals), 64)
        # Square-root edges need points that crowd there.
        pieces.append(low + (high - low) * (0.5 - 0.5 * np.cos(np.linspace(0, np.pi, n))))
        if low >= 0 and high > 30 * max(low, 0.0):
            start = max(low, high * 10.0**-_DECADES)
            pieces.append(np.append(np.geomspace(start, high, n)[:-1], high))
    return np.concatenate(pieces)


def kolmogorov(
    nodes: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
    law: SpectralMeasure,
    *,
    zero: float = 0.0,
) -> float:
    """Kolmogorov distance sup_x |F_n(x) - F(x)|, with F taken on both sides of every step; exact.

    Eigenvalues within `zero` of 0, and within a relative 1e-5 of any atom of the law, count as lying on it:
    the supremum leaves these windows out, so an atom that the measurement spreads over rounding errors costs
    nothing.

    Args:
        nodes: ascending.
        weights: non-negative, sum one.
        law: anything with `cdf` and `atoms`.
        zero: half the width of the window at 0, from `numerical_zero`.

    >>> from torch_rmt.measures import PointMass
    >>> kolmogorov(np.array([0.0, 1.0]), np.array([0.5, 0.5]), PointMass(1.0))
    0.5
    """
    windows = atom_windows(law, zero)
    x = np.unique(np.concatenate([nodes, windows.ravel(), [location for location, _ in law.atoms()]]))
    right = _cdf(law, x)
    left = right.copy()
    for location, mass in law.atoms():
        left[x == location] -= mass
    return _largest_gap(nodes, weights, x, left, right, windows)


def atom_windows(law: SpectralMeasure, zero: float) -> Float[np.ndarray, "windows 2"]:
    """Intervals around 0 and the law's atoms inside which measured eigenvalues count as lying on them."""
    windows = [(-zero, zero)]
    windows += [(a - max(zero, 1e-5 * abs(a)), a + max(zero, 1e-5 * abs(a))) for a, _ in law.atoms()]
    return np.array(windows, dtype=np.float64)


def _largest_gap(
    nodes: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
    x: Float[np.ndarray, " m"],
    left: Float[np.ndarray, " m"],
    right: Float[np.ndarray, " m"],
    windows: Float[np.ndarray, "windows 2"],
) -> float:
    cumulative = np.concatenate([[0.0], np.cumsum(weights)])
    step_right = cumulative[np.searchsorted(nodes, x, side="right")]
    step_left = cumulative[np.searchsorted(nodes, x, side="left")]
    # Inside a window neither side counts; at its lower end only the left limit, at its upper only the right.
    see_left = np.ones(x.size, dtype=bool)
    see_right = np.ones(x.size, dtype=bool)
    for low, high in windows:
        if high > low:
            see_left &= ~((x > low) & (x <= high))
            see_right &= ~((x >= low) & (x < high))
    gaps = [np.abs(left - step_left)[see_left], np.abs(right - step_right)[see_right], np.zeros(1)]
    return float(np.concatenate(gaps).max())


def wasserstein(
    nodes: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], law: SpectralMeasure | Tabulated
) -> float:
    """Wasserstein-1 distance, the integral of |F_n(x) - F(x)| dx, in units of the eigenvalues.

    F is taken as linear between neighbouring points of a grid of 800 and more, crowded at the edges, with
    every node and atom on it; the integral of that is exact, sign changes included.

    >>> from torch_rmt.measures import PointMass
    >>> wasserstein(np.array([0.0, 3.0]), np.array([0.5, 0.5]), PointMass(1.0))
    1.5
    """
    table = law if isinstance(law, Tabulated) else Tabulated(law, nodes)
    cumulative = np.concatenate([[0.0], np.cumsum(weights)])
    step = cumulative[np.searchsorted(nodes, table.x, side="right")][:-1]
    start, end = table.right[:-1] - step, table.left[1:] - step
    size = np.abs(start) + np.abs(end)
    crosses = start * end < 0
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(crosses, (start**2 + end**2) / (2 * size), size / 2)
    return float((np.diff(table.x) * mean).sum())


def relative_scale(
    nodes: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], table: Tabulated, zero: float
) -> float:
    """How much larger the measured eigenvalues are than the law's, one factor; NaN where it has no meaning.

    Positive laws: geometric mean of the ratios of the quantiles from 25 % to 75 % of what is not numerically
    zero (the whole geometric mean hangs on the few smallest). Others: ratio of the root mean squares.
    """
    low, _ = table.law.bounds()
    if low >= -zero and nodes[0] >= -zero:
        positive = nodes > zero
        if not positive.any():
            return float("nan")
        x, mass = nodes[positive], weights[positive] / weights[positive].sum()
        levels = np.linspace(0.25, 0.75, 101)
        middles = np.cumsum(mass) - mass / 2
        measured = np.interp(levels, middles, np.log(x))
        return float(np.exp(np.mean(measured - np.log(table.positive_quantiles(levels, zero)))))
    square = table.law.moment(2)
    return float(np.sqrt((weights * nodes**2).sum() / square)) if square > 0 else float("nan")
