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

    def _chain(
        self, y: Unknowns
    ) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """Residuals M_D(w_l) - u_l, their gradients, z_L with its gradient, and the u and z before each step."""
        count, points = y.shape
        values, gradients, before_u, before_z = [], [], [], []
        u = np.zeros(points, dtype=complex)
        z = u
        grad_u, grad_z = np.zeros((count, points), dtype=complex), np.zeros((count, points), dtype=complex)
        with np.errstate(all="ignore"):
            for k, step in enumerate(self.steps):
                w = y[k]
                m, _, m_slope = step.slopes.transform(w)
                if k == 0:
                    # start (1 + u)/u: the transform of a point mass, read backwards
                    u = m
                    grad_u = np.zeros_like(grad_u)
                    grad_u[0] = m_slope
                    z = self.start * (1.0 + u) / u
                    grad_z = -self.start * grad_u / (u * u)
                else:
                    values.append(m - u)
                    gradient = -grad_u
                    gradient[k] += m_slope
                    gradients.append(gradient)
                before_u.append(u)
                before_z.append(z)
                # the product: gain w u/(1 + u) z, times (1 + u) for Gaussian weights
                factor = step.gain * w * u / (1.0 if step.gaussian else 1.0 + u)
                rate = step.gain * w / (1.0 if step.gaussian else (1.0 + u) ** 2)
                product = factor * z
                grad_p = factor * grad_z + z * rate * grad_u
                grad_p[k] += z * factor / w
                next_u = u + step.shift * (1.0 + u) / product
                grad_next = grad_u * (1.0 + step.shift / product) - step.shift * (1.0 + u) / product**2 * grad_p
                z, grad_z = product + step.shift, grad_p
                u, grad_u = next_u, grad_next
        before_u.append(u)
        return values, gradients, z, grad_z, before_u, before_z

    def _equations(
        self, y: Unknowns, z: Complex[np.ndarray, " points"]
    ) -> tuple[Unknowns, Complex[np.ndarray, "unknowns unknowns points"]]:
        values, gradients, end, grad_z, _, _ = self._chain(y)
        return np.stack([*values, end - z]), np.stack([*gradients, grad_z])

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

    def _scale(self) -> float:
        top = self.start
        for step in self.steps:
            top = step.shift + step.gain * top_of(step.slopes) * top * (4.0 if step.gaussian else 1.0)
        return top

    def _admissible(self, y: Unknowns) -> Bool[np.ndarray, " points"]:
        good = np.all(y.imag >= -1e-10 * np.abs(y), axis=0)
        _, _, z, _, us, zs = self._chain(y)
        for u in us:
            good &= u.imag <= 1e-10 * np.abs(u)
        for stage in (*zs, z):
            good &= stage.imag >= -1e-10 * np.abs(stage)
        return np.asarray(good)

    def _transform(self, y: Unknowns, z: Complex[np.ndarray, " points"]) -> Complex[np.ndarray, " points"]:
        us = self._chain(y)[4]
        return np.asarray((1.0 + us[-1]) / z)

    def _potential(self, y: Unknowns, z: Complex[np.ndarray, " points"]) -> Complex[np.ndarray, " points"]:
        """(1 + u) d log z, step by step: a product z = z_A z_B u/(1 + u) has potential L_A + L_B + log u."""
        _, _, _, _, us, zs = self._chain(y)
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
        low, high = outer_edges(self.start, self.steps)
        # zero and one value more, or one range: no gap but that beside the atom at the shift
        if all(len(step.slopes.holes()) <= 2 or len(step.slopes.atoms) > 8 for step in self.steps):
            return ((low, high),)
        scale = self._scale()
        grid = low + (high - low) * (np.arange(257) + 0.5) / 257
        full = self._dense(grid, scale)
        edges = [low]
        for k in np.flatnonzero(np.diff(full.astype(int))):
            outside, inside = (grid[k], grid[k + 1]) if full[k + 1] else (grid[k + 1], grid[k])
            edges.append(self._boundary(outside, inside, scale))
        edges.append(high)
        bands = zip(edges[::2], edges[1::2], strict=True) if len(edges) % 2 == 0 else [(low, high)]
        return tuple((float(a), float(b)) for a, b in bands if b - a > 1e-6 * scale)

    def _dense(self, x: Float[np.ndarray, " points"], scale: float) -> np.ndarray:
        z = x.astype(complex)
        y = self._descend(z)
        with np.errstate(all="ignore"):
            g = self._transform(y, z)
        return np.asarray(-g.imag > 1e-5 / scale)

    def _boundary(self, outside: float, inside: float, scale: float) -> float:
        """Edge between a point without and one with density, by sections of 16 points each."""
        for _ in range(4):
            x = np.linspace(outside, inside, 18)
            full = self._dense(x[1:-1], scale)
            first = int(np.argmax(full)) if full.any() else len(full)
            outside, inside = float(x[first]), float(x[first + 1])
        return 0.5 * (outside + inside)
