"""Theorems about the recurrences, with tolerances from eps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.spectra.prescribed import MATRIX_SPECTRA, generator, symmetric_matrix, symmetric_operator
from torch_rmt.spectra import DenseOperator, golub_kahan, lanczos, top_eigenvalues
from torch_rmt.spectra.golub_kahan import squared_gauss_rule
from torch_rmt.spectra.lanczos import Reorthogonalise, gauss_rule
from torch_rmt.spectra.probes import sphere

FLOAT_TYPES = [torch.float64, torch.float32]


def start(operator: DenseOperator, count: int, seed: int) -> torch.Tensor:
    return sphere(operator.shape[1], count, generator(seed), device=operator.device, dtype=operator.dtype)


@pytest.mark.parametrize("name", MATRIX_SPECTRA)
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("how", ["full", "selective"])
def test_lanczos_decomposition(name: str, dtype: torch.dtype, how: Reorthogonalise) -> None:
    """A Q - Q T = beta r e_m^T, and Q^T Q = 1: to eps if full, to its square root if selective."""
    operator = symmetric_operator(name, 0, dtype)
    run = lanczos(operator, start(operator, 3, 1), 40, reorthogonalise=how)
    assert run.basis is not None
    eps = torch.finfo(dtype).eps
    norm = float(np.abs(MATRIX_SPECTRA[name]).max())
    for probe in range(3):
        length = 1 + int(np.cumprod(run.offdiagonal[probe, :-1] > 0).sum())
        q = run.basis[probe, :length].T
        aside = torch.diag(torch.from_numpy(run.offdiagonal[probe, : length - 1]), 1)
        t = torch.diag(torch.from_numpy(run.diagonal[probe, :length])) + aside + aside.T
        left = operator.matrix @ q - q @ t.to(dtype)
        if length == run.diagonal.shape[1]:
            left[:, -1] -= run.residual[:, probe] * run.offdiagonal[probe, -1]
        assert float(left.norm()) <= 100 * eps * norm * length**0.5 + (0 if how == "full" else eps**0.5 * norm)
        loss = float((q.T @ q - torch.eye(length, dtype=dtype)).abs().max())
        assert loss <= (50 * eps if how == "full" else eps**0.5)


@pytest.mark.parametrize("depth", [1, 2, 5, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gauss_rule_is_exact_to_degree_2m_minus_1_and_no_further(depth: int, seed: int) -> None:
    """At degree 2m the rule misses by (beta_1 ... beta_m)^2 exactly; its tail adds just that."""
    operator = symmetric_operator("flat", seed)
    v = start(operator, 2, seed)
    run = lanczos(operator, v, depth, reorthogonalise="full")
    nodes, weights = gauss_rule(run)
    tail_nodes, tail_weights = gauss_rule(run, tail=30)
    power = v
    for degree in range(1, 2 * depth + 1):
        power = operator.matrix @ power
        true = (v * power).sum(dim=0).numpy()
        rule, continued = (
            (weights * nodes**degree).sum(axis=1),
            (tail_weights * tail_nodes**degree).sum(axis=1),
        )
        np.testing.assert_allclose(continued, true, atol=1e-14)
        if degree < 2 * depth:
            np.testing.assert_allclose(rule, true, atol=1e-14)
        else:
            np.testing.assert_allclose(true - rule, np.prod(run.offdiagonal, axis=1) ** 2, rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chebyshev_markov_stieltjes(seed: int) -> None:
    """The probe's own distribution function passes between the sums without and with each node's weight."""
    values = MATRIX_SPECTRA["flat"]
    operator = DenseOperator(torch.diag(torch.from_numpy(values)), symmetric=True)
    v = start(operator, 1, seed)
    nodes, weights = gauss_rule(lanczos(operator, v, 12, reorthogonalise="full"))
    mass = v[:, 0].numpy() ** 2
    for j, node in enumerate(nodes[0]):
        assert weights[0, :j].sum() <= mass[values < node].sum() + 1e-12
        assert mass[values <= node].sum() <= weights[0, : j + 1].sum() + 1e-12


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)])
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("falling", [False, True], ids=["flat", "decades"])
def test_golub_kahan_decomposition(shape: tuple[int, int], dtype: torch.dtype, falling: bool) -> None:
    matrix = torch.randn(shape, generator=generator(0), dtype=torch.float64)
    if falling:
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        matrix = left * torch.logspace(0, -6, left.shape[1], dtype=torch.float64) @ right
    matrix = matrix.to(dtype)
    operator = DenseOperator(matrix)
    steps = 20
    run = golub_kahan(operator, start(operator, 2, 1), steps, reorthogonalise=True)
    eps, norm = torch.finfo(dtype).eps, float(torch.linalg.matrix_norm(matrix, 2))
    assert run.left is not None
    assert run.right is not None
    for probe in range(2):
        u, v = run.left[probe].T, run.right[probe].T
        b = torch.diag(torch.from_numpy(run.diagonal[probe]))
        b += torch.diag(torch.from_numpy(run.offdiagonal[probe, :-1]), 1)
        assert float((matrix @ v - u @ b.to(dtype)).norm()) <= 100 * eps * norm
        for q in (u, v):
            assert float((q.T @ q - torch.eye(steps, dtype=dtype)).abs().max()) <= 50 * eps


@pytest.mark.parametrize("seed", [0, 1])
def test_golub_kahan_is_lanczos_on_the_gram_matrix(seed: int) -> None:
    matrix = torch.randn(40, 30, generator=generator(seed), dtype=torch.float64)
    operator, gram = DenseOperator(matrix), DenseOperator(matrix.T @ matrix, symmetric=True)
    v = start(operator, 2, seed)
    nodes, weights = squared_gauss_rule(golub_kahan(operator, v, 10, reorthogonalise=True))
    wanted, wanted_weights = gauss_rule(lanczos(gram, v, 10, reorthogonalise="full"))
    np.testing.assert_allclose(nodes, wanted, rtol=1e-9)
    np.testing.assert_allclose(weights, wanted_weights, rtol=1e-7)


def test_golub_kahan_keeps_small_singular_values_that_the_gram_matrix_loses() -> None:
    singular = torch.logspace(-10, 0, 30, dtype=torch.float64)
    operator = DenseOperator(torch.diag(singular))
    nodes, _ = squared_gauss_rule(golub_kahan(operator, start(operator, 1, 0), 30, reorthogonalise=True))
    np.testing.assert_allclose(np.sqrt(nodes[0]), singular.numpy(), rtol=1e-4)
    gram = DenseOperator(torch.diag(singular**2), symmetric=True)
    squared, _ = gauss_rule(lanczos(gram, start(gram, 1, 0), 30, reorthogonalise="full"))
    assert np.abs(np.sqrt(np.abs(squared[0])) / singular.numpy() - 1).max() > 0.1


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_ghosts_at_200_steps(dtype: torch.dtype, seed: int) -> None:
    """Ten outliers, each once with reorthogonalisation; several times without, or this test says nothing."""
    values = np.concatenate([np.linspace(-1.0, 1.0, 390), np.linspace(3.0, 30.0, 10)])
    operator = DenseOperator(symmetric_matrix(values, seed).to(dtype), symmetric=True)
    copies = {}
    for how in ("full", "selective", "none"):
        nodes, _ = gauss_rule(lanczos(operator, start(operator, 1, seed), 200, reorthogonalise=how))
        copies[how] = [int((np.abs(nodes[0] - value) < 1e-3).sum()) for value in values[-10:]]
    assert copies["full"] == copies["selective"] == [1] * 10
    assert max(copies["none"]) > 1
    found = top_eigenvalues(operator, 12, generator(seed), tolerance=1e-4)
    wanted = values[np.argsort(-np.abs(values))][:10]
    np.testing.assert_allclose(found.values[:10], wanted, rtol=1e-5)
    assert len(np.unique(found.values.round(5))) == 12


def test_recurrences_refuse_what_they_cannot_do() -> None:
    operator = symmetric_operator("flat", 0)
    with pytest.raises(ValueError, match="start vector"):
        lanczos(operator, torch.zeros(120, 1, dtype=torch.float64), 3, reorthogonalise="none")
    rectangular = DenseOperator(operator.matrix[:, :7])
    with pytest.raises(ValueError, match="Gram"):
        lanczos(rectangular, start(rectangular, 1, 0), 3, reorthogonalise="none")
    bad = DenseOperator(operator.matrix / 0.0)
    bad.symmetric = True
    with pytest.raises(ValueError, match="not finite"):
        lanczos(bad, start(bad, 1, 0), 3, reorthogonalise="selective")
