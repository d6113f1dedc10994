"""Operators made of others against their matrices, counted products, closed standard errors, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_rmt.operators import Dense, LinearOperator
from torch_rmt.spectra import (
    SLQ,
    DenseOperator,
    Spectrum,
    diagonal,
    exact,
    golub_kahan,
    hutch_plus_plus,
    mixed_moment,
    trace,
    xtrace,
)
from torch_rmt.spectra.exact import to_dense
from torch_rmt.spectra.gram import Complement, Gram
from torch_rmt.spectra.kpm import KPM
from torch_rmt.spectra.traces import Estimate


class Counted(Dense):
    """A matrix that counts the vectors it is multiplied by."""

    def __init__(self, matrix: Tensor, *, symmetric: bool) -> None:
        super().__init__(matrix, symmetric=symmetric)
        self.products = 0

    def matmat(self, V: Tensor) -> Tensor:
        self.products += V.shape[1]
        return super().matmat(V)

    def adjoint(self) -> LinearOperator:
        return self if self.symmetric else Counted(self.matrix.T, symmetric=False)


def drawn(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_gram_and_complement_are_their_matrices(shape: tuple[int, int]) -> None:
    a = drawn(*shape, 0)
    known = drawn(shape[1], 2, 1)
    q = torch.linalg.qr(known).Q
    outside = torch.eye(shape[1], dtype=a.dtype) - q @ q.T
    gram, rest = Gram(DenseOperator(a)), Complement(DenseOperator(a), known)
    assert gram.adjoint() is gram
    assert rest.adjoint().adjoint() is rest
    b = drawn(shape[1], shape[1], 2)
    inner = Complement(DenseOperator(b + b.T, symmetric=True), known)
    assert inner.adjoint() is inner
    for operator, matrix in (
        (gram, a.T @ a),
        (rest, a @ outside),
        (rest.adjoint(), outside @ a.T),
        (inner, outside @ (b + b.T) @ outside),
    ):
        assert operator.shape == tuple(matrix.shape)
        eye = torch.eye(matrix.shape[1], dtype=a.dtype)
        torch.testing.assert_close(operator.matmat(eye), matrix, rtol=0, atol=1e-12)
        torch.testing.assert_close(to_dense(operator), matrix, rtol=0, atol=1e-12)


def test_products_are_counted_as_they_are_spent() -> None:
    b = drawn(40, 40, 0)
    for estimator in (KPM(probes=3, degree=10), SLQ(probes=3, depth=10)):
        operator = Counted(b + b.T, symmetric=True)
        assert estimator(operator, torch.Generator().manual_seed(0)).matvecs == operator.products
    operator = Counted(b + b.T, symmetric=True)
    assert exact(operator).matvecs == operator.products == 40


def test_refusals() -> None:
    for settings in ({"probes": 0}, {"degree": 1}):
        with pytest.raises(ValueError, match="KPM needs"):
            KPM(**settings)
    big = torch.zeros(1).expand(17_000, 17_000)
    with pytest.raises(ValueError, match=r"would take 2\.2 GiB"):
        to_dense(Counted(big, symmetric=False))
    with pytest.raises(ValueError, match="not finite"):
        golub_kahan(DenseOperator(torch.full((3, 3), torch.nan)), torch.ones(3, 1), 2, reorthogonalise=True)
    with pytest.raises(ValueError, match="start vector"):
        golub_kahan(DenseOperator(torch.eye(3)), torch.tensor([[1.0, 0.0]] * 3), 2, reorthogonalise=False)
    with pytest.raises(ValueError, match="KPM needs a symmetric"):
        KPM()(DenseOperator(torch.eye(3)), torch.Generator())


@pytest.mark.parametrize(("probes", "dim"), [(1, 10), (5, 300)])
def test_standard_errors_where_they_are_closed(probes: int, dim: int) -> None:
    # two eigenvalues of equal mass: the quadrature is exact, its variance is known without noise
    nodes = np.tile([-1.0, 3.0], (probes, 1))
    spectrum = Spectrum(nodes, np.full((probes, 2), 0.5), dim, 2 * probes, "slq", seed=0)
    value, error = spectrum.moment(1)
    variance = 4.0 * 2 / ((dim + 2) * probes)
    assert value == 1.0
    assert error == pytest.approx(math.sqrt(variance), rel=1e-6)
    assert spectrum.trace() == pytest.approx((dim * value, dim * error))
    assert float(spectrum.cdf_standard_error(0.0)) == pytest.approx(math.sqrt(0.5 / ((dim + 2) * probes)))
    assert spectrum.reach == pytest.approx(4.0 / (2 * 2))
    # one weight over sqrt(12) between two nodes, nothing outside; a node that is taken for zero costs nothing
    assert spectrum.cdf_resolution([-2.0, 0.0, 4.0]) == pytest.approx([0.0, 0.5 / math.sqrt(12), 0.0])
    assert spectrum.cdf_resolution([0.0], zero=1.5) == pytest.approx([0.25 / math.sqrt(12)])
    assert spectrum.cdf_resolution([0.0], zero=0.5) == pytest.approx([0.5 / math.sqrt(12)])


def test_what_is_left_of_a_positive_operator_is_positive() -> None:
    """Eigenvectors known to a percent leave a matrix of rank two whose rounding may fall on either side of zero."""
    factor = drawn(60, 5, 0).float()
    operator = Gram(Dense(factor.T))
    assert Complement(operator, factor[:, :1]).positive
    assert not Complement(Dense(factor[:5], symmetric=False), factor[:5, :1]).positive
    for seed in range(3):
        spectrum = SLQ(2, 8, deflate=3)(operator, torch.Generator().manual_seed(seed))
        assert spectrum.nodes.min() >= 0.0


def test_a_spectrum_has_a_probability_for_weights() -> None:
    for weights in ([[1.5, -0.5]], [[0.5, 0.4]]):
        with pytest.raises(ValueError, match="non-negative and each row sums to one"):
            Spectrum(np.array([[0.0, 1.0]]), np.array(weights), dim=2, matvecs=2, method="exact")


@pytest.mark.parametrize("estimate", [trace, hutch_plus_plus, xtrace])
def test_a_trace_within_its_budget(estimate: Callable[..., Estimate]) -> None:
    operator = Dense(torch.diag(torch.linspace(0.0, 1.0, 40, dtype=torch.float64)), symmetric=True)
    for budget in (6, 7, 20):
        assert estimate(operator, torch.Generator().manual_seed(0), matvecs=budget).matvecs <= budget
    with pytest.raises(ValueError, match="at least 6"):
        estimate(operator, torch.Generator().manual_seed(0), matvecs=5)


def test_settings_that_measure_nothing_are_refused() -> None:
    operator = Dense(torch.eye(4), symmetric=True)
    for probes, depth in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="at least one probe and one step"):
            SLQ(probes, depth)
    with pytest.raises(ValueError, match="at least two probes"):
        mixed_moment((operator, operator), torch.Generator().manual_seed(0), probes=1)
    with pytest.raises(ValueError, match="at least two probes"):
        diagonal(operator, torch.Generator().manual_seed(0), probes=1)
    for shape in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="no spectrum of an empty matrix"):
            golub_kahan(Dense(torch.zeros(shape)), torch.ones(shape[1], 1), 2, reorthogonalise=False)


@pytest.mark.parametrize("exponent", [-40, 40])
@pytest.mark.parametrize("reorthogonalise", [True, False])
def test_a_subspace_closes_at_any_scale(exponent: int, reorthogonalise: bool) -> None:
    """Three singular values take three steps; a power of two rounds nothing, so all else is the same to the bit."""
    matrix = drawn(20, 3, 0) @ drawn(3, 16, 1)
    start, runs = drawn(16, 2, 2), []
    for scale in (1.0, 2.0**exponent):
        runs.append(golub_kahan(Dense(scale * matrix), start, 6, reorthogonalise=reorthogonalise))
        if reorthogonalise:
            assert (runs[-1].diagonal[:, :3] > 0).all()
            assert (runs[-1].diagonal[:, 4:] == 0).all()
    np.testing.assert_array_equal(runs[1].diagonal, runs[0].diagonal * 2.0**exponent)
