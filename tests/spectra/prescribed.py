"""The spectra section of tests/cases.py: matrices whose spectrum is prescribed, estimators to try on them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from torch_rmt.operators.base import LinearOperator
from torch_rmt.spectra import (
    SLQ,
    BlockSLQ,
    DenseOperator,
    hutch_plus_plus,
    hutchinson,
    mixed_moment,
    trace,
    xtrace,
)

#: Test matrices are Q diag(values) Q^T with Q Haar.
MATRIX_SPECTRA: dict[str, np.ndarray] = {
    "flat": np.linspace(-1.0, 1.0, 120),
    "spike": np.concatenate([np.linspace(0.0, 1.0, 119), [20.0]]),
    "pairs": np.concatenate([[-5.0, 5.0, -3.0, 3.0], np.linspace(-1.0, 1.0, 116)]),
    "low rank": np.concatenate([np.zeros(110), np.arange(1.0, 11.0)]),
    "identity": np.ones(60),
    "zero": np.zeros(40),
    "tiny": 1e-12 * np.linspace(-1.0, 1.0, 50),
    "one": np.array([2.0]),
    "decades": np.logspace(-8, 0, 100),
}

Quantity = Callable[[LinearOperator, torch.Generator], list[tuple[float, float]]]
Truth = Callable[[np.ndarray], float]


def _of_spectrum(settings: SLQ | BlockSLQ, *orders: int) -> Quantity:
    def quantity(operator: LinearOperator, generator: torch.Generator) -> list[tuple[float, float]]:
        spectrum = settings(operator, generator)
        return [spectrum.moment(order) for order in orders]

    return quantity


def _of_estimate(function: Callable[..., object], **settings: int) -> Quantity:
    def quantity(operator: LinearOperator, generator: torch.Generator) -> list[tuple[float, float]]:
        estimate = function(operator, generator, **settings)
        return [(estimate.value, estimate.standard_error)]

    return quantity


def _square(operator: LinearOperator, generator: torch.Generator) -> list[tuple[float, float]]:
    estimate = mixed_moment((operator, operator), generator, probes=12)
    return [(estimate.value, estimate.standard_error)]


def _mean_square(values: np.ndarray) -> float:
    return float(np.mean(values**2))


#: name -> (estimator, what it estimates); each must be unbiased with z-scores of root mean square one.
ESTIMATORS: dict[str, tuple[Quantity, *tuple[Truth, ...]]] = {
    "slq": (_of_spectrum(SLQ(probes=6, depth=10), 1, 2), np.mean, _mean_square),
    "slq, no reorthogonalisation": (_of_spectrum(SLQ(4, 30, reorthogonalise="none"), 1), np.mean),
    "slq, one probe": (_of_spectrum(SLQ(probes=1, depth=12), 1), np.mean),
    "slq deflated": (_of_spectrum(SLQ(probes=3, depth=10, deflate=4), 1), np.mean),
    "block slq": (_of_spectrum(BlockSLQ(probes=4, depth=8), 1, 2), np.mean, _mean_square),
    "hutchinson": (_of_estimate(hutchinson, probes=20), np.sum),
    "hutch++": (_of_estimate(hutch_plus_plus, matvecs=30), np.sum),
    "xtrace": (_of_estimate(xtrace, matvecs=30), np.sum),
    "trace": (_of_estimate(trace, matvecs=30), np.sum),
    "mixed moment": (_square, _mean_square),
}


def symmetric_matrix(values: np.ndarray, seed: int) -> torch.Tensor:
    """Q diag(values) Q^T in float64, Q drawn from Haar measure."""
    n = len(values)
    gaussian = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    q = q * torch.sign(torch.diagonal(r))
    matrix = (q * torch.as_tensor(values, dtype=torch.float64)) @ q.T
    return (matrix + matrix.T) / 2


def symmetric_operator(name: str, seed: int, dtype: torch.dtype = torch.float64) -> DenseOperator:
    """The matrix of a row of `MATRIX_SPECTRA` as an operator."""
    return DenseOperator(symmetric_matrix(MATRIX_SPECTRA[name], seed).to(dtype), symmetric=True)


def generator(seed: int) -> torch.Generator:
    """A fresh generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def wasserstein(nodes: np.ndarray, weights: np.ndarray, eigenvalues: np.ndarray) -> float:
    """Wasserstein-1 distance between weighted nodes and the law of the eigenvalues."""
    places = np.concatenate([nodes.ravel(), eigenvalues])
    masses = np.concatenate([weights.ravel() / weights.sum(), np.full(len(eigenvalues), -1 / len(eigenvalues))])
    order = np.argsort(places)
    return float(np.sum(np.abs(np.cumsum(masses[order])[:-1]) * np.diff(places[order])))
