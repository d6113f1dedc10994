"""Extreme eigenpairs: the right ones, each once, each with a bound that holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.spectra.prescribed import MATRIX_SPECTRA, generator, symmetric_matrix, symmetric_operator
from torch_rmt.spectra import DenseOperator, top_eigenvalues
from torch_rmt.spectra.extremes import End


def wanted(values: np.ndarray, k: int, end: End) -> np.ndarray:
    falling = np.sort(values)[::-1]
    if end == "magnitude":
        return values[np.argsort(-np.abs(values), kind="stable")][:k]
    if end == "both":
        return np.concatenate([falling[:k], falling[::-1][:k]])
    return falling[:k] if end == "largest" else falling[::-1][:k]


@pytest.mark.parametrize("name", [name for name in MATRIX_SPECTRA if name not in ("one", "decades")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("end", ["magnitude", "largest", "smallest", "both"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_right_eigenvalues(name: str, dtype: torch.dtype, end: End, seed: int) -> None:
    """The prescribed values; every residual bounds the distance to an eigenvalue; vectors orthonormal."""
    values = MATRIX_SPECTRA[name]
    operator = symmetric_operator(name, seed, dtype)
    found = top_eigenvalues(operator, 4, generator(seed), tolerance=1e-3, end=end)
    assert found.converged, found.advice
    norm = np.abs(values).max()
    rounding = 1e3 * torch.finfo(dtype).eps * norm
    expected = wanted(values, 4, end)
    if end == "magnitude":  # +-pairs may come in either order
        expected, got = np.sort(expected), np.sort(found.values)
    else:
        got = found.values
    np.testing.assert_allclose(np.abs(got), np.abs(expected), atol=1e-5 * norm + rounding)
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert np.abs(values - value).min() <= residual + rounding
        assert residual <= 1.1 * max(1e-3 * abs(value), rounding)
    overlap = found.vectors.T @ found.vectors
    assert float((overlap - torch.eye(len(found.values), dtype=dtype)).abs().max()) < 1e-3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pairs_of_opposite_sign_are_told_apart(seed: int) -> None:
    found = top_eigenvalues(symmetric_operator("pairs", seed), 4, generator(seed), tolerance=1e-6)
    np.testing.assert_allclose(np.sort(found.values), [-5, -3, 3, 5], rtol=1e-10)


@pytest.mark.parametrize("copies", [2, 3])
def test_a_multiple_eigenvalue_is_found_as_often_as_the_block_is_wide(copies: int) -> None:
    values = np.concatenate([np.full(copies, 4.0), [3.0], np.linspace(-1, 1, 150)])
    operator = DenseOperator(symmetric_matrix(values, 0), symmetric=True)
    found = top_eigenvalues(operator, copies + 1, generator(0), block=copies, tolerance=1e-5)
    np.testing.assert_allclose(found.values, [4.0] * copies + [3.0], rtol=1e-8)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-8])
def test_a_finer_tolerance_costs_more_and_is_met(tolerance: float) -> None:
    operator = symmetric_operator("flat", 0)
    found = top_eigenvalues(operator, 3, generator(0), tolerance=tolerance)
    truth = np.sort(np.abs(MATRIX_SPECTRA["flat"]))[::-1][:3]
    assert (found.residuals <= tolerance * np.abs(found.values)).all()
    np.testing.assert_allclose(np.abs(found.values), truth, atol=tolerance)
    coarser = top_eigenvalues(operator, 3, generator(0), tolerance=0.3)
    assert coarser.matvecs < found.matvecs


def test_restarts_reach_the_same_as_one_long_run() -> None:
    """A basis of 64 on a spectrum that needs some 200 products."""
    values = np.linspace(-1, 1, 1500)
    operator = DenseOperator(torch.diag(torch.from_numpy(values)), symmetric=True)
    found = top_eigenvalues(operator, 3, generator(0), tolerance=1e-6, end="largest")
    assert found.converged
    assert found.matvecs > 150
    np.testing.assert_allclose(found.values, values[::-1][:3], atol=1e-9)


@pytest.mark.parametrize("shape", [(50, 80), (80, 50)])
def test_singular_values_of_a_rectangular_operator(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=generator(5), dtype=torch.float64)
    found = top_eigenvalues(DenseOperator(matrix), 3, generator(0), tolerance=1e-8)
    truth = torch.linalg.svdvals(matrix)[:3].numpy() ** 2
    np.testing.assert_allclose(found.values, truth, rtol=1e-12)
    assert found.vectors.shape == (shape[1], 3)


def test_the_same_seed_gives_the_same_bits() -> None:
    operator = symmetric_operator("spike", 0, torch.float32)
    first, second = (top_eigenvalues(operator, 3, generator(7)) for _ in range(2))
    assert first.vectors.equal(second.vectors)
    np.testing.assert_array_equal(first.values, second.values)
    assert first.matvecs == second.matvecs


def test_failure_is_a_value_with_advice() -> None:
    operator = symmetric_operator("flat", 0)
    found = top_eigenvalues(operator, 5, generator(0), tolerance=1e-10, max_matvecs=15)
    assert not found.converged
    assert "max_matvecs" in found.advice
    assert found.matvecs <= 15
    # What was returned is still bounded by its residuals.
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert np.abs(MATRIX_SPECTRA["flat"] - value).min() <= residual


def test_bad_requests_and_products() -> None:
    operator = symmetric_operator("flat", 0)
    for k, block in ((0, 1), (121, 1), (3, 0)):
        with pytest.raises(ValueError, match="cannot find"):
            top_eigenvalues(operator, k, generator(0), block=block)
    bad = DenseOperator(torch.full((5, 5), float("nan")))
    bad.symmetric = True
    with pytest.raises(ValueError, match="not finite"):
        top_eigenvalues(bad, 1, generator(0))
