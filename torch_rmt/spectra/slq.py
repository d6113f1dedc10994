"""Stochastic Lanczos quadrature: a spectral distribution from a few dozen products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from torch_rmt.operators.base import LinearOperator
from torch_rmt.spectra.golub_kahan import golub_kahan, squared_gauss_rule
from torch_rmt.spectra.lanczos import gauss_rule, lanczos
from torch_rmt.spectra.probes import require_size, sphere
from torch_rmt.spectra.spectrum import Spectrum

_CHEAP_BASIS_BYTES = 2**24  # below this, full reorthogonalisation costs less than a product; found by tuning
_VECTOR_BYTES = 2**30  # the recurrence's own vectors of one block of probes stay below this


@dataclass(frozen=True)
class SLQ:
    """Stochastic Lanczos quadrature with `probes` random vectors and `depth` Lanczos steps each.

    mean_i f(lambda_i) = E v^T f(A) v, v uniform on the unit sphere, and v^T f(A) v = sum_j w_j f(theta_j) by
    Gauss quadrature on the Lanczos matrix, exact for polynomials of degree 2 depth - 1. Unbiased for
    those; the standard error falls as (probes * dim)^(-1/2).
    An operator that is not symmetric is measured as A^T A or A A^T, whichever is smaller, and its zeros
    counted.
    (Golub and Meurant 1994; Ubaru, Chen and Saad 2017.)

    Fields:
        probes: number of random vectors; they share every product, as columns of one `matmat`.
        depth: Lanczos steps for each; taken down to the dimension where that is smaller.
        reorthogonalise: True keeps and reorthogonalises the whole basis (memory probes * depth * dim); False
            never does; None does where the basis is so small that it costs nothing.

    >>> from torch_rmt.spectra import DenseOperator
    >>> identity = DenseOperator(torch.eye(50, dtype=torch.float64), symmetric=True)
    >>> spectrum = SLQ(probes=2, depth=4)(identity, torch.Generator().manual_seed(0))
    >>> round(spectrum.moment(3)[0], 9), spectrum.matvecs
    (1.0, 8)
    """

    probes: int = 8
    depth: int = 64
    reorthogonalise: bool | None = None

    def __post_init__(self) -> None:
        if self.probes < 1 or self.depth < 1:
            raise ValueError(f"SLQ needs at least one probe and one step, got {self.probes} and {self.depth}")

    def __call__(self, operator: LinearOperator, generator: torch.Generator) -> Spectrum:
        """Measure the operator; probes come from `generator` alone."""
        columns = require_size(operator)
        target = operator if operator.shape[1] <= operator.shape[0] else operator.adjoint()
        dim = target.shape[1]
        steps = min(self.depth, dim)
        full = self.reorthogonalise
        if full is None:
            full = dim * steps * operator.dtype.itemsize <= _CHEAP_BASIS_BYTES
        kept = steps + 3 if full else 4
        block = max(1, min(self.probes, _VECTOR_BYTES // (kept * dim * operator.dtype.itemsize)))
        nodes, weights = [], []
        seed = generator.initial_seed()
        for first in range(0, self.probes, block):
            count = min(block, self.probes - first)
            start = sphere(dim, count, generator, device=operator.device, dtype=operator.dtype)
            if operator.symmetric:
                values, masses = gauss_rule(lanczos(target, start, steps, reorthogonalise=full))
            else:
                values, masses = squared_gauss_rule(golub_kahan(target, start, steps, reorthogonalise=full))
            nodes.append(values)
            weights.append(masses)
        spectrum = Spectrum(
            nodes=np.concatenate(nodes),
            weights=np.concatenate(weights),
            dim=dim,
            matvecs=self.probes * steps * (1 if operator.symmetric else 2),
            method=f"slq, {self.probes} probes x {steps} steps" + (", reorthogonalised" if full else ""),
            seed=seed,
            symmetric=operator.symmetric,
        )
        return spectrum if operator.symmetric else _with_zeros(spectrum, columns)


def _with_zeros(spectrum: Spectrum, columns: int) -> Spectrum:
    """The law of A^T A from that of the smaller of A^T A and A A^T: the rest are zeros, counted exactly."""
    zeros = columns - spectrum.dim
    nodes, weights = np.maximum(spectrum.nodes, 0.0), spectrum.weights
    if zeros:
        share = spectrum.dim / columns
        extra = np.zeros((nodes.shape[0], 1))
        nodes = np.concatenate([nodes, extra], axis=1)
        weights = np.concatenate([weights * share, extra + (1.0 - share)], axis=1)
    return Spectrum(
        nodes=nodes,
        weights=weights,
        dim=columns,
        matvecs=spectrum.matvecs,
        method=spectrum.method,
        seed=spectrum.seed,
        symmetric=False,
        notes=spectrum.notes,
        known=1 if zeros else 0,
        known_count=zeros,
    )
