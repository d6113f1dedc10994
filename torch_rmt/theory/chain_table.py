"""The solution along one interval of the spectrum as a table that is smooth up to its edges."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Complex, Float

from torch_rmt.theory.chain_parts import State

Knots = Float[np.ndarray, " knots"]
Reals = Float[np.ndarray, " points"]
Points = Complex[np.ndarray, " points"]
Inner = Complex[np.ndarray, "kinds points"]


@dataclass(frozen=True, eq=False)
class Table:
    """log M and log w_k at knots x, ascending, with their slopes in x.

    t = low + (high - low) (1 - cos x) / 2, or high - (top - x)^2 for an interval without lower end, so that what
    leaves an edge like a square root in t is smooth in x.
    """

    low: float
    high: float
    span: float
    x: Knots
    t: Knots
    inside: Bool[np.ndarray, " knots"]
    y: Complex[np.ndarray, " knots"]
    v: Complex[np.ndarray, "kinds knots"]
    slope_y: Complex[np.ndarray, " knots"]
    slope_v: Complex[np.ndarray, "kinds knots"]

    @classmethod
    def over(cls, low: float, high: float, depth: float, size: int) -> Table:
        """An empty table on the interval, `depth` deep where it has no lower end."""
        span = float(np.sqrt(max(depth, 0.1))) if np.isinf(low) else float(np.pi)
        x = span * (np.arange(size) + 0.5) / size
        none = np.full(size, np.nan + 0j)
        rows = np.full((0, size), np.nan + 0j)
        table = cls(low, high, span, x, x, np.zeros(size, dtype=bool), none, rows, none, rows)
        return replace(table, t=table.place(x))

    @property
    def smallest(self) -> float:
        """The step in x at which the search for edges stops and Newton takes over."""
        return self.span / 400

    def place(self, x: Reals) -> Reals:
        """t at x."""
        if np.isinf(self.low):
            return np.asarray(self.high - (self.span - x) ** 2)
        return np.asarray(self.low + (self.high - self.low) * np.sin(x / 2) ** 2)

    def straight(self, t: Reals) -> Reals:
        """x at t."""
        if np.isinf(self.low):
            return np.asarray(self.span - np.sqrt(np.maximum(self.high - t, 0.0)))
        share = (t - self.low) / (self.high - self.low)
        # From the nearer end, so that points close to an edge keep their distance from it.
        lower = 2 * np.arcsin(np.sqrt(np.clip(share, 0, 1)))
        upper = np.pi - 2 * np.arcsin(np.sqrt(np.clip((self.high - t) / (self.high - self.low), 0, 1)))
        return np.asarray(np.where(share < 0.5, lower, upper))

    def _rate(self, x: Reals) -> Reals:
        """dt / dx."""
        if np.isinf(self.low):
            return np.asarray(2 * (self.span - x))
        return np.asarray((self.high - self.low) * np.sin(x) / 2)

    def filled(self, state: State, inside: Bool[np.ndarray, " points"]) -> Table:
        """The table with the solution at its knots."""
        y, v, slope_y, slope_v = self._slopes(self.x, state)
        return replace(self, inside=inside, y=y, v=v, slope_y=slope_y, slope_v=slope_v)

    def _slopes(self, x: Reals, state: State) -> tuple[Points, Inner, Points, Inner]:
        """The solution and its slopes in x."""
        with np.errstate(all="ignore"):
            slope = self._rate(x) / state.rate
            return state.y, state.v, slope, slope[None, :] * state.follow

    def only(self, which: np.ndarray) -> Table:
        """The table at some of its knots."""
        return replace(
            self, x=self.x[which], t=self.t[which], inside=self.inside[which], y=self.y[which], v=self.v[:, which],
            slope_y=self.slope_y[which], slope_v=self.slope_v[:, which],
        )  # fmt: skip

    def inserted(
        self, which: np.ndarray, x: Reals, state: State, inside: np.ndarray, rough: np.ndarray
    ) -> tuple[Table, np.ndarray]:
        """The table with a knot after each of `which`, and the gaps between knots that are still rough."""
        part = Table(self.low, self.high, self.span, x, self.place(x), inside, *self._slopes(x, state))
        order = np.argsort(np.concatenate([self.x, x]), kind="stable")

        def merge(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return np.concatenate([a, b], axis=-1)[..., order]

        marks = np.zeros(len(self.x), dtype=bool)
        marks[which] = rough
        gaps = merge(marks, rough)[:-1]
        whole = replace(
            self, x=merge(self.x, x), t=merge(self.t, part.t), inside=merge(self.inside, inside),
            y=merge(self.y, part.y), v=merge(self.v, part.v), slope_y=merge(self.slope_y, part.slope_y),
            slope_v=merge(self.slope_v, part.slope_v),
        )  # fmt: skip
        return whole, gaps


@dataclass(frozen=True, eq=False)
class Band:
    """One interval of log lambda and its table."""

    low: float
    high: float
    table: Table


def hermite(table: Table, x: Reals) -> tuple[Points, Inner]:
    """(log M, log w) between the knots by cubics; beyond the first and last knot the outermost cubic goes on."""
    at = np.clip(np.searchsorted(table.x, x) - 1, 0, len(table.x) - 2)
    step = table.x[at + 1] - table.x[at]
    s = (x - table.x[at]) / step
    a, b = (1 + 2 * s) * (1 - s) ** 2, s**2 * (3 - 2 * s)
    c, d = s * (1 - s) ** 2 * step, -(s**2) * (1 - s) * step

    def cubic(values: np.ndarray, slopes: np.ndarray) -> np.ndarray:
        return np.asarray(a * values[..., at] + b * values[..., at + 1] + c * slopes[..., at] + d * slopes[..., at + 1])

    return cubic(table.y, table.slope_y), cubic(table.v, table.slope_v)
