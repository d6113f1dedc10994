"""Reports to draw, of matrices drawn by numpy."""

from __future__ import annotations

import numpy as np

from torch_rmt.compare import Distance, Outlier, Report
from torch_rmt.measures import Discrete, FussCatalan, MarchenkoPastur, Semicircle
from torch_rmt.spectra import Spectrum
from torch_rmt.theory import Prediction


def exact_spectrum(eigenvalues: np.ndarray, *, symmetric: bool) -> Spectrum:
    n = len(eigenvalues)
    return Spectrum(
        np.asarray(eigenvalues, dtype=np.float64)[None],
        np.full((1, n), 1.0 / n),
        dim=n,
        matvecs=n,
        method="exact",
        symmetric=symmetric,
    )


def semicircle_with_outlier(seed: int = 0, n: int = 300) -> Report:
    entries = np.random.default_rng(seed).normal(size=(n, n))
    eigenvalues = np.linalg.eigvalsh((entries + entries.T) / np.sqrt(2 * n))
    eigenvalues[-1] = 3.0
    return Report(
        "hessian",
        exact_spectrum(eigenvalues, symmetric=True),
        Prediction(Semicircle(), {"radius": 2.0}, ("entries are independent",), "Wigner 1955"),
        (Distance("kolmogorov", 0.02, 0.01),),
        (Outlier(3.0, 1.0 / n, 2.0, 9.0),),
        "One eigenvalue of 3 stands <far> beyond the edge & is no noise.",
        False,
    )


def product_of_gaussians(seed: int = 0, n: int = 300, factors: int = 6) -> Report:
    rng = np.random.default_rng(seed)
    product = np.eye(n)
    for _ in range(factors):
        product = rng.normal(size=(n, n)) / np.sqrt(n) @ product
    squares = np.linalg.svd(product, compute_uv=False) ** 2
    return Report("jacobian", exact_spectrum(squares, symmetric=False), Prediction(FussCatalan(factors)), agrees=True)


def wide_gaussian(seed: int = 0, rows: int = 100, columns: int = 400) -> Report:
    """Three quarters of the squared singular values are exact zeros."""
    matrix = np.random.default_rng(seed).normal(size=(rows, columns)) / np.sqrt(rows)
    squares = np.linalg.eigvalsh(matrix.T @ matrix)
    squares[: columns - rows] = 0.0
    law = MarchenkoPastur(columns / rows)
    return Report("jacobian/wide", exact_spectrum(squares, symmetric=False), Prediction(law), agrees=True)


def without_a_law(seed: int = 0) -> Report:
    """A Hessian as SLQ sees it: a bulk near zero and a few large values of tiny mass on both sides."""
    rng = np.random.default_rng(seed)
    nodes = np.concatenate([1e-3 * rng.normal(size=(2, 30)), [[-0.1, 0.5, 5.0], [-0.2, 0.6, 4.0]]], axis=1)
    weights = np.concatenate([np.full((2, 30), (1 - 3e-5) / 30), np.full((2, 3), 1e-5)], axis=1)
    spectrum = Spectrum(nodes, weights, dim=100_000, matvecs=66, method="slq", seed=0)
    return Report("hessian/whole", spectrum, None, verdict="Theory has no law for this network.")


def law_in_pieces(seed: int = 0) -> Report:
    """A law of many atoms, as the free sum of measured parts is."""
    eigenvalues = np.sort(np.random.default_rng(seed).normal(size=200))
    return Report("parts", exact_spectrum(eigenvalues, symmetric=True), Prediction(Discrete(eigenvalues[::10])))


def all_reports() -> list[Report]:
    return [semicircle_with_outlier(), product_of_gaussians(), wide_gaussian(), without_a_law(), law_in_pieces()]
