"""How far the tangent kernel of one drawn network is from that of infinitely wide ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from torch_rmt.theory.architecture import Architecture
from torch_rmt.theory.pair_maps import kernel_slopes, kernel_values
from torch_rmt.theory.wide_kernel import KernelLayer, kernel_layers

_NEURONS = 2048  # drawn a layer: the variances are known to 5 %
_MATRICES = 256  # drawn for a largest eigenvalue
_LARGEST = 32  # eigenvalues of which one can become the largest
_RIVALS = 3  # directions over the samples whose noise is looked at
_STEP = 1e-4  # of finite differences, relative


@dataclass(frozen=True)
class KernelNoise:
    """How J^T H J of drawn networks, J J^T = Theta x 1 in the limit of infinite width, differs from that limit.

    Fields:
        mean: standard deviation of the logarithm of the trace.
        largest: the same of the largest eigenvalue.
        raised: typical factor by which the largest eigenvalue is above the limit's: directions of nearly equal
            eigenvalue mix, and the largest gains.
    """

    mean: float
    largest: float
    raised: float


def kernel_noise(
    architecture: Architecture,
    gram: Float[np.ndarray, "n n"],
    curvatures: Float[np.ndarray, "n outputs outputs"],
    *,
    biases: Sequence[bool] | None = None,
) -> KernelNoise:
    """Say how much the tangent kernel fluctuates from network to network, for its trace and its largest eigenvalue.

    To first order in one over the widths, sum_st M_st Theta_st^(cd) moves by a mean over the neurons of every layer:
    (1/n_l) sum_i [phi_s P_st phi_t + phi'_s T_st phi'_t gamma_s^c gamma_t^d](u_i), with u ~ N(0, S_l), gamma^c ~
    N(0, sigma_w(l+1)^2 D_(l+1)) and the derivatives P = d/dK_l (through all later layers) and T = d/dD_l. Its variance,
    by 2,048 drawn neurons, is a part a that all outputs share and, from gamma, a part b that each has for itself: the
    mean over C outputs has a + b/C. The matrix over outputs is 1 + sqrt(b) G, G symmetric with E G_cc^2 = 1 and E
    G_cd^2 = 1/2, and to the same order e^(sqrt(b) G), which stays positive; likewise over the samples with a.
    Orthogonal weights keep lengths and angles: what the sums owe to u u^T and gamma gamma^T alone is left out, in the
    measure in which a rectangular matrix keeps them.

    Args:
        architecture, gram, biases: as for `wide_kernel`.
        curvatures: H of every sample, of the loss by the outputs.

    Raises:
        ValueError: as `wide_kernel` does; a loss without curvature.

    Standard deviations over 60 to 120 drawn networks (tanh and ReLU, 2 to 6 hidden layers, widths 64 to 512, 1, 3 and
    10 outputs, 182 cases), over the stated: 0.72 to 1.2 for the trace, 0.70 to 1.23 for the largest eigenvalue, the
    lowest where several directions over the samples have nearly equal eigenvalues and the noisiest counts. Source: the
    first order in 1/n of Hanin and Nica 2020 and of Roberts, Yaida and Hanin 2022, chapter 8, here by derivatives; the
    exponential found by comparison.

    >>> chain = Architecture.mlp(depth=1, width=100, activation="relu", sigma_w=2**0.5, n_in=100, n_out=1)
    >>> noise = kernel_noise(chain, np.ones((1, 1)), np.ones((1, 1, 1)), biases=[False, False])
    >>> bool(abs(noise.mean - 0.03**0.5) < 0.01), round(noise.raised, 1)  # (5 + 5 + 2 * 1) / 4 / 100: two halves
    (True, 1.0)
    """
    layers = kernel_layers(architecture, gram, biases)
    sizes = np.trace(curvatures, axis1=1, axis2=2)
    if curvatures.shape[0] != len(gram) or not (sizes >= 0).all() or not sizes.sum() > 0:
        raise ValueError("the loss has no curvature by the outputs of these samples.")
    along = np.linalg.eigvalsh(curvatures.mean(0)).clip(0.0)
    root = np.sqrt(sizes / sizes.mean())
    values, vectors = np.linalg.eigh(root[:, None] * np.sum([one.tangent for one in layers], axis=0) * root)
    rivals = [v for e, v in zip(values[::-1][:_RIVALS], vectors.T[::-1], strict=False) if e > 0.5 * values[-1]]
    changes = [_Change.of(one) for one in layers[:-1]]
    shared, own = _variances(layers, changes, np.diag(sizes))
    leading = [_variances(layers, changes, np.outer(root * v, root * v)) for v in rivals]
    outputs = _logs_of_largest(along, max(b for _, b in leading), seed=0)
    samples = _logs_of_largest(values, max(a for a, _ in leading), seed=1)
    return KernelNoise(
        mean=float(np.sqrt(shared + own * (along**2).sum() / along.sum() ** 2)),
        largest=float(np.sqrt(outputs.var() + samples.var())),
        raised=float(np.exp(outputs.mean() + samples.mean())),
    )


@dataclass(frozen=True)
class _Change:
    """Derivatives of K_l and G_l by S_l: entry by entry, and by the logarithms of both variances at once."""

    slopes: np.ndarray
    second: np.ndarray
    values_by_size: np.ndarray
    slopes_by_size: np.ndarray

    @classmethod
    def of(cls, one: KernelLayer) -> _Change:
        phi, s = one.activation, one.covariance
        if phi is None:
            zero = np.zeros_like(s)
            return cls(np.ones_like(s), zero, np.diag(np.diag(s)), zero)
        q = np.diag(s)
        step = _STEP * np.where(s >= 0, 1.0, -1.0) * np.sqrt(np.outer(q, q))
        np.fill_diagonal(step, 0.0)
        longer, change = s + _STEP * np.diag(q), one.slopes - kernel_slopes(phi, s - step)
        np.fill_diagonal(step, 1.0)
        by_size = [
            (kernel_values(phi, longer) - kernel_values(phi, s)) / _STEP,
            (kernel_slopes(phi, longer) - one.slopes) / _STEP,
        ]
        return cls(one.slopes, change / step, *by_size)

    def pull_back(self, by_values: np.ndarray, by_slopes: np.ndarray, covariance: np.ndarray) -> np.ndarray:
        """Derivative by S_l of a number whose derivatives by K_l and G_l are given."""
        by: np.ndarray = by_values * self.slopes + by_slopes * self.second
        both = by_values * self.values_by_size + by_slopes * self.slopes_by_size
        # A pair's derivative by its two variances is shared between them: exact where they are alike.
        np.fill_diagonal(by, both.sum(1) / np.diag(covariance))
        return by


def _variances(layers: tuple[KernelLayer, ...], changes: list[_Change], weights: np.ndarray) -> tuple[float, float]:
    """Relative variances of sum_st weights_st Theta_st: shared by all outputs, and each output's own."""
    rng = np.random.default_rng(0)
    total = sum(float((weights * one.tangent).sum()) for one in layers)
    by_backward = [weights * layers[0].forward]  # the derivative by D_l, which all layers below owe to it
    for below, one in itertools.pairwise(layers):
        by_backward.append(weights * one.forward + below.slopes * one.variance * by_backward[-1])
    by_covariance = np.zeros_like(weights)
    shared = own = 0.0
    for index in range(len(layers) - 2, -1, -1):
        one, above, by_back = layers[index], layers[index + 1], by_backward[index]
        incoming = above.variance * above.backward
        by_values = weights * above.fan_in * above.backward + above.variance * by_covariance
        by_covariance = changes[index].pull_back(by_values, by_back * incoming, one.covariance)
        u, first, second = (_draw(rng, c) for c in (one.covariance, incoming, incoming))
        phi = one.activation
        value, slope = (u, np.ones_like(u)) if phi is None else (phi.value(u), phi.derivative(u))
        ahead = _form(by_values, value) + _form(by_back * incoming, slope)
        back = _form(by_back, slope * first) - _form(by_back, slope * second)
        lengths, angles = _form(by_covariance, u), by_back * one.slopes
        free = back - _form(angles, first) + _form(angles, second)
        kept = one.kept_forward, above.kept_backward
        shared += ((1 - kept[0]) * ahead.var() + kept[0] * (ahead - lengths).var()) / one.fan_out
        own += ((1 - kept[1]) * np.mean(back**2) + kept[1] * np.mean(free**2)) / 2 / one.fan_out
    return float(shared) / total**2, float(own) / total**2


def _logs_of_largest(values: np.ndarray, variance: float, *, seed: int) -> np.ndarray:
    """Of sqrt(values) e^G sqrt(values), over that without G, for drawn G; e^G of unit mean trace."""
    top = np.sort(values)[::-1][:_LARGEST]
    g = np.random.default_rng(seed).standard_normal((_MATRICES, len(top), len(top)))
    exponents, vectors = np.linalg.eigh(np.sqrt(variance) * (g + g.transpose(0, 2, 1)) / 2)
    factors, root = np.exp(exponents), np.sqrt(top.clip(0.0) / top[0])
    matrices = root[:, None] * ((vectors * factors[:, None, :]) @ vectors.transpose(0, 2, 1)) * root
    logs: np.ndarray = np.log(np.linalg.eigvalsh(matrices)[:, -1] / factors.mean())
    return logs


def _form(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    out: np.ndarray = ((vectors @ matrix) * vectors).sum(1)
    return out


def _draw(rng: np.random.Generator, covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    out: np.ndarray = (rng.standard_normal((_NEURONS, len(values))) * np.sqrt(values.clip(0.0))) @ vectors.T
    return out
