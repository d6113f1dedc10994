"""Sums of rectangular matrices: closed forms, the square route, rectangular cumulants, and matrices that are drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from torch_rmt.measures import (
    Affine,
    Bernoulli,
    Discrete,
    MarchenkoPastur,
    PointMass,
    RectangularSum,
    Semicircle,
    SpectralMeasure,
    free_add,
    moments_from_rectangular_cumulants,
    rectangular_cumulants,
    rectangular_sum,
)


def opaque(law: SpectralMeasure) -> SpectralMeasure:
    """The same law, so that no closed form is seen."""
    return Affine(law, 1.0)


@pytest.mark.parametrize("widths", [(100, 200), (200, 100), (100, 100), (100, 3000), (3000, 100)])
def test_gaussian_matrices_add_their_variances(widths: tuple[int, int]) -> None:
    ratio = widths[0] / widths[1]
    wanted = MarchenkoPastur(ratio, 3.0)
    assert repr(rectangular_sum([MarchenkoPastur(ratio), MarchenkoPastur(ratio, 2.0)], widths)) == repr(wanted)
    law = rectangular_sum([MarchenkoPastur(ratio), opaque(MarchenkoPastur(ratio, 2.0))], widths)
    assert isinstance(law, RectangularSum)
    low, high = wanted.support()[0]
    assert law.support()[0] == pytest.approx((low, high), rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(np.ravel(law.atoms()), np.ravel(wanted.atoms()), atol=1e-14)
    x = low + (high - low) * np.array([1e-6, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-6])
    np.testing.assert_allclose(law.density(x), wanted.density(x), rtol=1e-8)
    np.testing.assert_allclose(law.cdf(x), wanted.cdf(x), atol=1e-12)
    z = x + 0.2j * high
    np.testing.assert_allclose(law.stieltjes(z), wanted.stieltjes(z), rtol=1e-13)
    np.testing.assert_allclose(law.stieltjes(-x), wanted.stieltjes(-x), rtol=1e-8)


def symmetrised(law: Discrete) -> Discrete:
    root = np.sqrt(law.nodes)
    return Discrete(np.concatenate([-root, root]), np.concatenate([law.weights, law.weights]))


def test_square_matrices_are_the_free_sum_of_symmetrised_laws() -> None:
    first, second = Discrete([0.3, 2.0, 5.0], [0.5, 0.3, 0.2]), Discrete([0.0, 1.0], [0.4, 0.6])
    law = rectangular_sum([first, second, MarchenkoPastur(1.0, 0.2)], [70, 70])
    whole = free_add(symmetrised(first), symmetrised(second), Semicircle(0.2))
    y = np.linspace(0.02, whole.bounds()[1], 57)
    np.testing.assert_allclose(law.cdf(y**2), 2 * whole.cdf(y) - 1, atol=1e-11)
    np.testing.assert_allclose(law.density(y**2) * y, whole.density(y), atol=1e-9)
    wanted = [(a**2, b**2) for a, b in whole.support() if a >= 0 < b] or [(0.0, whole.bounds()[1] ** 2)]
    np.testing.assert_allclose(law.support(), wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("widths", [(60, 90), (90, 60)])
def test_nothing_added(widths: tuple[int, int]) -> None:
    law = Discrete([0.0, 1.0, 3.0], [0.4, 0.4, 0.2])
    assert rectangular_sum([law, PointMass(0.0)], widths) is law
    assert rectangular_sum([PointMass(0.0)], widths).atoms() == ((0.0, 1.0),)
    nearly = rectangular_sum([law, MarchenkoPastur(widths[0] / widths[1], 1e-8)], widths)
    for edge in (0.5, 0.9, 1.1, 2.9, 3.1):
        assert float(nearly.cdf(edge)) == pytest.approx(float(law.cdf(edge)), abs=1e-12)


@pytest.mark.parametrize("ratio", [1.0, 0.4, 0.03])
def test_moments_and_rectangular_cumulants(ratio: float) -> None:
    """c_2 = m_2 - (1 + ratio) m_1^2, a Gaussian has the first alone, and contour moments are another way."""
    m = np.array([1.3, 3.1, 9.0, 31.0, 120.0])
    c = rectangular_cumulants(m, ratio)
    assert c[:2] == pytest.approx([m[0], m[1] - (1 + ratio) * m[0] ** 2])
    np.testing.assert_allclose(moments_from_rectangular_cumulants(c, ratio), m, rtol=1e-13)
    gaussian = rectangular_cumulants(MarchenkoPastur(ratio, 2.0).moments(6), ratio)
    np.testing.assert_allclose(gaussian, [2.0, 0, 0, 0, 0, 0], atol=1e-9)
    widths = [1000, 1000 / ratio]
    law = rectangular_sum([Discrete([0.5, 2.0]), Bernoulli(0.7, high=3.0)], widths)
    for k in range(1, 7):
        assert SpectralMeasure.moment(law, k) == pytest.approx(law.moment(k), rel=1e-11)


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_the_transpose_has_the_same_values(p: float) -> None:
    """A^T A and A A^T differ by their kernels: mass 1/2 of zeros at widths 2 to 1."""
    wide = rectangular_sum([Bernoulli(p), Discrete([0.0, 2.0, 3.0], [0.5, 0.25, 0.25])], [200, 100])
    tall = rectangular_sum([Discrete([0.0, 1.0], [1 - 2 * p, 2 * p]), Discrete([2.0, 3.0])], [100, 200])
    x = np.linspace(0.05, 9.0, 40)
    np.testing.assert_allclose(wide.cdf(x), 0.5 + 0.5 * tall.cdf(x), atol=1e-12)
    np.testing.assert_allclose(wide.density(x), 0.5 * tall.density(x), atol=1e-11)
    assert wide.quantile(0.9) == pytest.approx(float(tall.quantile(0.8)), rel=1e-12)


def test_atoms_are_what_the_ranks_leave() -> None:
    """80 ones, 15 threes among 100 columns: 5 zeros stay, and 80 - 2 * 15 ones."""
    law = rectangular_sum([Bernoulli(0.8), Bernoulli(0.15, high=3.0)], [100, 150])
    np.testing.assert_allclose(law.atoms(), [(0.0, 0.05), (1.0, 0.5)], atol=1e-14)
    generator = np.random.default_rng(0)
    values = drawn([(1.0, 80), (3.0, 15)], 100, 150, generator)
    assert np.sum(values < 1e-10) == 5
    assert np.sum(np.abs(values - 1.0) < 1e-10) == 50


def haar(n: int, generator: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(generator.standard_normal((n, n)))
    return q * np.sign(np.diag(r))


def placed(squares: np.ndarray, n_in: int, n_out: int, generator: np.random.Generator) -> np.ndarray:
    """A matrix in general position with these squared singular values."""
    k = len(squares)
    return (haar(n_out, generator)[:, :k] * np.sqrt(squares)) @ haar(n_in, generator)[:, :k].T


def drawn(parts: list[tuple[float, int]], n_in: int, n_out: int, generator: np.random.Generator) -> np.ndarray:
    total = sum(placed(np.full(k, value), n_in, n_out, generator) for value, k in parts)
    return np.linalg.eigvalsh(total.T @ total)


#: shape (n_in, n_out) in units of n, the laws, and the matrices
DRAWN: dict[str, tuple[tuple[float, float], list[SpectralMeasure], Callable[..., list[np.ndarray]]]] = {
    "isometry and gaussian": (
        (1.0, 2.0),
        [PointMass(1.0), MarchenkoPastur(0.5, 0.6)],
        lambda n, g: [placed(np.ones(n), n, 2 * n, g), g.standard_normal((2 * n, n)) * (0.6 / (2 * n)) ** 0.5],
    ),
    "projection and three values": (
        (2.0, 1.0),
        [Bernoulli(0.25), Discrete([0.0, 1.0, 2.0, 5.0], [0.5, 0.2, 0.2, 0.1])],
        lambda n, g: [
            placed(np.ones(n // 2), 2 * n, n, g),
            placed(np.repeat([1.0, 2.0, 5.0], [2 * n // 5, 2 * n // 5, n // 5]), 2 * n, n, g),
        ],
    ),
    "three matrices": (
        (1.0, 1.5),
        [MarchenkoPastur(2 / 3, 0.5), Discrete([0.2, 2.0]), PointMass(1.0)],
        lambda n, g: [
            g.standard_normal((3 * n // 2, n)) * (0.5 / (1.5 * n)) ** 0.5,
            placed(np.repeat([0.2, 2.0], n // 2), n, 3 * n // 2, g),
            placed(np.ones(n), n, 3 * n // 2, g),
        ],
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_matrices(name: str) -> None:
    """The distance falls like one over the width: Wasserstein's, without the zeros that the shape forces."""
    shape, laws, make = DRAWN[name]
    law = rectangular_sum(laws, shape)
    generator, distances, zeros = np.random.default_rng(5), [], max(0.0, 1 - shape[1] / shape[0])
    for n, draws in ((40, 10), (120, 4)):
        found, count = [], round(min(shape) * n)
        wanted = law.quantile(zeros + (1 - zeros) * (np.arange(count) + 0.5) / count)
        for _ in range(draws):
            total = sum(make(n, generator))
            assert total.shape == (shape[1] * n, shape[0] * n)
            values = np.sort(np.linalg.svd(total, compute_uv=False) ** 2)
            found.append(np.abs(wanted - values).mean())
        distances.append(np.mean(found))
    assert distances[0] < 6.0 / 40
    assert distances[1] / distances[0] == pytest.approx(1 / 3, rel=0.35)


@pytest.mark.parametrize("seed", range(3))
def test_laws_of_many_values(seed: int) -> None:
    """Equations solved wherever asked: mass, order and moments of random laws."""
    generator = np.random.default_rng(seed)
    widths = [100, int(generator.integers(20, 500))]
    rank = min(1.0, widths[1] / widths[0])
    laws = []
    for _ in range(2 + seed % 2):
        nodes, weights = generator.exponential(size=4), generator.exponential(size=4)
        laws.append(Discrete([0.0, *nodes], [1 - rank, *(rank * weights / weights.sum())]))
    law = rectangular_sum(laws, widths)
    x = np.linspace(0.0, law.bounds()[1], 400)
    total = law.cdf(x)
    assert np.all(np.diff(total) > -1e-12)
    assert total[-1] == pytest.approx(1.0, abs=1e-12)
    assert law.residual < 1e-12
    nodes, weights = np.polynomial.legendre.leggauss(800)
    mass, first = sum(m for _, m in law.atoms()), sum(t * m for t, m in law.atoms())
    for low, high in law.support():
        angle = np.pi / 4 * (nodes + 1)
        place = low + (high - low) * np.sin(angle) ** 2
        share = law.density(place) * weights * np.pi / 4 * (high - low) * np.sin(2 * angle)
        mass, first = mass + share.sum(), first + share @ place
    assert mass == pytest.approx(1.0, abs=1e-6)
    assert first == pytest.approx(law.mean, rel=1e-6)


def test_what_is_refused() -> None:
    for laws, widths, text in (
        ([], [1, 1], "at least one law"),
        ([PointMass(1.0)], [1], "two widths"),
        ([PointMass(1.0)], [1, 0], "positive"),
        ([PointMass(-1.0)], [1, 1], "below zero"),
        ([PointMass(1.0)], [2, 1], "has mass 0 at 0"),
    ):
        with pytest.raises(ValueError, match=text):
            rectangular_sum(laws, widths)
