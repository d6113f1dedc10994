"""The law of |s(x) + A|^2, A a branch's Jacobian and s a shortcut, as one part of a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Complex, Float

from torch_rmt.theory.chain import Chain
from torch_rmt.theory.chain_kind import Kind
from torch_rmt.theory.chain_parts import Bounds, Flags, Inner, Part, Points, Share, State, joined, log_one_plus
from torch_rmt.theory.series import Other, multiply, revert
from torch_rmt.theory.series import s_series as series_of
from torch_rmt.theory.shortcut import Shortcut as Shortcut
from torch_rmt.theory.slope_law import x_log_x

Reals = Float[np.ndarray, " points"]
Knots = Float[np.ndarray, " knots"]
Rows = Complex[np.ndarray, "unknowns knots"]

_SETTLED = 1e-6  # what Newton's method may leave of an argument
_ROUND = 1e-9  # of an argument: on which side of the negative axis a number counts


@dataclass(frozen=True, eq=False)
class Block(Part):
    """`count` factors with the law of |B + A|^2, scaled to mean one, for an A free of B, of one shape with it.

    The rectangular R-transforms add. With a and b the M of |A|^2 and |B|^2 at their own points, r the input's dimension
    over that of the output, and S_A the branch's S-transform, all in the input's dimension,
        M = a + b,   h = a (1 + r a) S_A(a) = k(b),   1 / S(M) = M (1 + r M) / h,
    so that log M + log(1 + r M) - log h is added to log z. The unknowns are log a, log b and the branch's own. In the
    square case h = G^2, G that of the symmetrised singular laws, which add freely; other shapes: `ProjectionBlock`.

    Fields:
        branch: the equations of |A|^2, in units of its mean.
        log_scale: log of that mean.
        moments: of |A|^2 in its unit.

    Source: Benaych-Georges 2009; Haagerup and Larsen 2000, proposition 3.5 for R-diagonal sums; Nica and Speicher 1996
    for u A, u Haar.
    """

    branch: Chain
    log_scale: float
    shortcut: Shortcut
    scale: float
    count: float
    moments: Float[np.ndarray, " orders"]

    @property
    def mean(self) -> float:
        """Mean of |B + A|^2, of which the law here is in units."""
        return self.shortcut.scale + float(np.exp(self.log_scale))

    def over(self, scale: float, count: float) -> Block:
        """The same block, taken `count` times in a space of dimension n_0 / scale."""
        return replace(self, scale=scale, count=count)

    @property
    def ratio(self) -> float:
        """r."""
        return self.shortcut.ratio

    @property
    def rank(self) -> float:
        """Share of the input's dimensions that is not lost."""
        return 1.0

    @property
    def size(self) -> int:
        """log a, log b, and the branch's unknowns."""
        return 2 + self.branch.unknowns

    @property
    def low(self) -> Bounds:
        """The subordination functions of the symmetrised laws lie in the upper half-plane, their squares anywhere."""
        return np.concatenate([np.full(2, -2 * np.pi), np.where(self.branch.turn[:, 0] > 0, 0.0, -2 * np.pi)])

    @property
    def high(self) -> Bounds:
        """As for `low`."""
        return self.low + 2 * np.pi

    @property
    def turn(self) -> Bounds:
        """a and b lie between -1 and 0 where z < 0."""
        return np.concatenate([np.full(2, -np.pi), self.branch.turn[:, 0]])

    @property
    def has_gaps(self) -> bool:
        """Whether the law may be in pieces: the branch's is, or it keeps away from zero."""
        return self.branch.may_have_gaps or self.branch.lowest < 1.0 or not self.branch.reaches_zero

    # --- equations

    def _branch(self, log_a: Points, v: Inner) -> State:
        """The branch at log a, t with its scale; beyond the negative axis by reflection."""
        turned = log_a.imag < -np.pi - _ROUND
        state = self.branch.evaluate(reflected(log_a, turned), reflected(v, turned))
        fields = {name: np.where(turned, np.conj(getattr(state, name)), getattr(state, name))
                  for name in ("rate", "follow", "correction", "lag")}  # fmt: skip
        t = np.where(turned, np.conj(state.t) + 2j * np.pi, state.t) + self.log_scale
        return State(log_a, v, t, **fields)

    def evaluate(self, y: Points, v: Inner) -> Share:
        """Its share at log M = y."""
        log_u, log_a, log_b = y + np.log(self.scale), v[0], v[1]
        u, a, b = np.exp(log_u), np.exp(log_a), np.exp(log_b)
        inner = self._branch(log_a, v[2:])
        # log h from either side, the branch's unknowns corrected.
        r = self.ratio
        from_a = log_one_plus(a) + log_one_plus(r * a) - inner.t - inner.lag
        rate_a = a / (1.0 + a) + r * a / (1.0 + r * a) - inner.rate
        from_b, rate_b = self.shortcut.evaluate(log_b)
        part = a / (a + b)
        excess, difference = np.log((a + b) / u), from_b - from_a
        determinant = part * rate_b + (1.0 - part) * rate_a
        follow_a, follow_b = rate_b / determinant, rate_a / determinant
        correct_a = ((1.0 - part) * difference - rate_b * excess) / determinant
        correct_b = -(part * difference + rate_a * excess) / determinant
        t = log_u + log_one_plus(r * u) - from_b - np.log(self.mean)
        rate = 1.0 + r * u / (1.0 + r * u) - rate_b * follow_b
        follow = np.concatenate([[follow_a, follow_b], inner.follow * follow_a])
        correction = np.concatenate([[correct_a, correct_b], inner.correction + inner.follow * correct_a])
        return Share(self.count * t, self.count * rate, -self.count * rate_b * correct_b, follow, correction)

    def contained(self, y: Points, v: Inner) -> Flags:
        """Whether the block's own w = (1 + M)(1 + r M) / h lies in the upper half-plane."""
        u = self.scale * np.exp(y)
        angle = (log_one_plus(u) + log_one_plus(self.ratio * u) - self.shortcut.evaluate(v[1])[0]).imag
        good = (angle > -_SETTLED) & (angle < np.pi + _SETTLED)  # zero where the block is alone
        turned = v[0].imag < -np.pi - _ROUND
        log_a, inner = reflected(v[0], turned), reflected(v[2:], turned)
        for part, rows in zip(self.branch.kinds, self.branch.rows, strict=True):
            good &= part.contained(log_a, inner[rows])
        return np.asarray(good)

    def primitive(self, m: Points, v: Inner) -> Points:
        """Integral of its share of t over M, from 0."""
        u, a, b = self.scale * m, np.exp(v[0]), np.exp(v[1])
        turned = v[0].imag < -np.pi - _ROUND
        inside = self.branch.primitive(np.where(turned, np.conj(a), a), reflected(v[2:], turned))
        inside = np.where(turned, np.conj(inside) + 2j * np.pi * a, inside) + self.log_scale * a
        r = self.ratio
        from_a = x_log_x(1.0 + a) + x_log_x(1.0 + r * a) / r - 2.0 * a - inside
        total = x_log_x(u) + x_log_x(1.0 + r * u) / r - 2.0 * u - self.shortcut.primitive(b, v[1]) - from_a
        return np.asarray(self.count * (total - u * np.log(self.mean)) / self.scale)

    # --- real solutions

    @cached_property
    def _smallest(self) -> float:
        """The inner radius squared of the branch, 1 / E|A|^-2."""
        if self.branch.lowest < 1.0 - 1e-12:
            return 0.0
        state = self.branch.start(np.array([-16.0]))
        a = float(np.exp(state.y.real[0]))
        return float(np.exp(self.log_scale - 16.0)) * a / (1.0 - a) if a < 1.0 else 0.0

    @cached_property
    def _meets_zero(self) -> bool:
        """Whether the rings that carry the eigenvalues of A and of B overlap: the density at zero is then positive."""
        other = 0.0 if self.shortcut.gaussian else self.shortcut.scale
        return self._smallest <= self.shortcut.scale and other <= float(np.exp(self.log_scale))

    def order_at(self, lowest: float) -> float:
        """With which power of M + lowest its factor of z vanishes as M falls to -lowest."""
        return self.count if self._meets_zero and abs(self.scale * lowest - 1.0) < 1e-12 else 0.0

    def gapped_below(self, lowest: float) -> bool:
        """Whether its unknowns are analytic where M passes -lowest."""
        return self.scale * lowest < 1.0 - 1e-12 or not self._meets_zero

    @cached_property
    @np.errstate(all="ignore")
    def _above(self) -> tuple[Knots, Rows]:
        """(log u, unknowns) for u > 0: z above the law."""

        def curve(log_a: Knots) -> tuple[Knots, Rows]:
            state = self.branch.kept_state(log_a, 1.0)
            b = self.shortcut.roots(self._square(state))[0]
            return np.log(np.exp(log_a) + b), np.concatenate([[state.y, np.log(b) + 0j], state.v])

        return _rising(curve, np.linspace(-120.0, 40.0, 201))

    @cached_property
    @np.errstate(all="ignore")
    def _negative(self) -> tuple[Knots, Rows]:
        """(log(-u / (1 + u)), unknowns) for -1 < u < 0: z negative, z = -eta^2."""
        grid = np.linspace(-120.0, 120.0, 241)  # log eta^2 in the branch's units
        state = self.branch.kept_start(grid)
        if not self.shortcut.gaussian:
            for _ in range(2):  # finer where the two b of one a meet
                below = 1.0 + 4.0 * self.shortcut.scale * self._square(state) < 0
                fold = np.flatnonzero(below[1:] != below[:-1])
                if not len(fold):
                    break
                fine = np.concatenate([np.linspace(grid[i], grid[i + 1], 26)[1:-1] for i in fold])
                order = np.argsort(np.concatenate([grid, fine]), kind="stable")
                grid = np.concatenate([grid, fine])[order]
                state = joined(state, self.branch.start(fine), order)
        places, columns = [], []
        a, square = -np.exp(state.y.real), self._square(state)
        for b in self.shortcut.roots(square):
            rest = 1.0 + a + b
            # 1 + M = eta |G| without cancellation where b is near -1.
            good = (b < 0) & (b > -1.0) & (rest > 0) & np.isfinite(square)
            places.append(np.log((-a - b)[good]) - np.log(rest[good]))
            log_b = np.log(-b) - 1j * np.pi
            columns.append(np.concatenate([[state.y, log_b], state.v])[:, good])
        return _ascending(np.concatenate(places), np.concatenate(columns, axis=1))

    @cached_property
    @np.errstate(all="ignore")
    def _below(self) -> tuple[Knots, Rows]:
        """(log(-1 - u), unknowns) for u < -1: z between zero and a law that ends above it."""

        def within(grid: Knots) -> tuple[Knots, Rows]:  # below the branch's law
            state = self.branch.kept_state(np.log1p(np.exp(grid)), -1.0)
            b = self.shortcut.roots(self._square(state))[0]
            return np.log(np.exp(grid) - b), np.concatenate([[state.y, np.log(b) - 2j * np.pi], state.v])

        def beyond(log_a: Knots) -> tuple[Knots, Rows]:  # above it, on the other side of the axis
            state = self.branch.kept_state(log_a, 1.0)
            upper, b = self.shortcut.roots(self._square(state))
            turned = np.where(self.branch.turn > 0, 2j * np.pi, -2j * np.pi)
            unknowns = [state.y - 2j * np.pi, np.log(-b) - 1j * np.pi]
            return np.log(upper - np.exp(log_a)), np.concatenate([unknowns, state.v + turned])

        return _rising(within if self._smallest > self.shortcut.scale else beyond, np.linspace(-60.0, 40.0, 161))

    def _square(self, state: State) -> Reals:
        """G^2 = (1 + a)^2 / w_A at real points of the branch, negative with z."""
        sign = np.where((state.y.imag < -1.0) & (np.exp(state.y.real) < 1.0), -1.0, 1.0)
        a = np.where(state.y.imag < -1.0, -1.0, 1.0) * np.exp(state.y.real)
        return np.asarray(sign * np.exp(2.0 * np.log(np.abs(1.0 + a)) - state.t.real - self.log_scale))

    @np.errstate(all="ignore")
    def start(self, m: Reals) -> Inner:
        """The unknowns at real M, from tables along real a and Newton's method."""
        u = self.scale * m
        v = np.full((self.size, len(m)), np.nan + 0j)
        y = np.log(np.abs(m)) - 1j * np.pi * (m < 0)
        for where, name, place in self._regions(u):
            at = np.flatnonzero(where)
            if not len(at):
                continue
            knots, rows = getattr(self, name)
            if len(knots) < 2:
                continue
            # Above and below the law the real solutions end where M, as a function of a, turns back.
            at = at[(place[at] <= knots[-1]) | (name == "_negative")]
            near = np.clip(np.searchsorted(knots, place[at]), 0, len(knots) - 1)
            guess = np.array([_follow(place[at], knots, row.real) for row in rows]) + 1j * rows.imag[:, near]
            v[:, at] = self._settled(y[at], guess)
        return v

    def _regions(self, u: Reals) -> list[tuple[Flags, str, Reals]]:
        """Where each table holds, its name, and the places in it."""
        regions = [(u > 0, "_above", np.log(u)), ((u < 0) & (u > -1), "_negative", np.log(-u) - np.log1p(u))]
        return regions if self._meets_zero else [*regions, (u < -1, "_below", np.log(-1.0 - u))]

    def _settled(self, y: Points, v: Inner) -> Inner:
        """Newton at real M; NaN where it does not come to rest."""
        size = np.full(y.shape, np.inf)
        for _ in range(40):
            correction = self.evaluate(y, v).correction.real
            size = np.abs(correction).max(axis=0)
            if not (size > 1e-12).any():
                break
            v = v + correction * np.minimum(1.0, 0.5 / np.maximum(size, 1e-300))
        return np.where(size < 1e-5, v, np.nan)

    # --- moments and atoms

    @property
    def at_shortcut(self) -> float:
        """Mass of the law at the shortcut's own value, where a branch of low rank leaves more than half untouched."""
        return 0.0 if self.shortcut.gaussian else max(0.0, self.rank - 2.0 * self.branch.lowest)

    def s_series(self) -> Other:
        """S(M) as a power series, from the branch's moments."""
        size = len(self.moments)
        branch = np.append(series_of(self.moments), 0.0) * np.exp(-self.log_scale)
        linear, term, composed = np.zeros(size), np.zeros(size), np.zeros(size)
        linear[1:3], term[0] = (1.0, self.ratio), 1.0
        square = multiply(linear, branch)  # h in powers of a, known to the last order
        total = self.shortcut.series(square)
        total[1] += 1.0
        a_of_m = revert(total)
        for coefficient in square[1:]:
            term = multiply(term, a_of_m)
            composed += coefficient * term
        # S = h / (M (1 + r M))
        return np.asarray(multiply(composed[1:], (-self.ratio) ** np.arange(size - 1)))


def sharing(block: Block, others: Sequence[Block]) -> Block:
    """The block with the branch of another one that differs in its scale at most: its tables are made but once."""
    return next((replace(block, branch=other.branch) for other in others if _same(block.branch, other.branch)), block)


def _same(one: Chain, other: Chain) -> bool:
    if one.terms != other.terms or one.lowest != other.lowest or len(one.kinds) != len(other.kinds):
        return False
    return all(
        isinstance(a, Kind) and isinstance(b, Kind) and (a.scale, a.count) == (b.scale, b.count)
        and np.array_equal(a.law.nodes, b.law.nodes) and np.array_equal(a.law.weights, b.law.weights)
        for a, b in zip(one.kinds, other.kinds, strict=True)
    )  # fmt: skip


def reflected(values: np.ndarray, turned: np.ndarray) -> np.ndarray:
    """Logarithms, those beyond the negative axis by their mirror images: arguments theta by 2 pi - theta."""
    sign = np.where(values.imag < 0, -1.0, 1.0)
    return np.asarray(np.where(turned, np.conj(values) + 2j * np.pi * sign, values))


def _rising(curve: Callable[[Knots], tuple[Knots, Rows]], grid: Reals) -> tuple[Knots, Rows]:
    """The curve at its first finite points, as long as its places rise; closer together where they stop."""
    places, rows = curve(grid)
    for step in range(4):
        good = np.isfinite(places) & np.isfinite(rows).all(axis=0)
        grid, places, rows = grid[good], places[good], rows[:, good]
        falls = np.flatnonzero(~(np.diff(places) > 0))
        if step == 3 or not len(falls) or falls[0] == 0:
            break
        at = int(falls[0])
        fine = np.setdiff1d(np.linspace(grid[at - 1], grid[at + 1], 13), grid)
        more, columns = curve(fine)
        order = np.argsort(np.concatenate([grid[: at + 2], fine]), kind="stable")
        grid = np.concatenate([grid[: at + 2], fine])[order]
        places = np.concatenate([places[: at + 2], more])[order]
        rows = np.concatenate([rows[:, : at + 2], columns], axis=1)[:, order]
    end = int(falls[0]) + 1 if len(falls) else len(places)
    return places[:end], rows[:, :end]


def _ascending(places: Reals, rows: Inner) -> tuple[Knots, Rows]:
    """The finite points in order."""
    good = np.isfinite(places) & np.isfinite(rows).all(axis=0)
    order = np.argsort(places[good], kind="stable")
    places, rows = places[good][order], rows[:, good][:, order]
    keep = np.concatenate([[True], np.diff(places) > 1e-12]) if len(places) else np.zeros(0, dtype=bool)
    return places[keep], rows[:, keep]


def _follow(x: Reals, knots: Knots, values: Knots) -> Reals:
    """Linear interpolation, going on beyond the ends."""
    first = values[0] + (x - knots[0]) * (values[1] - values[0]) / (knots[1] - knots[0])
    last = values[-1] + (x - knots[-1]) * (values[-1] - values[-2]) / (knots[-1] - knots[-2])
    inside = np.interp(x, knots, values)
    return np.asarray(np.where(x > knots[-1], last, np.where(x < knots[0], first, inside)))
