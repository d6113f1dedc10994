"""`Spectrum`, `exact` and `SLQ` on matrices whose spectrum is prescribed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.spectra.prescribed import MATRIX_SPECTRA, symmetric_matrix
from torch_rmt.spectra import SLQ, DenseOperator, Spectrum, exact


@pytest.mark.parametrize("name", MATRIX_SPECTRA)
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_returns_the_prescribed_spectrum(name: str, seed: int) -> None:
    values = MATRIX_SPECTRA[name]
    for dtype in (torch.float64, torch.float32):
        spectrum = exact(DenseOperator(symmetric_matrix(values, seed).to(dtype), symmetric=True))
        slack = 50 * torch.finfo(dtype).eps * (np.abs(values).max() + 1e-300)
        np.testing.assert_allclose(spectrum.eigenvalues, np.sort(values), rtol=0, atol=slack)
        assert spectrum.probes == 0
        assert spectrum.moment(2)[1] == 0.0


@pytest.mark.parametrize("shape", [(7, 19), (19, 7), (1, 6), (6, 1)])
def test_exact_counts_the_zeros_of_a_rectangular_operator(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    spectrum = exact(DenseOperator(matrix))
    assert spectrum.dim == shape[1]
    assert not spectrum.symmetric
    wanted = np.linalg.eigvalsh((matrix.T @ matrix).numpy())
    np.testing.assert_allclose(spectrum.eigenvalues, wanted, atol=1e-12 * wanted.max())
    assert (spectrum.eigenvalues == 0).sum() == max(0, shape[1] - shape[0])
    assert spectrum.matvecs == min(shape)


def test_exact_says_when_a_symmetric_operator_is_not() -> None:
    operator = DenseOperator(torch.tensor([[0.0, 1.0], [-0.5, 0.0]]))
    operator.symmetric = True
    assert "claims to be symmetric" in exact(operator).notes[0]


def test_errors_say_what_to_do() -> None:
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="not finite"):
        exact(DenseOperator(torch.full((3, 3), float("nan"))))
    operator = DenseOperator(torch.full((3, 3), float("inf")))
    operator.symmetric = True
    with pytest.raises(ValueError, match="not finite"):
        SLQ(probes=1, depth=2)(operator, generator)
    with pytest.raises(ValueError, match="empty"):
        exact(DenseOperator(torch.zeros(0, 3)))
    with pytest.raises(ValueError, match="at least one probe"):
        SLQ(probes=0)
    with pytest.raises(ValueError, match="not symmetric"):
        DenseOperator(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), symmetric=True)
    with pytest.raises(ValueError, match="sums to one"):
        Spectrum(np.ones((1, 2)), np.ones((1, 2)), dim=2, matvecs=0, method="made up")


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", [(40, 100), (100, 40)])
def test_slq_of_a_rectangular_operator_has_the_law_of_the_columns(shape: tuple[int, int], seed: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spectrum = SLQ(probes=6, depth=40)(DenseOperator(matrix), torch.Generator().manual_seed(seed))
    assert spectrum.dim == shape[1]
    true = np.linalg.eigvalsh((matrix.T @ matrix).numpy())
    for k in (1, 2):
        value, error = spectrum.moment(k)
        assert abs(value - (true**k).mean()) < 5 * error
    zeros = max(0.0, 1 - shape[0] / shape[1])
    assert spectrum.measure().cdf(1e-9 * true.max()) == pytest.approx(zeros, abs=1e-9)


def test_slq_is_a_function_of_the_seed() -> None:
    operator = DenseOperator(symmetric_matrix(MATRIX_SPECTRA["flat"], 0), symmetric=True)
    first, again, other = (SLQ(probes=3, depth=9)(operator, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.nodes, again.nodes)
    np.testing.assert_array_equal(first.weights, again.weights)
    assert np.abs(first.nodes - other.nodes).max() > 1e-6
    assert first.seed == 5
