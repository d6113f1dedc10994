"""Layers whose measured laws are a few atoms: gaps, hard edges and atoms of the product, in bounded time."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from torch_rmt.measures import Discrete, MarchenkoPastur, SpectralMeasure, free_mul
from torch_rmt.theory import Architecture, JacobianLaw, Layer, jacobian_spectrum

CHAINS: dict[str, tuple[Discrete | str, ...]] = {
    "two, a gap": (Discrete([0.5, 2.0]), Discrete([0.3, 1.0])),
    "two, narrow gap": (Discrete([0.05, 0.5]), Discrete([0.06, 0.5])),
    "two that touch": (Discrete([0.05, 0.5]), Discrete([0.05, 0.5])),
    "three": (Discrete([0.5, 2.0]), Discrete([0.3, 1.0]), Discrete([0.1, 1.0, 3.0])),
    "atoms beside bands": (Discrete([1.0, 2.0], [0.3, 0.7]), Discrete([0.3, 1.0], [0.2, 0.8])),
    "an atom in the gap": (Discrete([0.05, 0.5]), Discrete([0.05, 0.5], [0.3, 0.7])),
    "an atom at zero": (Discrete([0.0, 2.0], [0.2, 0.8]), Discrete([0.3, 1.0])),
    "a wide gap and a Gaussian layer": (Discrete([0.001, 1.0]), "gaussian"),
    "two and a Gaussian layer": (Discrete([0.001, 1.0]), Discrete([0.02, 3.0]), "gaussian"),
}


def law_of_chain(chain: tuple[Discrete | str, ...], width: int = 100) -> SpectralMeasure:
    return jacobian_spectrum(
        Architecture(tuple(Layer(width, width, None, 1.0, ensemble=ensemble) for ensemble in chain))
    ).measure


@pytest.mark.parametrize("name", CHAINS)
def test_gaps_edges_and_atoms_are_those_of_the_free_product(name: str) -> None:
    chain = CHAINS[name]
    law = law_of_chain(chain)
    product = free_mul(*(MarchenkoPastur(1.0) if isinstance(e, str) else e for e in chain))
    assert isinstance(law, JacobianLaw)
    assert len(law.support()) == len(product.support())
    np.testing.assert_allclose(law.support(), product.support(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.reshape(law.atoms(), (-1, 2)), np.reshape(product.atoms(), (-1, 2)), atol=1e-9)
    for low, high in product.support():
        x = low + (high - low) * (0.5 - 0.5 * np.cos(np.pi * (np.arange(40) + 0.5) / 40))
        np.testing.assert_allclose(law.density(x), product.density(x), rtol=1e-5)
        np.testing.assert_allclose(law.cdf(x), product.cdf(x), atol=1e-9)
        levels = product.cdf(x[5:-5])
        np.testing.assert_allclose(law.quantile(levels), x[5:-5], rtol=1e-8)


def haar_rotated(chain: tuple[Discrete | str, ...], n: int, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    product = torch.eye(n, dtype=torch.float64)
    for law in chain:
        if isinstance(law, str):
            factor = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
        else:
            counts = np.round(np.cumsum(law.weights) * n).astype(int)
            roots = torch.from_numpy(np.repeat(law.nodes, np.diff(counts, prepend=0)) ** 0.5)
            haar = torch.empty(n, n, dtype=torch.float64)
            torch.nn.init.orthogonal_(haar, generator=generator)
            factor = roots[:, None] * haar
        product = factor @ product
    return torch.linalg.svdvals(product).numpy() ** 2


@pytest.mark.parametrize("name", ["two, a gap", "three", "an atom in the gap"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_law_of_haar_rotated_matrices(name: str, seed: int) -> None:
    """The mean distance of the quantiles stays below a multiple of 1 / n at two widths."""
    chain = CHAINS[name]
    law = law_of_chain(chain)
    levels = (np.arange(2000) + 0.5) / 2000
    quantiles = law.quantile(levels)
    distances = []
    for n in (60, 240):
        values = np.sort(haar_rotated(chain, n, seed))
        distances.append(float(np.abs(np.quantile(values, levels, method="inverted_cdf") - quantiles).mean()))
    mean = law.mean
    assert distances[0] < 3.0 / 60 * mean
    assert distances[1] < 3.0 / 240 * mean


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Discrete([1.0, 1.0 + 1e-7]), Discrete([1.0, 1.0 + 1e-6])),
        (Discrete(np.geomspace(1e-3, 1.0, 25)), Discrete(np.geomspace(1e-3, 1.0, 25))),
    ],
)
@pytest.mark.parametrize("widths", [(100, 100, 100), (50, 100, 100)])
def test_no_pair_of_laws_takes_long(first: Discrete, second: Discrete, widths: tuple[int, int, int]) -> None:
    start = time.process_time()
    a, b, c = widths
    law = jacobian_spectrum(
        Architecture((Layer(a, b, None, 1.0, ensemble=first), Layer(b, c, None, 1.0, ensemble=second)))
    ).measure
    low, high = law.bounds()
    values = law.cdf(np.linspace(low, high, 50))
    assert np.diff(values).min() > -1e-12
    assert values[-1] == pytest.approx(1.0, abs=1e-9)
    assert law.mean == pytest.approx(first.mean * second.mean, rel=1e-9)
    assert time.process_time() - start < 10.0
