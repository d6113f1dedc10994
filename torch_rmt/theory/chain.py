"""The Jacobian law of unlike layers: certified Newton on an arrowhead system, led by a refined table (solver B)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float

from torch_rmt.theory.chain_equations import ChainEquations
from torch_rmt.theory.chain_parts import Inner, Points, State, put, take
from torch_rmt.theory.chain_table import Band, Table, hermite

Reals = Float[np.ndarray, " points"]
Flags = Bool[np.ndarray, " points"]

_LOST = 1e-4  # of the mass may lie below where the continuation stalls
_DEEPEST = 680.0  # lambda underflows beyond this distance below the top, in logs
_COARSE = 17  # points that are led in from the negative axis; the others start from their neighbours
_FINEST = 1500  # points of a table at most
_HALVINGS = 24  # of a gap between points of a table at most
_CLOSE = 3e-7  # error of the table's interpolation in log M that one Newton step then squares
_THIN = 1e-10  # where less than this share of M is imaginary, the spectrum is taken as left


@dataclass(frozen=True, eq=False)
class Chain(ChainEquations):
    """The solver of the master equation for factors of any kinds.

    On the axis inside the spectrum a solution with M in the open lower and every w_k in the open upper half-plane, all
    logarithms principal, is the only one: z and each w_k are then subordination functions at the fixed point of a
    self-map of the half-plane (Belinschi and Bercovici 2007), whose angles add up, arg((1 + M) / M) =
    sum_k [arg((1 + u_k) / u_k) - arg w_k], every bracket positive. So Newton may start anywhere: what it finds is
    checked, and only what fails the check is led in from the negative axis, where all is real and monotone, by turning
    z at fixed |z|.
    """

    # --- solutions off the axis

    @cached_property
    def _negative_table(self) -> tuple[Reals, Points, Inner]:
        """(t, y, v) on the negative axis of z, where all is real and monotone."""
        grid = np.concatenate([np.linspace(-300.0, -40.0, 27), np.linspace(-38.0, 28.0, 67)])
        # M from 0 to -lowest by a logistic in the grid, both ends resolved.
        y = np.log(self.lowest) - np.logaddexp(0.0, -grid)
        state = self.real_state(y, -1.0)
        with np.errstate(all="ignore"):
            # Where an unknown runs off as M comes near its end, rounding of M moves it far.
            off = np.abs(state.correction) / np.maximum(1.0, np.abs(state.follow))
        good = np.isfinite(state.t.real) & (off.max(axis=0, initial=0.0) < 1e-3)
        t, order = np.unique(state.t.real[good], return_index=True)
        return t, state.y[good][order], state.v[:, good][:, order]

    @np.errstate(all="ignore")  # what does not settle is refused later
    def start(self, t: Reals) -> State:
        """The solution at z = -exp(t)."""
        knots, y_knots, v_knots = self._negative_table

        def follow(values: Float[np.ndarray, " knots"]) -> Reals:
            # Logarithms are linear in t beyond the table.
            first = values[0] + (t - knots[0]) * (values[1] - values[0]) / (knots[1] - knots[0])
            last = values[-1] + (t - knots[-1]) * (values[-1] - values[-2]) / (knots[-1] - knots[-2])
            inside = np.where(t > knots[-1], last, np.interp(t, knots, values))
            return np.asarray(np.where(t < knots[0], first, inside))

        y = follow(y_knots.real) - 1j * np.pi
        v = np.array([follow(row.real) for row in v_knots]).reshape(self.unknowns, len(t)) + 1j * self.turn
        state = self.evaluate(y, v)
        for _ in range(12):
            dy, dv = self.newton(state, t + 1j * np.pi)
            size = np.maximum(np.abs(dy), np.abs(dv).max(axis=0, initial=0.0))
            if not size.max(initial=0.0) > 1e-13:
                break
            cut = np.minimum(1.0, 0.5 / np.maximum(size, 1e-300))
            new_y = np.minimum((state.y + cut * dy).real, np.log(self.lowest) - 1e-18) - 1j * np.pi
            state = self.evaluate(new_y, (state.v + cut * dv).real + 1j * self.turn)
        return state

    def kept_start(self, t: Reals) -> State:
        """`start`, computed once for blocks that share a branch."""
        key = 0.0, t.tobytes()
        if key not in self._kept:
            self._kept[key] = self.start(t)
        return self._kept[key]

    def above(self, log_z: Points) -> tuple[State, Flags]:
        """The solution at log z in the strip 0 <= Im <= pi, and whether it is inside the half-planes.

        On the axis outside the spectrum, and where there is less of it than quadrature can tell from nothing, the
        solution is on their border. NaN where the continuation did not get through.
        """
        state = self.start(log_z.real)
        height, ratio = np.full(len(log_z), np.pi), np.full(len(log_z), 0.4)
        on_axis = log_z.imag == 0
        for _ in range(120):
            active = (height > log_z.imag) & (ratio < 0.98) & ~(on_axis & (height < 1e-9))
            # On the axis a leap is certified wherever it comes from; elsewhere it is but a small last step.
            leap = np.flatnonzero(active & np.where(on_axis, height < 0.6, height - log_z.imag < 1e-3))
            for which, share in ((leap, 0.0), (None, 1.0)):
                which = np.flatnonzero(active & (height > log_z.imag)) if which is None else which
                if not len(which):
                    continue
                aim = log_z.imag[which] + share * ratio[which] * (height[which] - log_z.imag[which])
                here, goal = log_z.real[which] + 1j * height[which], log_z.real[which] + 1j * aim
                moved, good = self._step(take(state, which), here, goal)
                state = put(state, which[good], take(moved, good))
                height[which[good]] = aim[good]
                if share:
                    ratio[which] = np.where(good, np.maximum(0.05, ratio[which] ** 1.3), np.sqrt(ratio[which]))
            if not active.any():
                break
        failed = ~(height == log_z.imag)
        inside = ~failed & self._inside(state)
        # As good as on the axis: what is left of the angle is less than what counts.
        failed &= ~((log_z.imag < 1e-6) & (height < 1e-6))
        return (put(state, failed, take(state, failed, lost=True)) if failed.any() else state), inside

    def _step(self, state: State, here: Points, goal: Points) -> tuple[State, Flags]:
        """Newton at the goal from the solution here, and whether it may be believed."""
        with np.errstate(all="ignore"):
            dy = (goal - here) / state.rate
            dy *= np.minimum(1.0, 0.7 / np.abs(dy))
            new, size = self._polish(state.y + dy, state.v + dy[None, :] * state.follow, goal, 9)
            on_axis = goal.imag == 0
            inside = self._inside(new, size)
            shut = (new.y.imag <= 1e-9) & (new.y.imag >= -np.pi - 1e-9)
            shut &= ((new.v.imag >= self.low - 1e-9) & (new.v.imag <= self.high + 1e-9)).all(axis=0)
            shut &= self._contained(new)
        return new, np.asarray((size < 1e-8) & np.where(on_axis, inside, shut))

    def _contained(self, state: State) -> Flags:
        """Whether every part says that its unknowns are where they belong."""
        good = np.ones(state.y.shape, dtype=bool)
        for kind, rows in zip(self.kinds, self.rows, strict=True):
            good &= kind.contained(state.y, state.v[rows])
        return good

    def _inside(self, state: State, size: Reals | float = 0.0) -> Flags:
        """Whether M and all w_k lie in the open half-planes, beyond what quadrature and rounding may fake.

        `size` is Newton's last step: one that is not small beside the distance from the border may be on its way to a
        real solution, as in a gap.
        """
        far = np.maximum(_THIN, 4.0 * size)
        inside = (-state.y.imag > far) & (state.y.imag > far - np.pi)
        inside &= ((state.v.imag > self.low) & (state.v.imag < self.high)).all(axis=0)
        return np.asarray(inside & self._contained(state))

    def _polish(self, y: Points, v: Inner, target: Points, steps: int) -> tuple[State, Reals]:
        """Newton, kept within the half-planes; the state and the size of the last step."""
        state = State(y, v, y, y, v, v, y)
        sizes = np.full(y.shape, np.inf)
        active = np.arange(len(y))
        with np.errstate(all="ignore"):
            for _ in range(steps):
                here = self.evaluate(state.y[active], state.v[:, active])
                dy, dv = self.newton(here, target[active])
                size = np.maximum(np.abs(dy), np.abs(dv).max(axis=0, initial=0.0))
                cut = np.minimum(1.0, 0.5 / np.maximum(size, 1e-300))
                new_y, new_v = here.y + cut * dy, here.v + cut * dv
                # Steps that would leave the half-planes go three quarters of the way to their border.
                low_y, high_y = -np.pi + (np.pi + here.y.imag) / 4, here.y.imag / 4
                low_v = self.low + (here.v.imag - self.low) / 4
                high_v = self.high - (self.high - here.v.imag) / 4
                new_y = new_y.real + 1j * np.clip(new_y.imag, np.minimum(low_y, high_y), np.maximum(low_y, high_y))
                new_v = new_v.real + 1j * np.clip(new_v.imag, low_v, high_v)
                state = put(state, active, replace(here, y=new_y, v=new_v))
                sizes[active] = np.where(np.isfinite(size), size, np.inf)
                # After a step of this size the error is its square, over the distance from the nearest branch point.
                margin = np.minimum(np.minimum(-here.y.imag, np.pi + here.y.imag), 1.0)
                active = active[~(size <= 1e-7 * np.maximum(margin, 1e-8)) & np.isfinite(size)]
                if not len(active):
                    break
        return state, sizes

    # --- tables

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        """The intervals of the spectrum, each with its table."""
        low, top = self.bottom, self.top
        if top - low < 1e-13:
            return ()
        depth = self._depth(top) if np.isinf(low) else 0.0
        table = self._refined(Table.over(low, top, depth, _COARSE))
        found = np.flatnonzero(table.inside)
        if not len(found):
            raise ArithmeticError("no point of the spectrum was found between its ends: are the layers' laws points?")
        # Before the first point inside there is no mass, or less than quadrature can tell from none.
        pieces = np.split(found, np.flatnonzero(np.diff(found) > 1) + 1)
        while np.isinf(low) and len(pieces) > 1 and (np.pi + table.y[pieces[0]].imag).max() < 1e-7:
            pieces = pieces[1:]  # what quadrature lets flicker where no mass is left
        lost = np.isnan(table.y)
        while (
            len(pieces) > 1 and lost[pieces[0][-1] : pieces[1][0]].any() and self._below(table.t[pieces[1][0]]) < _LOST
        ):
            pieces = pieces[1:]  # no gap: the continuation did not get through, so far down that little is left
        found = np.concatenate(pieces)
        if len(pieces) == 1 or not self.may_have_gaps:
            first = int(found[0])
            if self.may_have_gaps and first > 0 and np.pi + table.y[first].imag > 1e-6:
                # It begins at an edge, with less mass below it than can be told from none.
                begin = self._edge(table, first, first - 1)
                part = self._refined(Table.over(begin, top, 0.0, 2 * _COARSE))
                return (Band(begin, top, part.only(np.flatnonzero(part.inside))),)
            return (Band(low, top, table.only(found)),)
        ends = [low]
        for before, after in pairwise(pieces):
            last, first = int(before[-1]), int(after[0])
            ends += [self._edge(table, last, last + 1), self._edge(table, first, first - 1)]
        ends.append(top)
        bands = []
        for begin, end in zip(ends[::2], ends[1::2], strict=True):
            if not end > begin:
                continue
            part = self._refined(Table.over(begin, end, depth - (top - end), 2 * _COARSE))
            here = np.flatnonzero(part.inside)
            if len(here) > 1:
                bands.append(Band(begin, end, part.only(here)))
        return tuple(bands)

    def _below(self, t: float) -> float:
        """A bound on the mass below exp(t): 2 E[x / (x + lambda)]."""
        knots, y_knots, _ = self._negative_table
        return float(-2.0 * np.expm1(np.interp(t, knots, y_knots.real) - np.log(self.lowest)))

    def _depth(self, top: float) -> float:
        """How far below the top to look: to where 1e-12 of the mass is left, or lambda underflows."""
        knots, y_knots, _ = self._negative_table
        # lowest + M(-x) = E[x / (x + lambda)], lambda > 0: at least half of the mass below x.
        left = -np.expm1(y_knots.real - np.log(self.lowest))
        enough = np.flatnonzero(left < 2e-12)
        bottom = knots[enough[-1]] if len(enough) else knots[0]
        return float(min(max(top - bottom, 3.0), _DEEPEST))

    def _refined(self, table: Table) -> Table:
        """The table solved, with points put in until its interpolation is good."""
        table = table.filled(*self.above(table.t + 0j))
        rough = np.ones(len(table.t) - 1, dtype=bool)
        for _ in range(_HALVINGS):
            # What is left rough costs accuracy of the guess alone: every solution is certified for itself.
            which = np.flatnonzero(rough)[: _FINEST - len(table.t)]
            if not len(which):
                break
            x = (table.x[which] + table.x[which + 1]) / 2
            between = table.inside[which] & table.inside[which + 1]
            t = table.place(x)
            y, v = hermite(table, x)
            y, v, between = y.copy(), v.copy(), between & np.isfinite(y)
            state, good = self._certified(y, v, t, between)
            if not good.all():
                lost = ~good
                sure, good[lost] = self.above(t[lost] + 0j)
                state = put(state, lost, sure)
            with np.errstate(all="ignore"):
                error = np.maximum(np.abs(state.y - y), np.abs(state.v - v).max(axis=0, initial=0.0))
            error = np.where(good & between, error, np.inf)
            # Between two points outside, or a point outside and one inside, half a step in x is all that is asked.
            fine = (error < 16 * _CLOSE) | (~(good & between) & (np.diff(table.x)[which] < table.smallest))
            outside = ~good & ~table.inside[which] & ~table.inside[which + 1]
            fine |= outside & (np.diff(table.x)[which] < 16 * table.smallest)
            rough_new = ~fine
            table, rough = table.inserted(which, x, state, good, rough_new)
        return table

    def _certified(self, y: Points, v: Inner, t: Reals, which: Flags) -> tuple[State, Flags]:
        """Newton on the axis for some of the points, and which of all came to rest inside the half-planes."""
        good = np.zeros(len(t), dtype=bool)
        empty = np.full(len(t), np.nan + 0j)
        rows = np.full((self.unknowns, len(t)), np.nan + 0j)
        state = State(empty, rows, empty, empty, rows, rows, empty)
        at = np.flatnonzero(which)
        if len(at):
            start_y = y[at].real + 1j * np.clip(y[at].imag, -np.pi + 1e-12, -1e-12)
            start_v = v[:, at].real + 1j * np.clip(v[:, at].imag, self.low + 1e-12, self.high - 1e-12)
            found, size = self._polish(start_y, start_v, t[at] + 0j, 12)
            state = put(state, at, found)
            good[at] = (size < 1e-7) & self._inside(found, size)
        return state, good

    def _edge(self, table: Table, inner: int, outer: int) -> float:
        """The edge between a point of the table inside the spectrum and its neighbour outside: dt / dy = 0."""
        y, v = table.y[[inner]], table.v[:, [inner]]
        at, beyond = float(table.t[inner]), float(table.t[outer])
        for _ in range(8):
            low, high = sorted((at, beyond))
            slack = high - low
            aim = np.where(y.imag < -np.pi / 2, y.real - 1j * np.pi, y.real + 0j)
            critical = self.critical(y, v, y + 0.3 * (aim - y))
            t = float(critical.t.real[0])
            # An edge is real; a value off the bracket is another critical point.
            real = min(abs(critical.y.imag[0]), abs(critical.y.imag[0] + np.pi)) < 1e-6
            if real and low - 0.1 * slack <= t <= high + 0.1 * slack:
                return t
            middle = np.array([(low + high) / 2])
            state, good = self._certified(y, v, middle, np.ones(1, dtype=bool))
            if good[0]:
                at, y, v = float(middle[0]), state.y, state.v
            else:
                beyond = float(middle[0])
        return (at + beyond) / 2

    @property
    def edges(self) -> tuple[tuple[float, float], ...]:
        """(log low, log high) of each interval of the spectrum; -inf for a hard edge at zero."""
        return tuple((band.low, band.high) for band in self.bands)

    def knots(self) -> tuple[np.ndarray, ...]:
        """The t of each table."""
        return tuple(band.table.t for band in self.bands)

    # --- what the law asks for

    def solve(self, t: Reals) -> tuple[Inner, Points]:
        """(w, M) at real t inside the spectrum; NaN outside."""
        y = np.full(t.shape, np.nan + 0j)
        v = np.full((self.unknowns, len(t)), np.nan + 0j)
        for band in self.bands:
            reach = band.low if band.table.x[0] < band.table.span / _COARSE else float(band.table.t[0]) - 1e-9
            inside = np.flatnonzero((t > reach) & (t < band.high))
            if not len(inside):
                continue
            at = t[inside]
            start_y, start_v = hermite(band.table, band.table.straight(at))
            state, good = self._certified(start_y, start_v, at, np.isfinite(start_y))
            if not good.all():
                state = put(state, ~good, self.above(at[~good] + 0j)[0])
            y[inside], v[:, inside] = state.y, state.v
        return np.exp(v), np.exp(y)

    def solve_above(self, log_z: Points) -> tuple[Inner, Points]:
        """(w, M) for complex log z, 0 < Im log z <= pi.

        Raises:
            ArithmeticError: the continuation did not get through.
        """
        state, _ = self.above(log_z)
        if not np.isfinite(state.y).all():
            raise ArithmeticError(
                "the continuation of the Stieltjes transform stalled: ask nearer the spectrum's own scale."
            )
        return np.exp(state.v), np.exp(state.y)

    def potential(self, log_z: Points, w: Inner, u: Points) -> Points:
        """Integral of log(z - lambda): (1 + M) log z - I(M), I the integral of log z over M from 0."""
        with np.errstate(all="ignore"):
            v = np.log(w)
        # The unknowns' own branch: their arguments lie between `low` and `high`, which are at most a turn apart.
        middle = (self.low + self.high) / 2
        v = v.real + 1j * (v.imag + 2 * np.pi * np.round((middle - v.imag) / (2 * np.pi)))
        return np.asarray((1.0 + u) * log_z - self.primitive(u, v))
