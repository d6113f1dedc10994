"""Block Lanczos and quadrature on its Krylov space: theorems, multiplicities, closed spaces, accuracy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.spectra.prescribed import MATRIX_SPECTRA, generator, symmetric_matrix, symmetric_operator, wasserstein
from torch_rmt.spectra import SLQ, BlockSLQ, DenseOperator, block_gauss_rule, block_lanczos, spectrum_within
from torch_rmt.spectra.probes import sphere

DOUBLE = {"device": torch.device("cpu"), "dtype": torch.float64}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("width", "steps"), [(1, 9), (3, 6), (5, 12)])
def test_block_recurrence(seed: int, width: int, steps: int) -> None:
    """A Q = Q T + Q_{m+1} B E^T: its residual is orthogonal to Q and couples to the last block alone."""
    operator = symmetric_operator("pairs", seed)
    run = block_lanczos(operator, sphere(120, width, generator(seed), **DOUBLE), steps)
    q, t = run.basis.T.numpy(), run.matrix
    np.testing.assert_allclose(q.T @ q, np.eye(steps * width), atol=1e-12)
    residual = operator.matrix.numpy() @ q - q @ t
    assert np.abs(residual[:, :-width]).max() < 1e-12
    np.testing.assert_allclose(np.linalg.norm(residual), np.linalg.norm(run.coupling), rtol=1e-9)
    along = np.arange(steps * width)
    assert (t[np.abs(along[:, None] - along) > 2 * width - 1] == 0).all()


@pytest.mark.parametrize("tail", [0, 7])
@pytest.mark.parametrize(("width", "steps"), [(1, 6), (3, 4), (4, 5)])
def test_each_probes_rule_is_exact_to_degree_2m_minus_1(width: int, steps: int, tail: int) -> None:
    operator = symmetric_operator("flat", 2)
    start = sphere(120, width, generator(3), **DOUBLE)
    nodes, weights = block_gauss_rule(block_lanczos(operator, start, steps), tail=tail)
    image = start.clone()
    beyond = 2 * steps + (tail > 0)  # a tail carries the last coupling, which the moment of order 2m needs
    for degree in range(beyond):
        truth = (start * image).sum(dim=0).numpy()
        np.testing.assert_allclose((weights * nodes**degree).sum(axis=1), truth, atol=1e-12)
        image = operator.matmat(image)
    truth = (start * image).sum(dim=0).numpy()
    assert np.abs((weights * nodes**beyond).sum(axis=1) - truth).max() > 1e-9


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("probes", "depth"), [(2, 9), (4, 6), (3, 1)])
def test_what_the_other_probes_span_is_counted_and_only_the_rest_sampled(seed: int, probes: int, depth: int) -> None:
    """Row i is (tr(Q^T A^k Q) + (dim - rank Q) z^T A^k z) / dim, Q and z made from dense powers."""
    operator = symmetric_operator("flat", seed)
    spectrum = BlockSLQ(probes, depth)(operator, generator(seed))
    assert spectrum.known == 0
    assert spectrum.sampled is not None
    start, matrix = sphere(120, probes, generator(seed), **DOUBLE).numpy(), operator.matrix.numpy()
    steps = depth - -(-depth // 5)
    for i in range(probes):
        powers = [np.linalg.matrix_power(matrix, j) @ np.delete(start, i, axis=1) for j in range(steps)]
        span = np.linalg.qr(np.concatenate([np.zeros((120, 0)), *powers], axis=1))[0]
        rest = start[:, i] - span @ (span.T @ start[:, i])
        rest /= np.linalg.norm(rest)
        share = 1.0 - span.shape[1] / 120
        for degree in range(min(2 * (depth - steps) + 2, 2 * depth)):
            power = np.linalg.matrix_power(matrix, degree)
            at_nodes = spectrum.nodes[i] ** degree
            sampled = share * (rest @ power @ rest)
            assert (spectrum.sampled[i] * at_nodes).sum() == pytest.approx(sampled, abs=1e-11)
            truth = sampled + np.trace(span.T @ power @ span) / 120
            assert (spectrum.weights[i] * at_nodes).sum() == pytest.approx(truth, abs=1e-11)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_multiplicities_below_the_width_are_found_and_larger_ones_not_claimed(seed: int, dtype: torch.dtype) -> None:
    bulk = np.linspace(-1, 1, 190)
    values = np.concatenate([bulk, 4.0 * np.ones(2), [6.0], 8.0 * np.ones(7)])
    operator = DenseOperator(symmetric_matrix(values, seed).to(dtype), symmetric=True)
    spectrum = BlockSLQ(probes=3, depth=14)(operator, generator(seed))
    known = spectrum.nodes[0, -spectrum.known :]
    for value, times in ((4.0, 2), (6.0, 1), (8.0, 0)):
        assert np.count_nonzero(np.abs(known - value) < 1e-3) == times
    np.testing.assert_allclose(spectrum.weights[:, -spectrum.known :], 1 / 200)
    np.testing.assert_allclose(spectrum.weights.sum(axis=1), 1.0, rtol=1e-12)
    share = spectrum.weights[:, np.abs(spectrum.nodes[0] - 8.0) < 1e-3].sum(axis=1).mean()
    assert share == pytest.approx(7 / 200, abs=5 * np.sqrt(2 * 7 / 3) / 200)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_space_that_closes_leaves_no_ghosts_and_is_exact(seed: int, dtype: torch.dtype) -> None:
    """Rank one, and rank ten with ten different eigenvalues; the null space is what remains of the mass."""
    tolerance = 2e-4 if dtype == torch.float32 else 1e-12
    ones = DenseOperator(torch.ones(90, 90, dtype=dtype), symmetric=True)
    spectrum = BlockSLQ(probes=3, depth=20)(ones, generator(seed))
    assert spectrum.known == 1
    assert spectrum.moment(1)[0] == pytest.approx(1.0, rel=tolerance)
    assert wasserstein(spectrum.nodes, spectrum.weights, np.append(np.zeros(89), 90.0)) < 10 * tolerance
    low = symmetric_operator("low rank", seed, dtype)
    spectrum = BlockSLQ(probes=2, depth=20)(low, generator(seed))
    np.testing.assert_allclose(np.sort(spectrum.nodes[0, -10:]), np.arange(1, 11), rtol=tolerance)
    assert wasserstein(spectrum.nodes, spectrum.weights, MATRIX_SPECTRA["low rank"]) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MATRIX_SPECTRA)
def test_every_spectrum_and_every_budget_is_survived(name: str, dtype: torch.dtype) -> None:
    values, operator = MATRIX_SPECTRA[name], symmetric_operator(name, 0, dtype)
    size = np.abs(values).max()
    for budget in (1, 2, 7, 40, 200):
        spectrum = spectrum_within(operator, generator(budget), matvecs=budget)
        assert spectrum.matvecs <= budget
        np.testing.assert_allclose(spectrum.weights.sum(axis=1), 1.0, rtol=1e-9)
        value, error = spectrum.moment(1)
        assert abs(value - values.mean()) <= 6 * error + 1e-4 * size + 1e-12


def test_resolved_eigenvalues_are_eigenvalues() -> None:
    """Of each draw: every counted node lies on an eigenvalue of its own, and no eigenvalue is passed over."""
    for seed in range(6):
        random = np.random.default_rng(seed)
        bulk = np.linalg.eigvalsh(random.standard_normal((300, 300)))
        values = np.sort(np.concatenate([bulk, random.exponential(60.0, 12)]))
        operator = DenseOperator(torch.diag(torch.from_numpy(values)), symmetric=True)
        spectrum = BlockSLQ.for_budget(60)(operator, generator(seed))
        known = np.sort(spectrum.nodes[0, spectrum.nodes.shape[1] - spectrum.known :])
        nearest = np.abs(known[:, None] - values).argmin(axis=1)
        assert len(set(nearest)) == spectrum.known
        np.testing.assert_allclose(known, values[nearest], atol=0.5)
        far = values[nearest[-1] :] if spectrum.known else values[:0]
        assert len(far) <= 2  # counted from the farthest inwards: none beyond the last but one close by


def test_of_a_probe_and_budget_too_small_and_an_operator_that_is_not_symmetric() -> None:
    with pytest.raises(ValueError, match="at least one probe"):
        BlockSLQ(probes=0)
    with pytest.raises(ValueError, match="at least one product"):
        BlockSLQ.for_budget(0)
    with pytest.raises(ValueError, match="Gram"):
        BlockSLQ()(DenseOperator(torch.randn(200, 150, generator=generator(0))), generator(0))
    with pytest.raises(ValueError, match="not finite"):
        BlockSLQ(2, 5)(DenseOperator(torch.full((30, 30), float("nan")), symmetric=True), generator(0))


def test_equal_seeds_give_equal_spectra() -> None:
    operator = symmetric_operator("pairs", 0)
    first, second = (BlockSLQ(3, 10)(operator, generator(5)) for _ in range(2))
    np.testing.assert_array_equal(first.nodes, second.nodes)
    np.testing.assert_array_equal(first.weights, second.weights)


class _Mislabelled(DenseOperator):
    positive = True


@pytest.mark.parametrize("settings", [SLQ(2, 12), BlockSLQ(2, 12)], ids=repr)
def test_nodes_of_a_positive_operator_stay_positive_and_a_wrong_claim_is_refused(settings: SLQ | BlockSLQ) -> None:
    values = np.concatenate([np.zeros(60), np.linspace(0.0, 1.0, 60)])
    for dtype in (torch.float32, torch.float64):
        honest = _Mislabelled(symmetric_matrix(values, 0).to(dtype), symmetric=True)
        assert min(settings(honest, generator(seed)).nodes.min() for seed in range(4)) >= 0.0
        plain = DenseOperator(symmetric_matrix(values, 0).to(dtype), symmetric=True)
        # Were none of these below zero, the clipping would not be seen.
        assert min(settings(plain, generator(seed)).nodes.min() for seed in range(4)) < 0.0
        with pytest.raises(ValueError, match="positive semi-definite"):
            settings(_Mislabelled(symmetric_matrix(values - 0.01, 0).to(dtype), symmetric=True), generator(0))
