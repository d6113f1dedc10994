"""Laws that every estimator of a spectrum must obey: unbiased, calibrated, of the stated order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.fft import dct

from tests.spectra.prescribed import (
    ESTIMATORS,
    MATRIX_SPECTRA,
    generator,
    symmetric_matrix,
    symmetric_operator,
    wasserstein,
)
from torch_rmt.spectra import (
    KPM,
    SLQ,
    DenseOperator,
    Spectrum,
    diagonal,
    exact,
    hutch_plus_plus,
    hutchinson,
    mixed_moment,
    spectrum_within,
    trace,
    xtrace,
)

SEEDS = 200
#: Moments to degree 2 depth do not depend on the tail (test_lanczos_theorems.py); a short one saves time.
short_tail = pytest.mark.usefixtures("_short_tail")


@pytest.fixture
def _short_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_rmt.spectra.slq._SHORTEST_TAIL", 0)
    monkeypatch.setattr("torch_rmt.spectra.block_slq._SHORTEST_TAIL", 0)


NOISY = ["flat", "spike", "pairs", "low rank"]


@short_tail
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("spectrum", NOISY)
def test_estimates_are_unbiased_and_their_errors_calibrated(name: str, spectrum: str) -> None:
    """Over 200 seeds the mean error is within 4 of its own standard error, the z-scores have unit spread.

    The spread of 200 z-scores is known to 5 %, more where a few probes see one eigenvalue. An estimate that
    is exact (a low-rank trace by a sketch that holds its range) is asked to be right to rounding instead.
    """
    estimate, *truths = ESTIMATORS[name]
    values = MATRIX_SPECTRA[spectrum]
    operator = symmetric_operator(spectrum, 0)
    all_drawn = np.array([estimate(operator, generator(seed)) for seed in range(SEEDS)])
    assert all_drawn.shape[1] == len(truths)
    for drawn, truth in zip(all_drawn.transpose(1, 0, 2), truths, strict=True):
        errors = drawn[:, 0] - truth(values)
        scale = np.abs(values).max() * max(1.0, abs(truth(values)) / np.abs(values).max())
        if drawn[:, 1].max() < 1e-9 * scale:
            assert np.abs(errors).max() < 1e-9 * scale
            continue
        assert abs(errors.mean()) < 4 * errors.std() / SEEDS**0.5
        z = errors / drawn[:, 1]
        assert 0.7 < np.sqrt(np.mean(z**2)) < 1.2


@pytest.mark.parametrize("kind", ["all entries alike", "mostly skew", "product"])
@pytest.mark.parametrize("probes", [4, 30])
def test_errors_of_a_trace_that_is_not_symmetric_are_calibrated(kind: str, probes: int) -> None:
    """Only the symmetric part scatters, so |A|_F would foretell up to three times too much."""
    matrix = torch.randn(80, 80, generator=generator(0), dtype=torch.float64)
    scale = torch.linspace(0.0, 2.0, 80, dtype=torch.float64)
    if kind == "mostly skew":
        matrix = torch.diag(scale) + 0.15 * (matrix - matrix.T)
    elif kind == "product":
        matrix = matrix * scale
    drawn = [hutchinson(DenseOperator(matrix), generator(seed), probes=probes) for seed in range(SEEDS)]
    z = np.array([(e.value - float(matrix.trace())) / e.standard_error for e in drawn])
    assert abs(z.mean()) < 4 / SEEDS**0.5
    assert 0.85 < np.sqrt(np.mean(z**2)) < 1.2


@short_tail
@pytest.mark.parametrize("spectrum", ["flat", "spike"])
def test_error_of_slq_falls_as_the_root_of_the_number_of_probes(spectrum: str) -> None:
    values = MATRIX_SPECTRA[spectrum]
    operator = symmetric_operator(spectrum, 1)
    counts = np.array([1, 4, 16])
    errors = []
    for count in counts:
        settings = SLQ(probes=int(count), depth=2)
        drawn = [settings(operator, generator(seed)).moment(2) for seed in range(SEEDS)]
        errors.append(np.sqrt(np.mean([(value - np.mean(values**2)) ** 2 for value, _ in drawn])))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.08)


@short_tail
def test_error_of_slq_falls_as_the_root_of_the_dimension() -> None:
    sizes = np.array([64, 256, 1024])
    errors = []
    for size in sizes:
        values = torch.linspace(-1.0, 1.0, int(size), dtype=torch.float64)
        operator = DenseOperator(torch.diag(values), symmetric=True)
        drawn = [SLQ(probes=1, depth=3)(operator, generator(seed)).moment(1)[0] for seed in range(150)]
        errors.append(np.std(drawn))
    assert np.polyfit(np.log(sizes), np.log(errors), 1)[0] == pytest.approx(-0.5, abs=0.1)


@pytest.mark.parametrize("name", MATRIX_SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_estimators_survive_every_spectrum(name: str, dtype: torch.dtype) -> None:
    """Zero, tiny, identity, rank-deficient, one by one: finite, normalised, inside the spectrum's hull."""
    values = MATRIX_SPECTRA[name]
    operator = symmetric_operator(name, 0, dtype)
    slack = max(1e3 * torch.finfo(dtype).eps, 1e-6) * np.abs(values).max()
    span = float(values.max() - values.min())
    for settings in (SLQ(2, 64), SLQ(2, 64, reorthogonalise="selective"), SLQ(2, 20, deflate=3), KPM(2, 20)):
        spectrum = settings(operator, generator(0))
        np.testing.assert_allclose(spectrum.weights.sum(axis=1), 1.0, rtol=1e-12)
        used = spectrum.nodes[spectrum.weights > 1e-12]
        assert used.min() >= values.min() - 0.3 * span - 10 * slack - 1e-30
        assert used.max() <= values.max() + 0.3 * span + 10 * slack + 1e-30
        value, error = spectrum.moment(1)
        assert abs(value - values.mean()) <= 6 * error + 10 * slack + 1e-30
    if len(values) < 10:
        return
    for function, budget in ((hutchinson, {"probes": 8}), (trace, {}), (xtrace, {}), (hutch_plus_plus, {})):
        found = function(operator, generator(0), **budget)
        assert abs(found.value - values.sum()) <= 6 * found.standard_error + len(values) * slack


@pytest.mark.parametrize("name", ["flat", "spike", "low rank"])
def test_slq_of_full_deflation_is_exact(name: str) -> None:
    """All eigenvalues deflated that differ from zero, save the last."""
    values = MATRIX_SPECTRA[name][-30:]
    operator = DenseOperator(symmetric_matrix(values, 3), symmetric=True)
    spectrum = SLQ(probes=1, depth=4, deflate=29)(operator, generator(0))
    assert spectrum.known >= np.count_nonzero(values) - 1
    assert wasserstein(spectrum.nodes, spectrum.weights, values) < 1e-2 * np.abs(values).max()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_deflated_eigenvalues_enter_with_weight_one_over_n(seed: int) -> None:
    operator = symmetric_operator("pairs", seed)
    spectrum = SLQ(probes=3, depth=10, deflate=4)(operator, generator(seed))
    assert (spectrum.known, spectrum.known_count) == (4, 4)
    np.testing.assert_allclose(np.sort(spectrum.nodes[0, -4:]), [-5, -3, 3, 5], rtol=1e-3)
    np.testing.assert_allclose(spectrum.weights[:, -4:], 1 / 120)
    plain = SLQ(probes=3, depth=10)(operator, generator(seed))
    assert spectrum.moment(2)[1] < 0.3 * plain.moment(2)[1]


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.parametrize("deflate", [0, 5])
def test_law_of_a_rectangular_operator_has_its_zeros_counted(shape: tuple[int, int], deflate: int) -> None:
    matrix = torch.randn(shape, generator=generator(0), dtype=torch.float64)
    matrix = matrix / matrix.shape[0] ** 0.5
    true = exact(DenseOperator(matrix))
    assert true.eigenvalues is not None
    values = true.eigenvalues
    z = []
    for seed in range(60):
        spectrum = SLQ(probes=4, depth=12, deflate=deflate)(DenseOperator(matrix), generator(seed))
        assert spectrum.dim == shape[1]
        assert spectrum.nodes.min() >= 0.0
        atom = spectrum.weights[0, spectrum.nodes[0] == 0.0].sum()
        assert atom == pytest.approx(max(0, shape[1] - shape[0]) / shape[1], abs=1e-12)
        value, error = spectrum.moment(1)
        z.append((value - values.mean()) / error)
    assert 0.7 < np.sqrt(np.mean(np.square(z))) < 1.35
    assert abs(np.mean(z)) < 4 / 60**0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_error_of_the_distribution_function_is_foretold(seed: int) -> None:
    """The Wasserstein distance is the integral of the foretold error, within a factor of two either way."""
    gaussian = np.random.default_rng(seed).standard_normal((400, 800))
    values = np.linalg.eigvalsh(gaussian @ gaussian.T / 800)
    operator = DenseOperator(torch.diag(torch.from_numpy(values)), symmetric=True)
    grid = np.linspace(values[0], values[-1], 400)
    for settings in (SLQ(probes=8, depth=40), SLQ(probes=2, depth=15)):
        ratios = []
        for draw in range(10):
            spectrum = settings(operator, generator(10 * seed + draw))
            error = np.hypot(spectrum.cdf_standard_error(grid), spectrum.cdf_resolution(grid))
            ratios.append(wasserstein(spectrum.nodes, spectrum.weights, values) / np.trapezoid(error, grid))
        assert 0.5 < np.mean(ratios) < 1.5


@pytest.mark.parametrize("seed", [0, 1])
def test_damped_chebyshev_moments_of_kpm(seed: int) -> None:
    """The weights have just the moments of the probes, times Jackson's factors."""
    values = MATRIX_SPECTRA["flat"]
    operator = DenseOperator(torch.diag(torch.from_numpy(values)), symmetric=True)
    errors = []
    for degree in (10, 20, 40, 80):
        spectrum = KPM(probes=64, degree=degree)(operator, generator(seed))
        count = 2 * degree
        moments = dct(spectrum.weights[:, ::-1], type=2, axis=1) / 2
        assert np.abs(moments[:, 0] - 1).max() < 1e-12
        assert (spectrum.weights >= 0).all()
        np.testing.assert_array_equal(spectrum.nodes[0], spectrum.nodes[-1])
        errors.append(wasserstein(spectrum.nodes, spectrum.weights, values))
        assert spectrum.nodes.shape == (64, count)
    # The blur is a convolution of width pi / (2 degree): the distance falls with it until noise takes over.
    assert errors[0] > errors[1] > errors[2]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.7)


def test_kpm_is_exact_on_moments_up_to_the_damping() -> None:
    """For the arcsine-like moments of a single eigenvalue: T_1 is damped by Jackson's first factor alone."""
    operator = DenseOperator(torch.diag(torch.tensor([-1.0, 1.0], dtype=torch.float64)), symmetric=True)
    spectrum = KPM(probes=1, degree=16)(operator, generator(0))
    half = 0.5 * (spectrum.nodes[0, -1] - spectrum.nodes[0, 0]) / np.cos(np.pi / 64)
    centre = 0.5 * (spectrum.nodes[0, -1] + spectrum.nodes[0, 0])
    first = (spectrum.weights[0] * (spectrum.nodes[0] - centre) / half).sum()
    probe = SLQ(probes=1, depth=2)(operator, _after_interval(operator)).moment(1)[0]
    factor = (32 * np.cos(np.pi / 33) + np.sin(np.pi / 33) / np.tan(np.pi / 33)) / 33
    assert first == pytest.approx(factor * (probe - centre) / half, abs=1e-9)


def _after_interval(operator: DenseOperator) -> torch.Generator:
    """A generator in the state in which KPM draws its probes: one vector was drawn for the interval."""
    state = generator(0)
    torch.randn(operator.shape[0], 1, generator=state, dtype=torch.float64)
    return state


def test_diagonal_has_calibrated_errors_entry_by_entry() -> None:
    operator = symmetric_operator("spike", 0)
    truth = operator.matrix.diagonal()
    z = []
    for seed in range(20):
        found = diagonal(operator, generator(seed), probes=40)
        z.append((found.values - truth) / found.standard_errors)
    scores = torch.cat(z)
    assert 0.9 < float(scores.square().mean().sqrt()) < 1.1
    assert abs(float(scores.mean())) < 4 / len(scores) ** 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_traces_of_low_rank_are_exact(seed: int) -> None:
    operator = symmetric_operator("low rank", seed)
    for function in (trace, hutch_plus_plus, xtrace):
        assert function(operator, generator(seed), matvecs=36).value == pytest.approx(55.0, abs=1e-8)
    assert trace(operator, generator(seed), matvecs=36).method == "hutch++"
    assert trace(symmetric_operator("flat", seed), generator(seed)).method == "hutchinson"


@pytest.mark.parametrize("probes", [8, 30])
def test_mixed_moments_of_two_operators(probes: int) -> None:
    """tr(AB)/n against the dense product, for two that do not commute and a product that is not symmetric."""
    a, b = symmetric_operator("spike", 0), symmetric_operator("flat", 1)
    truth = float((a.matrix @ b.matrix @ a.matrix @ b.matrix).trace()) / 120
    found = [mixed_moment((a, b, a, b), generator(seed), probes=probes) for seed in range(SEEDS)]
    z = np.array([(f.value - truth) / f.standard_error for f in found])
    assert found[0].matvecs == 4 * probes
    errors = np.array([f.value - truth for f in found])
    assert abs(errors.mean()) < 4 * errors.std() / SEEDS**0.5
    assert 0.6 < np.sqrt(np.mean(z**2)) < 1.2


def _hessian_like(seed: int) -> np.ndarray:
    """Bulk of a semicircle, a block near zero and a dozen outliers, as in trained networks."""
    random = np.random.default_rng(seed)
    bulk = random.standard_normal((300, 300))
    values = np.linalg.eigvalsh((bulk + bulk.T) / np.sqrt(600)) * 0.05
    return np.concatenate([values, 1e-3 * random.standard_normal(400), np.geomspace(0.15, 1.0, 12)])


@pytest.mark.parametrize(("budget", "plain", "seeds"), [(120, (2, 60), 12), (500, (8, 62), 4)])
def test_a_budget_is_better_spent_than_by_plain_quadrature(budget: int, plain: tuple[int, int], seeds: int) -> None:
    """Wasserstein error at equal cost, against Gauss quadrature without tail as others have it."""
    from torch_rmt.spectra.lanczos import gauss_rule, lanczos
    from torch_rmt.spectra.probes import sphere

    ours, theirs = [], []
    for seed in range(seeds):
        values = _hessian_like(seed % 3)
        operator = DenseOperator(torch.diag(torch.from_numpy(values)), symmetric=True)
        spectrum = spectrum_within(operator, generator(seed), matvecs=budget)
        assert spectrum.matvecs <= 1.2 * budget
        ours.append(wasserstein(spectrum.nodes, spectrum.weights, values))
        start = sphere(len(values), plain[0], generator(seed), device=operator.device, dtype=operator.dtype)
        nodes, weights = gauss_rule(lanczos(operator, start, plain[1], reorthogonalise="full"))
        theirs.append(wasserstein(nodes, weights, values))
    assert np.mean(theirs) > 1.5 * np.mean(ours)


def test_a_budget_beyond_the_dimension_is_spent_on_the_exact_spectrum() -> None:
    operator = symmetric_operator("flat", 0)
    spectrum = spectrum_within(operator, generator(0), matvecs=130)
    assert spectrum.method == "exact"
    assert spectrum.matvecs == 120


def test_standard_errors_of_an_exact_spectrum_are_zero() -> None:
    spectrum: Spectrum = exact(symmetric_operator("flat", 0))
    grid = np.linspace(-1, 1, 7)
    assert (spectrum.cdf_standard_error(grid) == 0).all()
    assert (spectrum.cdf_resolution(grid) == 0).all()
    assert spectrum.trace() == (pytest.approx(0.0, abs=1e-10), 0.0)
