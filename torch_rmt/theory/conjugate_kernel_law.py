"""The law of a linear combination of the conjugate kernels of all layers (Fan and Wang 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Complex
from scipy.optimize import brentq

from torch_rmt.measures.base import Atom, Interval, SpectralMeasure
from torch_rmt.theory.axis_newton import SystemLaw, Unknowns
from torch_rmt.theory.rational_curve import log_from_above, log_from_below


@dataclass(frozen=True)
class KernelLayer:
    """One layer of the recursion: rows of X_l have covariance constant I + linear K_{l-1}, and K_l = X_l^T X_l.

    Fields:
        ratio: samples / width of the layer.
        constant, linear: of the covariance, both >= 0 and not both zero.
    """

    ratio: float
    constant: float
    linear: float


@dataclass(frozen=True)
class LayeredKernelLaw(SystemLaw):
    """Law of shift I + sum over l = 0..L of weights[l] K_l, K_0 of law `input_law`, K_l as `KernelLayer` says.

    Layer by layer from the top, X_l is replaced by its covariance: with c_l the coefficient that K_l has by then,
    e_l = c_l / (1 - c_l ratio_l tau_{l-1}), c_{l-1} = weights[l-1] + linear_l e_l, and at the bottom
    G(z) = integral of mu_0(dx) / (A - c_0 x), A = z - shift - sum of constant_l e_l. The traces against the
    covariances, tau_l = constant_{l+1} G + linear_{l+1} kappa_l, kappa_l = tau_{l-1} e_l / c_l, close the system in
    (e_1..e_L, A).

    Source: Fan and Wang 2020, Theorems 3.4 and 3.7, in the variables e_l = 1/s_l.
    """

    input_law: SpectralMeasure
    layers: tuple[KernelLayer, ...]
    weights: tuple[float, ...]
    shift: float = 0.0

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.layers) + 1:
            raise ValueError(f"{len(self.layers)} layers need {len(self.layers) + 1} weights, got {len(self.weights)}")
        if any(weight < 0.0 for weight in self.weights) or self.weights[-1] <= 0.0 or not self.layers:
            raise ValueError("weights must be >= 0, the last one > 0, and there must be a layer")
        if any(layer.ratio <= 0.0 or min(layer.constant, layer.linear) < 0.0 for layer in self.layers):
            raise ValueError("every layer needs ratio > 0, constant >= 0 and linear >= 0")
        if self.input_law.bounds()[0] < 0.0:
            raise ValueError("the kernel of the inputs cannot have negative eigenvalues")

    @classmethod
    def of(
        cls,
        input_law: SpectralMeasure,
        layers: tuple[KernelLayer, ...],
        weights: tuple[float, ...],
        shift: float = 0.0,
    ) -> LayeredKernelLaw:
        """The law, without the layers that it does not see: those below a layer of no linear part (an even activation),
        where none of them has a weight of its own."""
        unseen = max(
            (k for k, layer in enumerate(layers) if layer.linear == 0.0 and not any(weights[: k + 1])), default=0
        )
        return cls(input_law=input_law, layers=layers[unseen:], weights=weights[unseen:], shift=shift)

    def _chain(self, y: Unknowns) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
        """Coefficients c_0..c_L, traces tau_0..tau_{L-1}, their derivatives (L, L + 1, points), and G."""
        depth = len(self.layers)
        c = [self.weights[k] + self.layers[k].linear * y[k] for k in range(depth)]
        c.append(np.full(y.shape[1], self.weights[depth], dtype=complex))
        A, c0 = y[-1], c[0]
        with np.errstate(all="ignore"):
            small = np.abs(c0) * 1e9 < np.abs(A)
            w = np.where(small, 1e9 * self._scale(), A / np.where(small, 1.0, c0))
            g0, slope0 = self.input_law.stieltjes(w), self.input_law.slope(w)
            mean = self.input_law.mean
            # far out G_0 loses its digits in A G - 1: the first moment takes over
            g = np.where(small, (1.0 + mean * c0 / A) / A, g0 / c0)
            g_A = np.where(small, -1.0 / A**2, slope0 / c0**2)
            kappa = np.where(small, mean / A, (A * g - 1.0) / c0)
            g_c = np.where(small, mean / A**2, -(g + A * g_A) / c0)
            k_A = np.where(small, -mean / A**2, (g + A * g_A) / c0)
            k_c = np.where(small, self._second / (A * A), (A * g_c - kappa) / c0)
        grad_g = np.zeros((depth + 1, y.shape[1]), dtype=complex)
        grad_k = np.zeros_like(grad_g)
        grad_g[-1], grad_k[-1] = g_A, k_A
        grad_g[0] += g_c * self.layers[0].linear
        grad_k[0] += k_c * self.layers[0].linear
        taus, grads = [], np.zeros((depth, depth + 1, y.shape[1]), dtype=complex)
        for k, layer in enumerate(self.layers):
            tau = layer.constant * g + layer.linear * kappa
            grad = layer.constant * grad_g + layer.linear * grad_k
            taus.append(tau)
            grads[k] = grad
            # on to kappa of the next kernel: tau e / c
            e, coefficient = y[k], c[k + 1]
            kappa = tau * e / coefficient
            grad_k = grad * (e / coefficient)
            grad_k[k] += tau / coefficient
            if k + 1 < depth:
                grad_k[k + 1] -= kappa / coefficient * self.layers[k + 1].linear
        return c, taus, grads, g

    @cached_property
    def _second(self) -> float:
        return self.input_law.moment(2)

    def _equations(
        self, y: Unknowns, z: Complex[np.ndarray, " points"]
    ) -> tuple[Unknowns, Complex[np.ndarray, "unknowns unknowns points"]]:
        depth = len(self.layers)
        c, taus, grads, _ = self._chain(y)
        value = np.empty_like(y)
        slope = np.zeros((depth + 1, depth + 1, y.shape[1]), dtype=complex)
        for k, layer in enumerate(self.layers):
            e, coefficient, tau = y[k], c[k + 1], taus[k]
            value[k] = e * (1.0 - coefficient * layer.ratio * tau) - coefficient
            slope[k] = -(e * coefficient * layer.ratio) * grads[k]
            slope[k, k] += 1.0 - coefficient * layer.ratio * tau
            if k + 1 < depth:
                slope[k, k + 1] -= self.layers[k + 1].linear * (1.0 + e * layer.ratio * tau)
            slope[depth, k] = layer.constant
        value[depth] = y[-1] + self.shift + sum(layer.constant * y[k] for k, layer in enumerate(self.layers)) - z
        slope[depth, depth] = 1.0
        return value, slope

    def _far(self, z: Complex[np.ndarray, " points"]) -> Unknowns:
        e = self._plain
        offset = self.shift + sum(layer.constant * v for layer, v in zip(self.layers, e, strict=True))
        return np.stack([np.full(len(z), v, dtype=complex) for v in e] + [z - offset])

    @cached_property
    def _plain(self) -> list[float]:
        """e_l where nothing fluctuates: e_l = c_l."""
        e = [0.0] * len(self.layers)
        coefficient = self.weights[-1]
        for k in range(len(self.layers) - 1, -1, -1):
            e[k] = coefficient
            coefficient = self.weights[k] + self.layers[k].linear * coefficient
        return e

    def _admissible(self, y: Unknowns) -> Bool[np.ndarray, " points"]:
        size = np.abs(y)
        good = np.all(y[:-1].imag <= 1e-10 * size[:-1], axis=0) & (y[-1].imag >= -1e-10 * size[-1])
        c0 = self.weights[0] + self.layers[0].linear * y[0]
        w = y[-1] * np.conj(c0)  # the sign of Im A/c_0, also where c_0 vanishes
        return np.asarray(good & (w.imag >= -1e-10 * np.abs(w)))

    def _transform(self, y: Unknowns, z: Complex[np.ndarray, " points"]) -> Complex[np.ndarray, " points"]:
        return self._chain(y)[3]

    def _potential(self, y: Unknowns, z: Complex[np.ndarray, " points"]) -> Complex[np.ndarray, " points"]:
        c, _, _, _ = self._chain(y)
        A, c0 = y[-1], c[0]
        small = np.abs(c0) * 1e9 < np.abs(A)
        safe = np.where(small, 1.0, c0)
        w = np.where(small, 1j, A / safe)
        # in a gap rounding must not put w below the axis, where the logarithm has the other sign
        inner = log_from_below(safe) + self.input_law.log_potential(w.real + 1j * np.abs(w.imag))
        value = np.where(small, log_from_above(A) - self.input_law.mean * c0 / A, inner)
        for k, layer in enumerate(self.layers):
            e = y[k]
            log_ratio = log_from_below(e) - log_from_below(c[k + 1])
            value = value + (e / c[k + 1] - 1.0 - log_ratio) / layer.ratio
        return np.asarray(value)

    @cached_property
    def mean(self) -> float:
        """Trace per sample: constant + linear x mean, layer by layer."""
        total, level = self.shift + self.weights[0] * self.input_law.mean, self.input_law.mean
        for layer, weight in zip(self.layers, self.weights[1:], strict=True):
            level = layer.constant + layer.linear * level
            total += weight * level
        return total

    def _scale(self) -> float:
        return self._norm_bound

    @cached_property
    def _norm_bound(self) -> float:
        """Sum and product of the norms: above the support."""
        top = self.input_law.bounds()[1]
        total = abs(self.shift) + self.weights[0] * top
        for layer, weight in zip(self.layers, self.weights[1:], strict=True):
            top = (layer.constant + layer.linear * top) * (1.0 + layer.ratio**0.5) ** 2
            total += weight * top
        return float(total)

    def atoms(self) -> tuple[Atom, ...]:
        """At the shift, where all layers together have fewer neurons than there are samples."""
        rank = 1.0 - sum(mass for location, mass in self.input_law.atoms() if location == 0.0)
        filled = rank if self.weights[0] > 0.0 else 0.0
        covered = self.weights[0] > 0.0
        for layer, weight in zip(self.layers, self.weights[1:], strict=True):
            nested = layer.constant == 0.0  # a linear layer stays within the span of the one before
            rank = min(rank, 1.0 / layer.ratio) if nested else min(1.0, 1.0 / layer.ratio)
            if weight > 0.0 and not (nested and covered):
                filled = min(1.0, filled + rank)
            covered = weight > 0.0 or (nested and covered)
        return ((self.shift, 1.0 - filled),) if filled < 1.0 - 1e-12 else ()

    def support(self) -> tuple[Interval, ...]:
        """Bands between the folds of z along real solutions."""
        return self._bands

    @cached_property
    def _bands(self) -> tuple[Interval, ...]:
        scale = self._scale()
        upper = self._fold(1.001 * scale, -1.0)
        atoms = self.atoms()
        lower = self._fold(atoms[0][0] + 1e-9 * self.mean if atoms else self.shift - scale, 1.0)
        # any inner gap shows as a run of points without density
        angle = np.pi * (np.arange(64) + 0.5) / 64
        x = 0.5 * (lower + upper) - 0.5 * (upper - lower) * np.cos(angle)
        y = self._descend(x.astype(complex))
        density = -self._transform(y, x.astype(complex)).imag
        empty = density < 1e-7 / scale
        ends = [lower]
        k = 0
        while k < len(x):
            if empty[k]:
                last = k
                while last + 1 < len(x) and empty[last + 1]:
                    last += 1
                if k > 0 and last + 1 < len(x):
                    middle = float(x[(k + last) // 2])
                    left, right = self._fold(middle, -1.0), self._fold(middle, 1.0)
                    ends += [left, right] if right > left else []
                k = last
            k += 1
        ends.append(upper)
        return tuple(zip(ends[::2], ends[1::2], strict=True))

    def _fold(self, start: float, direction: float) -> float:
        """Follow the real solution from z = start, z moving in `direction`, to where it turns: an edge of a band.

        Pseudo-arclength continuation in (y, z), each unknown in units of its own size: the fold is a regular point.
        """
        point = np.append(self._descend(np.array([start + 0j]))[:, 0].real, start)
        floor = np.full(len(point), 1e-12 * self._scale())
        floor[:-2] = 0.0
        size = np.maximum(np.abs(point), floor)
        tangent = np.zeros(len(point))
        tangent[-1] = direction
        length = 0.0
        for _ in range(300):
            ahead, turned = self._correct(point + length * tangent * size, tangent, size, 1e-9)
            # A sharp turn or a long way back to the curve means that another branch was met.
            jumped = ahead is not None and (
                turned @ tangent < 0.7 or np.abs((ahead - point) / size - length * tangent).max() > 0.5 * length + 1e-9
            )
            if ahead is None or (length > 0.0 and jumped) or not self._beyond_bands(ahead):
                length *= 0.4
                if length < 1e-9:
                    break
                continue
            if turned[-1] * direction <= 0.0:
                return self._turn(point, tangent, size, length)
            next_size = np.maximum(np.abs(ahead), floor)
            tangent = turned * size / next_size
            tangent /= np.linalg.norm(tangent)
            point, size = ahead, next_size
            length = min(1.0, 2.5 * length) if length else 0.2
        return float(point[-1])

    def _correct(
        self, guess: np.ndarray, tangent: np.ndarray, size: np.ndarray, accuracy: float
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Newton back onto the curve, across the tangent (None where it does not converge), and the tangent there."""
        point = guess.copy()
        count = len(point)
        matrix, right = np.empty((count, count)), np.zeros((count, 2))
        right[-1, 1] = 1.0
        for _ in range(8):
            value, slope = self._equations(point[:-1, None].astype(complex), point[-1:].astype(complex))
            matrix[:-1, :-1] = slope[:, :, 0].real * size[:-1]
            matrix[:-1, -1] = 0.0
            matrix[-2, -1] = -size[-1]
            matrix[-1] = tangent
            right[:-1, 0] = value[:, 0].real
            try:
                solved = np.linalg.solve(matrix, right)
            except np.linalg.LinAlgError:
                return None, tangent
            point = point - solved[:, 0] * size
            error = np.abs(solved[:, 0]).max()
            if not np.isfinite(error):
                return None, tangent
            if error <= accuracy:
                break
        if error > 1e-7:
            return None, tangent
        return point, np.asarray(solved[:, 1] / np.linalg.norm(solved[:, 1]))

    def _turn(self, point: np.ndarray, tangent: np.ndarray, size: np.ndarray, length: float) -> float:
        """z where its component of the tangent vanishes, between 0 and `length` along it."""
        found = [float(point[-1])]

        def climb(step: float) -> float:
            at, turned = self._correct(point + step * tangent * size, tangent, size, 1e-9)
            if at is not None:
                found[0] = float(at[-1])
            return float(turned[-1]) if step > 0.0 else float(tangent[-1])

        brentq(climb, 0.0, length, xtol=1e-9 * length)  # z is stationary there: its error is the square of this
        return found[0]

    def _beyond_bands(self, point: np.ndarray) -> bool:
        """Whether A/c_0 is outside the bands of the input law, so that the solution is real."""
        c0 = self.weights[0] + self.layers[0].linear * point[0]
        for low, high in self.input_law.support():
            near, far = sorted((c0 * low, c0 * high))
            if near <= point[-2] <= far:
                return False
        return True
