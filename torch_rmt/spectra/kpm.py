"""Kernel polynomial method: Chebyshev moments, damped so that the density stays positive."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.fft import dct
from torch import Tensor

from torch_rmt.guard import full_precision
from torch_rmt.operators.base import LinearOperator
from torch_rmt.spectra.gram import widened
from torch_rmt.spectra.lanczos import dots, gauss_rule, lanczos
from torch_rmt.spectra.probes import require_finite, require_symmetric, sphere
from torch_rmt.spectra.spectrum import Spectrum

_STEPS_FOR_THE_INTERVAL = 12  # of a reorthogonalised Lanczos run whose residual bound closes the interval


@dataclass(frozen=True)
class KPM:
    """Spectral distribution from `2 degree` Chebyshev moments of each of `probes` random vectors.

    mu_k = v^T T_k(B) v, B the operator mapped into [-1, 1], by T_{k+1} = 2 B T_k - T_{k-1}; two moments a
    product through T_2k = 2 T_k^2 - 1 and T_{2k+1} = 2 T_k T_{k+1} - T_1. Jackson's damping makes the density
    non-negative and blurs it by pi / (2 degree) of the half-width at the centre, so that moments of the
    result are slightly off where those of `SLQ` are not; in exchange there are no inner products to lose
    digits in and the nodes are the same for all probes. (Weisse, Wellein, Alvermann and Fehske 2006.)

    Fields:
        probes: number of random vectors, in lockstep.
        degree: products for each.

    >>> from torch_rmt.spectra import DenseOperator
    >>> operator = DenseOperator(torch.diag(torch.linspace(-1, 1, 200)), symmetric=True)
    >>> spectrum = KPM(probes=4, degree=40)(operator, torch.Generator().manual_seed(0))
    >>> spectrum.nodes.shape, spectrum.matvecs
    ((4, 80), 172)
    """

    probes: int = 8
    degree: int = 64

    def __post_init__(self) -> None:
        if self.probes < 1 or self.degree < 2:
            raise ValueError(f"KPM needs a probe and two products at least, got {self.probes} and {self.degree}")

    @full_precision()
    def __call__(self, operator: LinearOperator, generator: torch.Generator) -> Spectrum:
        """Measure a symmetric operator (wrap any other in `Gram`); probes come from `generator` alone."""
        operator = widened(operator)
        dim = require_symmetric(operator, "KPM")
        seed = generator.initial_seed()
        low, high, spent = _interval(operator, generator)
        vectors = sphere(dim, self.probes, generator, device=operator.device, dtype=operator.dtype)
        moments = _chebyshev_moments(operator, vectors, self.degree, low, high)
        grid, weights = _jackson_density(moments)
        nodes = 0.5 * (low + high) + 0.5 * (high - low) * grid
        return Spectrum(
            nodes=np.broadcast_to(nodes, weights.shape).copy(),
            weights=weights,
            dim=dim,
            matvecs=spent + self.probes * self.degree,
            method=f"kpm, {self.probes} probes x {self.degree} products",
            seed=seed,
        )


def _interval(operator: LinearOperator, generator: torch.Generator) -> tuple[float, float, int]:
    """Interval that holds the spectrum: the extreme Ritz values moved out by their residual bounds."""
    dim = operator.shape[0]
    start = sphere(dim, 1, generator, device=operator.device, dtype=operator.dtype)
    run = lanczos(operator, start, min(_STEPS_FOR_THE_INTERVAL, dim), reorthogonalise="full")
    nodes, weights = gauss_rule(run)
    values = nodes[weights > 0.0]
    margin = float(run.offdiagonal[0, -1]) + 1e-3 * float(values[-1] - values[0])
    margin = max(margin, 1e-6 * float(np.abs(values).max()), 10.0 * torch.finfo(operator.dtype).tiny)
    return float(values[0]) - margin, float(values[-1]) + margin, int(run.diagonal.shape[1])


def _chebyshev_moments(
    operator: LinearOperator, start: Float[Tensor, "dim probes"], degree: int, low: float, high: float
) -> Float[np.ndarray, "probes moments"]:
    """Moments v^T T_k(B) v for k < 2 degree from `degree` products; nothing is read before the last."""
    centre, half = 0.5 * (low + high), 0.5 * (high - low)

    def mapped(vectors: Tensor) -> Tensor:
        return (operator.matmat(vectors).detach() - centre * vectors) / half

    previous, current = start, mapped(start)
    zeroth, first = dots(start, start), dots(start, current)
    moments = [zeroth, first]
    for _ in range(degree - 1):
        moments.append(2.0 * dots(current, current) - zeroth)
        previous, current = current, 2.0 * mapped(current) - previous
        moments.append(2.0 * dots(previous, current) - first)
    table = torch.stack(moments, dim=1)
    require_finite(table, operator)
    host: Float[np.ndarray, "probes moments"] = table.cpu().numpy()
    if np.abs(host).max() > 2.0:
        raise ValueError(
            "Chebyshev moments grow, so the spectrum reaches outside the interval that Lanczos found: is the "
            "operator really symmetric, and the same at every product (dropout)?"
        )
    return host


def _jackson_density(
    moments: Float[np.ndarray, "probes moments"],
) -> tuple[Float[np.ndarray, " moments"], Float[np.ndarray, "probes moments"]]:
    """Chebyshev nodes, ascending, and the mass that the damped series puts on each."""
    count = moments.shape[1]
    k = np.arange(count)
    angle = np.pi / (count + 1)
    jackson = ((count - k + 1) * np.cos(angle * k) + np.sin(angle * k) / np.tan(angle)) / (count + 1)
    series = dct(moments * jackson / moments[:, :1], type=3, axis=1) / count
    weights = np.maximum(series[:, ::-1], 0.0)
    nodes = np.cos(np.pi * (np.arange(count) + 0.5) / count)[::-1]
    return nodes, weights / weights.sum(axis=1, keepdims=True)
