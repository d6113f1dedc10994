"""The law of the per-sample Fisher matrix of a deep network (Hayase and Karakida 2020), layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Complex, Float

from torch_rmt.measures.base import Atom, Interval
from torch_rmt.theory.axis_newton import NewtonLaw, Unknowns
from torch_rmt.theory.deep_fisher_edges import FisherStep as FisherStep
from torch_rmt.theory.deep_fisher_edges import outer_edges, top_of
from torch_rmt.theory.rational_curve import log_from_above, log_from_below


@dataclass(frozen=True)
class DeepFisherLaw(NewtonLaw):
    """Law of Theta_L, from Theta_1 = start I by the steps.

    With u the transform M = zG - 1 of the current law at its subordination point, and w_l the point where the law of
    D^2 has M_D(w_l) = u: a step multiplies, z_l = shift + gain w_l (u/(1 + u)) z_{l-1} (times 1 + u for Gaussian W),
    and as z_l is shifted, u_l = u + shift (1 + u)/(z_l - shift). Unknowns: w_1..w_{L-1}, in the order of the steps;
    u_1 = M_D(w_1), where z_1 = start (1 + u_1)/u_1. Only the last step is a condition on z.

    Source: Hayase and Karakida 2020, The spectrum of Fisher information of deep networks achieving dynamical isometry,
    section 4, in S-transforms; Gaussian W from the same recursion.
    """

    start: float
    steps: tuple[FisherStep, ...]

    def __post_init__(self) -> None:
        if not self.start > 0.0 or not self.steps:
            raise ValueError("start must be positive, and there must be at least one step (two layers)")
        if any(step.shift < 0.0 or step.gain <= 0.0 or top_of(step.slopes) <= 0.0 for step in self.steps):
            raise ValueError("every step needs shift >= 0, gain > 0 and slopes that are not all zero")

    def _chain(self, y: Unknowns) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """u and z before each step, and at the end."""
        us, zs = [], []
        with np.errstate(all="ignore"):
            u, above, _ = self.steps[0].slopes.transform(y[0])
            # start (1 + u)/u: the transform of a point mass, read backwards
            z = self.start * above / u
            for step, w in zip(self.steps, y, strict=True):
                us.append(u)
                zs.append(z)
                product = step.gain * w * u * z / (1.0 if step.gaussian else above)
                u = u + step.shift * above / product
                above = 1.0 + u
                z = product + step.shift
        return [*us, u], [*zs, z]

    def _step(self, y: Unknowns, z: Complex[np.ndarray, " points"]) -> tuple[Unknowns, Unknowns]:
        """Newton step, and the tangent dy/dz: each w_l follows from those before, dw_l = a_l + b_l dw_1.

        The conditions M_D(w_l) = u_l are triangular, so that the pairs (a, b) are carried up the chain and the last
        condition, on z, gives dw_1.
        """
        # pairs (a, b) of every w, and of u and z as they stand: arrays of two rows cost little more than of one
        along = np.zeros((len(y), 2, len(z)), dtype=complex)
        along[0, 1] = 1.0
        with np.errstate(all="ignore"):
            u, above, du = self.steps[0].slopes.transform(y[0])
            end = self.start * above / u
            by_u, by_z = along[0] * du, along[0] * (-self.start * du / (u * u))
            for k, step in enumerate(self.steps):
                w = y[k]
                if k:
                    value, _, slope = step.slopes.transform(w)
                    np.divide(by_u, slope, out=along[k])
                    along[k, 0] += (u - value) / slope
                # the product: gain w u/(1 + u) z, times (1 + u) for Gaussian weights
                rate = step.gain * w if step.gaussian else step.gain * w / above
                partial = rate * u
                product = partial * end
                by_z = by_z * partial
                by_z += along[k] * (product / w)
                by_z += by_u * (end * (rate if step.gaussian else rate / above))
                more = step.shift / product
                grown = more * above
                by_u = by_u * (1.0 + more)
                by_u -= by_z * (grown / product)
                u = u + grown
                above = 1.0 + u
                end = product + step.shift
            first = (z - end - by_z[0]) / by_z[1]
            return -(along[:, 0] + along[:, 1] * first), along[:, 1] / by_z[1]

    def _far(self, z: Complex[np.ndarray, " points"]) -> Unknowns:
        # u = mean/z at every stage, hence w = mean of D^2 / u; the shift of the last step taken out
        means = [step.slopes.moment(1) for step in self.steps]
        u = (self.mean - self.steps[-1].shift) / z
        levels = []
        for k in range(len(self.steps) - 1, -1, -1):
            levels.append(means[k] / u)
            # before the step the mean was larger by 1 / (gain mean) and had its own shift in it
            stage, step_before = self._means[k], self.steps[k - 1] if k else None
            if step_before is not None:
                u = u * (stage - step_before.shift) / stage
        return np.stack(levels[::-1])

    @cached_property
    def _means(self) -> tuple[float, ...]:
        """Mean of Theta before each step, and at the end."""
        means = [self.start]
        for step in self.steps:
            means.append(step.shift + step.gain * step.slopes.moment(1) * means[-1])
        return tuple(means)

    @property
    def mean(self) -> float:
        """Mean eigenvalue: a linear recursion."""
        return self._means[-1]

    @cached_property
    def _outer(self) -> Interval:
        shift = self.steps[-1].shift
        low, high = outer_edges(self.start, self.steps, [shift, *(place for place, _ in self.atoms())])
        # with few dead units and Haar weights each gap between atoms has a band too narrow for the sweep: one interval
        return (low, high) if self.holds_mean(low, high) else (shift, high)

    def holds_mean(self, low: float, high: float) -> bool:
        """Whether a continuous part between these ends, with the atoms, can have the mean, which is known."""
        atoms = self.atoms()
        left = self.mean - sum(place * mass for place, mass in atoms)
        share = 1.0 - sum(mass for _, mass in atoms)
        slack = 1e-9 * share * high + 1e-13 * self.mean  # of the edges, and of rounding where atoms have nearly all
        return share * low - slack <= left <= share * high + slack

    def _scale(self) -> float:
        return self._outer[1]

    def _admissible(self, y: Unknowns) -> Bool[np.ndarray, " points"]:
        good = np.all(y.imag >= -1e-10 * np.abs(y), axis=0)
        us, zs = self._chain(y)
        for u in us:
            good &= u.imag <= 1e-10 * np.abs(u)
        for stage in zs:
            good &= stage.imag >= -1e-10 * np.abs(stage)
        return np.asarray(good)

    def _transform(self, y: Unknowns, z: Complex[np.ndarray, " points"]) -> Complex[np.ndarray, " points"]:
        return np.asarray((1.0 + self._chain(y)[0][-1]) / z)

    def _potential(self, y: Unknowns, z: Complex[np.ndarray, " points"]) -> Complex[np.ndarray, " points"]:
        """(1 + u) d log z, step by step: a product z = z_A z_B u/(1 + u) has potential L_A + L_B + log u."""
        us, zs = self._chain(y)
        potential = log_from_above(zs[0] - self.start)
        for k, step in enumerate(self.steps):
            u, w = us[k], y[k].real + 1j * np.abs(y[k].imag)
            factor = step.slopes.mean_log(w) + log_from_above(w)
            potential = potential + factor + log_from_below(u) + np.log(step.gain)
            if step.gaussian:
                # Marchenko-Pastur of ratio one at z = (1 + u)^2/u: potential u - log u, and log u for the product
                potential = potential + u
        return np.asarray(potential)

    def atoms(self) -> tuple[Atom, ...]:
        """At the shift of the last layer, where D or the step before it is singular; top atoms of Haar weights."""
        return self._atom_list

    @cached_property
    def _atom_list(self) -> tuple[Atom, ...]:
        atoms: dict[float, float] = {self.start: 1.0}
        for step in self.steps:
            after: dict[float, float] = {}
            if not step.gaussian:
                # an atom of a free product sits at a product of atoms whose masses exceed one together
                for place, mass in atoms.items():
                    for slope2, part in step.slopes.atoms:
                        both = mass + part - 1.0
                        if both > 1e-12 and slope2 > 0.0:
                            at = step.shift + step.gain * place * slope2
                            after[at] = after.get(at, 0.0) + both
            dead = max(step.slopes.mass_at(0.0), atoms.get(0.0, 0.0))
            if dead > 0.0:
                after[step.shift] = after.get(step.shift, 0.0) + dead
            atoms = after
        return tuple((place, mass) for place, mass in sorted(atoms.items()) if mass > 1e-9)

    def support(self) -> tuple[Interval, ...]:
        """Bands: the outer edges from the real curve; gaps, where D^2 has several values, from the density.

        Where D^2 is a law of more than 8 values, in place of a continuous one, one interval.
        """
        return self._bands

    @cached_property
    def _bands(self) -> tuple[Interval, ...]:
        if sum(mass for _, mass in self.atoms()) > 1.0 - 1e-9:
            return ()
        low, high = self._outer
        # zero and one value more, or one range: no gap but that beside the atom at the shift
        if all(len(step.slopes.holes()) <= 2 or len(step.slopes.atoms) > 8 for step in self.steps):
            return ((low, high),)
        # small values of D^2 make narrow bands just above the last shift
        shares = np.concatenate([0.5 - 0.5 * np.cos(np.pi * (np.arange(96) + 0.5) / 96), np.logspace(-9.0, -1.0, 64)])
        grid = low + (high - low) * np.unique(shares)
        z = grid.astype(complex)
        y = self._descend(z)
        full = self._densities(y, z) > self._empty
        turns = np.flatnonzero(np.diff(full.astype(int)))
        if turns.size % 2:
            return ((low, high),)
        rises = full[turns + 1]
        inner = self._boundaries(grid[turns], grid[turns + 1], rises, y[:, np.where(rises, turns + 1, turns)])
        gaps = turns[1:-1] if rises.size and rises[0] else turns
        gaps = (gaps[::2] + gaps[1::2] + 1) // 2
        self._kept["gaps"] = z[gaps], y[:, gaps]
        ends = [low, *inner, high] if full[0] or not turns.size else [low, low, *inner, high, high]
        bands = zip(ends[::2], ends[1::2], strict=True)
        return tuple((float(a), float(b)) for a, b in bands if b - a > 1e-9 * high)

    @property
    def _empty(self) -> float:
        return 1e-5 / self._scale()

    def _gap_points(self) -> Float[np.ndarray, " gaps"]:
        bands = self._bands
        return self._kept["gaps"][0].real if "gaps" in self._kept and len(bands) > 1 else super()._gap_points()

    def _densities(self, y: Unknowns, z: Complex[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
        with np.errstate(all="ignore"):
            return np.asarray(-self._transform(y, z).imag)

    def _boundaries(
        self,
        left: Float[np.ndarray, " edges"],
        right: Float[np.ndarray, " edges"],
        rises: Bool[np.ndarray, " edges"],
        inside: Unknowns,
    ) -> list[float]:
        """Edges between points without and with density, all at once.

        To a seventeenth by Newton from the solution at the points with density, again by descent, then by the zero of
        the square of the density, which is analytic in x there.
        """
        empty, full = np.where(rises, left, right), np.where(rises, right, left)
        share = np.linspace(0.0, 1.0, 18)
        rows = np.arange(len(empty))
        for surely in (False, True):
            x = empty[:, None] + (full - empty)[:, None] * share
            z = x.ravel().astype(complex)
            if surely:
                y, good = self._descend(z), np.ones(z.shape, dtype=bool)
            else:
                y, good, _ = self._newton(np.repeat(inside, len(share), axis=1), z)
            density = np.where(good, self._densities(y, z), 0.0).reshape(x.shape)
            # the run of points with density that ends at the known one; Newton may have lost a few near a hard edge
            first = len(share) - (density > self._empty)[:, ::-1].cumprod(axis=1).sum(axis=1)
            first = np.minimum(first, len(share) - 1)
            empty, full = x[rows, np.maximum(first - (1 if surely else 3), 0)], x[rows, first]
        edges = []
        for k, at in enumerate(first):
            take = slice(at, at + 4)
            edge = float(0.5 * (empty[k] + full[k]))
            if at + 4 <= len(share):
                # the inverse function at zero, by Lagrange's formula in the square of the density;
                # a hard edge, where the density grows like 1/sqrt, has the inverse square
                grows = density[k, at] > density[k, at + 3]
                square, place = density[k, take] ** (-2.0 if grows else 2.0), x[k, take]
                guess = sum(
                    place[i] * np.prod([square[j] / (square[j] - square[i]) for j in range(4) if j != i])
                    for i in range(4)
                )
                if min(empty[k], full[k]) <= guess <= max(empty[k], full[k]):
                    edge = float(guess)
            edges.append(edge)
        return edges
