"""Extreme eigenpairs: the right ones, each once, each with a bound that holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.spectra.prescribed import MATRIX_SPECTRA, generator, symmetric_matrix, symmetric_operator
from torch_rmt.spectra import DenseOperator, thick_restart, top_eigenvalues
from torch_rmt.spectra.thick_restart import End


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


class _Counting(DenseOperator):
    """A matrix that notes how many columns each product has, and becomes another one after so many."""

    def __init__(self, matrix: Tensor, later: Tensor | None = None, after: int = 10**9) -> None:
        super().__init__(matrix, symmetric=True)
        self.later, self.after = later, after
        self.columns: list[int] = []

    def matmat(self, V: Tensor) -> Tensor:
        self.columns.append(V.shape[1])
        if self.later is not None and sum(self.columns) > self.after:
            return self.later @ V
        return super().matmat(V)


@pytest.mark.parametrize("name", ["flat", "spike", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_residuals_are_those_of_the_operator_and_every_product_is_counted(
    name: str, dtype: torch.dtype, k: int
) -> None:
    for seed in range(3):
        matrix = symmetric_matrix(MATRIX_SPECTRA[name], seed)
        operator = _Counting(matrix.to(dtype))
        found = top_eigenvalues(operator, k, generator(seed), tolerance=1e-3)
        assert found.matvecs == sum(operator.columns)
        vectors = found.vectors.double()
        true = (matrix @ vectors - vectors * torch.from_numpy(found.values)).norm(dim=0).numpy()
        rounding = 30 * torch.finfo(dtype).eps * np.abs(MATRIX_SPECTRA[name]).max()
        assert (found.residuals >= true - rounding).all()
        assert (found.residuals <= true + rounding).all()


def test_one_product_puts_all_pairs_to_the_test() -> None:
    matrix = symmetric_matrix(np.concatenate([[9.0, 8.0, 7.0, 6.0, 5.0], np.linspace(-1, 1, 300)]), 0)
    operator = _Counting(matrix)
    assert top_eigenvalues(operator, 5, generator(0)).converged
    assert set(operator.columns) == {1}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("wrong", range(3))
@pytest.mark.parametrize("size", [0.5, 4e-4])
def test_products_that_do_not_repeat_are_found_out(seed: int, wrong: int, size: float) -> None:
    """The operator changes in one eigendirection after the search: residuals are those of what it has become."""
    matrix = symmetric_matrix(np.concatenate([[9.0, 8.0, 7.0], np.linspace(-1, 1, 60)]), seed)
    search = top_eigenvalues(_Counting(matrix), 3, generator(seed)).matvecs - 1
    directions = torch.linalg.eigh(matrix).eigenvectors
    turned = size * torch.outer(directions[:, 5], directions[:, -1 - wrong])
    other = matrix + turned + turned.T
    operator = _Counting(matrix, other, search)
    found = top_eigenvalues(operator, 3, generator(seed))
    true = (other @ found.vectors - found.vectors * torch.from_numpy(found.values)).norm(dim=0).numpy()
    assert true[wrong] > 0.9 * size
    if size > 0.01:  # each pair gets a product of its own
        assert not found.converged
        np.testing.assert_allclose(found.residuals, true, rtol=1e-9)
    else:  # within what is allowed, and stated
        assert operator.columns[-1] == 1
        assert (found.residuals >= true * (1 - 1e-9)).all()


def test_the_search_ends_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks are rare, but by the rate seen so far the end is met within a product or so."""

    def products() -> int:
        return sum(top_eigenvalues(symmetric_operator("flat", s), 3, generator(s)).matvecs for s in range(10))

    found = products()
    monkeypatch.setattr(thick_restart, "_PRODUCTS_BETWEEN_LOOKS", 1)
    assert found <= products() + 5  # four at a time would be 15 in the mean


@pytest.mark.parametrize("seed", range(3))
def test_values_of_float32_are_good_to_its_rounding(seed: int) -> None:
    """The error of a Rayleigh quotient is the square of the residual's; nothing above rounding may be added to it."""
    found = top_eigenvalues(symmetric_operator("spike", seed, torch.float32), 3, generator(seed), tolerance=1e-4)
    truth = np.sort(np.abs(MATRIX_SPECTRA["spike"]))[::-1][:3]
    allowed = 10 * torch.finfo(torch.float32).eps * truth[0] + found.residuals**2
    assert (np.abs(np.abs(found.values) - truth) <= allowed).all()


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("most", [30, 31, 100])
def test_no_more_products_than_allowed(most: int, block: int) -> None:
    """Whether the check takes one product or, at a tolerance below rounding, one for each pair."""
    operator = symmetric_operator("flat", 0)
    for tolerance in (1e-3, 1e-15):
        found = top_eigenvalues(operator, 4, generator(0), tolerance=tolerance, block=block, max_matvecs=most)
        assert found.matvecs <= most
        assert found.converged or found.matvecs >= most - block - 5
