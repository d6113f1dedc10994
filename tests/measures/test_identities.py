"""Classical identities, limits with their rates, drawn matrices, edges, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import eigh
from scipy.optimize import brentq
from scipy.special import ndtr

from torch_rmt.measures import (
    Arcsine,
    Bernoulli,
    Discrete,
    FussCatalan,
    GaussianPushforward,
    KestenMcKay,
    MarchenkoPastur,
    Mixture,
    PointMass,
    Semicircle,
    SpectralMeasure,
    Uniform,
    Wachter,
    affine,
    dilate,
    free_add,
    free_compress,
    free_mul,
    free_poisson,
    free_power,
    jacobi,
    rectangular_product,
)
from torch_rmt.measures.subordination import _settle

SIGNS = Discrete([-1.0, 1.0])
IDENTITIES = {
    "free Poisson laws add": (
        lambda: free_add(free_poisson(2.0, 0.5), free_poisson(3.0, 0.5)),
        free_poisson(5.0, 0.5),
    ),
    "sign plus sign is arcsine": (lambda: free_power(SIGNS, 2, kind="additive"), Arcsine(-2.0, 2.0)),
    "sum of d signs is Kesten-McKay": (lambda: free_power(SIGNS, 3.5, kind="additive"), KestenMcKay(3.5)),
    "corner of a projection is Wachter": (lambda: free_compress(Bernoulli(0.4), 0.3), Wachter(0.4, 0.3)),
    "powers of Marchenko-Pastur are Fuss-Catalan": (lambda: free_power(MarchenkoPastur(1.0), 5), FussCatalan(5)),
    "of any real order": (lambda: free_power(FussCatalan(0.8), 2.5), FussCatalan(2.0)),
    "products too": (lambda: free_mul(FussCatalan(1.5), MarchenkoPastur(1.0)), FussCatalan(2.5)),
    "order one is Marchenko-Pastur": (lambda: FussCatalan(1), MarchenkoPastur(1.0)),
    "two signs are arcsine": (lambda: KestenMcKay(2.0), Arcsine(-2.0, 2.0)),
    "Jacobi laws mirror": (lambda: affine(jacobi(0.6, 0.9), -1.0, 1.0), jacobi(0.9, 0.6)),
    "normal quantiles are uniform": (lambda: GaussianPushforward(ndtr, 1.0), Uniform(0.0, 1.0)),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity(name: str) -> None:
    make, wanted = IDENTITIES[name]
    law = make()
    low, high = wanted.bounds()
    x = low + (high - low) * np.linspace(0.013, 0.987, 61)
    assert np.allclose(law.density(x), wanted.density(x), rtol=1e-9, atol=1e-12)
    assert np.allclose(law.cdf(x), wanted.cdf(x), rtol=0.0, atol=1e-12)
    assert np.allclose(law.support(), wanted.support(), rtol=1e-8, atol=1e-12)
    assert np.allclose(np.reshape(law.atoms(), (-1, 2)), np.reshape(wanted.atoms(), (-1, 2)), atol=1e-12)


@pytest.mark.parametrize("order", [0.5, 3, 64, 8192])
def test_fuss_catalan_against_fifty_digits(order: float) -> None:
    mpmath = pytest.importorskip("mpmath")
    law = FussCatalan(order)
    edge = law.bounds()[1]
    x = edge * np.concatenate([np.geomspace(1e-12, 0.5, 5), 1 - np.geomspace(1e-6, 0.3, 5)])
    errors = []
    with mpmath.workdps(50):
        for point, got in zip(x, law.density(x), strict=True):
            start = complex(law.stieltjes(point)) * point - 1
            target = mpmath.log(mpmath.mpf(float(point)))

            def equation(m: object, target: object = target) -> object:
                return (order + 1) * mpmath.log(1 + m) - mpmath.log(m) - target

            m = mpmath.findroot(equation, (mpmath.mpc(start), mpmath.mpc(start) * (1 + 1e-7)), tol=1e-60, verify=False)
            errors.append(abs(float(-m.imag / mpmath.pi / mpmath.mpf(float(point))) / got - 1))
    assert np.median(errors) < 1e-10
    assert max(errors) < 1e-6


def wasserstein(a: SpectralMeasure, b: SpectralMeasure) -> float:
    p = (np.arange(400) + 0.5) / 400
    return float(np.mean(np.abs(a.quantile(p) - b.quantile(p))))


@pytest.mark.parametrize(("law", "rate"), [(Discrete([-1.0, 1.0]), -1.0), (Discrete([-0.5, 2.0], [0.8, 0.2]), -0.5)])
def test_free_central_limit(law: Discrete, rate: float) -> None:
    sizes = np.array([16, 32, 64])
    far = []
    for n in sizes.tolist():
        scaled = Discrete(law.nodes / np.sqrt(n), law.weights)
        far.append(wasserstein(free_power(scaled, n, kind="additive"), Semicircle(law.variance)))
    assert np.polyfit(np.log(sizes), np.log(far), 1)[0] == pytest.approx(rate, abs=0.1)


def test_free_poisson_limit() -> None:
    sizes = np.array([20, 40, 80])
    limit = free_poisson(2.0, 0.5)
    far = [wasserstein(free_power(Bernoulli(2.0 / n, high=0.5), n, kind="additive"), limit) for n in sizes.tolist()]
    assert np.polyfit(np.log(sizes), np.log(far), 1)[0] == pytest.approx(-1.0, abs=0.1)


def haar(n: int, generator: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(generator.standard_normal((n, n)))
    return q * np.sign(np.diag(r))


PARTS = Uniform(0.5, 2.0), Discrete([0.0, 1.0, 3.0], [0.5, 0.25, 0.25])


def drawn(kind: str, n: int, generator: np.random.Generator) -> np.ndarray:
    levels = (np.arange(n) + 0.5) / n
    x, y = PARTS[0].quantile(levels), PARTS[1].quantile(levels)
    u = haar(n, generator)
    moved = (u * y) @ u.T
    if kind == "sum":
        return np.diag(x) + moved
    root = np.sqrt(x)
    return root[:, None] * moved * root


@pytest.mark.parametrize("kind", ["sum", "product"])
def test_drawn_matrices_come_near_like_one_over_n(kind: str) -> None:
    law = free_add(*PARTS) if kind == "sum" else free_mul(*PARTS)
    sizes, seeds = np.array([500, 1000, 2000]), (4, 2, 1)
    far = []
    for n, draws in zip(sizes.tolist(), seeds, strict=True):
        wanted = law.quantile((np.arange(n) + 0.5) / n)
        matrices = (drawn(kind, n, np.random.default_rng(seed)) for seed in range(draws))
        far.append(np.mean([np.mean(np.abs(np.linalg.eigvalsh(matrix) - wanted)) for matrix in matrices]))
    assert np.polyfit(np.log(sizes), np.log(far), 1)[0] == pytest.approx(-1.0, abs=0.2)


def test_drawn_rectangular_product() -> None:
    far = []
    for n in (200, 800):
        generator = np.random.default_rng(n)
        widths = (n, 2 * n, n // 2)
        a = generator.standard_normal((2 * n, n)) / np.sqrt(n)
        b = generator.standard_normal((n // 2, 2 * n)) / np.sqrt(2 * n)
        law = rectangular_product([MarchenkoPastur(0.5, 2.0), MarchenkoPastur(4.0, 0.25)], widths)
        eigenvalues = np.linalg.eigvalsh((b @ a).T @ (b @ a))
        far.append(np.mean(np.abs(eigenvalues - law.quantile((np.arange(n) + 0.5) / n))))
        assert law.atoms()[0] == pytest.approx((0.0, 0.5))
    assert far[1] < 0.4 * far[0]


def test_drawn_jacobi_ensemble() -> None:
    law, far = jacobi(0.5, 0.25), []
    for p in (100, 400):
        generator = np.random.default_rng(p)
        a, b = (x @ x.T for x in (generator.standard_normal((p, 2 * p)), generator.standard_normal((p, 4 * p))))
        wanted = law.quantile((np.arange(p) + 0.5) / p)
        far.append(np.mean(np.abs(eigh(a, a + b, eigvals_only=True) - wanted)))
    assert far[1] < 0.4 * far[0] < 0.004


@pytest.mark.parametrize("ratio", [0.3, 1.0, 3.0])
def test_marchenko_pastur_loses_no_digits_near_zero_or_far_out(ratio: float) -> None:
    law, v = MarchenkoPastur(ratio, 2.0), 2.0
    z = np.geomspace(1e-12, 1e12, 25) * np.exp(1j * np.array([[0.3], [2.0], [3.1]]))
    g = law.stieltjes(z)
    terms = np.stack([ratio * v * z * g**2, -z * g, (v - ratio * v) * g, np.ones_like(z)])
    assert np.all(np.abs(terms.sum(axis=0)) < 2e-15 * np.abs(terms).sum(axis=0))
    # the other root is excluded by z G -> 1 far out and z G -> the mass at 0 near 0
    assert np.allclose((z * g)[:, -1], 1.0, rtol=1e-11)
    assert np.allclose((z * g)[:, 0], max(0.0, 1 - 1 / ratio), atol=2e-6)


def test_determinants_multiply() -> None:
    # Fuglede and Kadison: E log XY = E log X + E log Y; at 0 the potential is E log t + i pi
    half, square = MarchenkoPastur(0.5, 2.0), MarchenkoPastur(1.0, 3.0)
    parts = [half, square, Uniform(0.5, 2.0)]
    for law in parts:
        low, high = law.bounds()
        x = low + (high - low) * np.sin(0.25 * np.pi * (1 + np.tanh(np.linspace(-18, 18, 20001)))) ** 2
        total = law.cdf(x)
        logs = np.log(np.maximum(0.5 * (x[1:] + x[:-1]), 1e-300))
        assert law.log_potential(0.0) == pytest.approx(float(np.sum(np.diff(total) * logs)) + 1j * np.pi, abs=1e-5)
    whole = sum(law.log_potential(0.0).real for law in parts)
    assert free_mul(*parts).log_potential(0.0) == pytest.approx(whole + 1j * np.pi, abs=1e-9)
    assert MarchenkoPastur(3.0).log_potential(0.0) == pytest.approx(-np.inf + 1j * np.pi / 3)


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_no_length_is_special(unit: float) -> None:
    gapped = Discrete([0.0, 1.0, 3.0], [0.5, 0.3, 0.2])
    for one, two, combine, scale in (
        (gapped, Semicircle(0.04), free_add, unit),
        (gapped, Uniform(0.0, 0.2), free_add, unit),
        (Uniform(0.5, 1.0), MarchenkoPastur(0.1), free_mul, unit**2),
    ):
        law, big = combine(one, two), combine(dilate(one, unit), dilate(two, unit))
        assert np.allclose(np.array(big.support()) / scale, law.support(), rtol=1e-9, atol=0.0)
        x = law.quantile(np.linspace(0.05, 0.95, 7))
        assert np.allclose(big.quantile(np.linspace(0.05, 0.95, 7)) / scale, x, rtol=1e-10, atol=0.0)
        assert np.allclose(big.density(scale * x) * scale, law.density(x), rtol=1e-8, atol=0.0)


def test_a_point_is_a_law_too() -> None:
    z = np.array([0.3 + 0.2j, -2.0 - 1.0j, 30.0 + 0.5j])
    for law in (PointMass(3.0), affine(FussCatalan(0), 3.0)):
        assert np.allclose(law.stieltjes(z), 1 / (z - 3), rtol=1e-13, atol=0.0)
        assert np.allclose(law.log_potential(z), np.log(z - 3), rtol=1e-13, atol=0.0)
        assert law.atoms() == ((3.0, 1.0),)
        assert law.moment(3) == pytest.approx(27.0, rel=1e-14)
        assert SpectralMeasure.moment(law, 3) == pytest.approx(27.0, rel=1e-12)
        assert law.cdf([2.999, 3.0]).tolist() == [0.0, 1.0]
    assert rectangular_product([PointMass(0.0), MarchenkoPastur(0.5)], [4, 4, 8]).atoms() == ((0.0, 1.0),)
    with pytest.raises(ValueError, match="read-only"):
        SIGNS.nodes[0] = 2.0


def test_edges_beside_a_semicircle_are_those_of_biane() -> None:
    law, variance = Discrete([0.0, 1.0, 2.5], [0.5, 0.3, 0.2]), 0.02
    total = free_add(law, Semicircle(variance))

    def excess(u: float) -> float:
        return float(variance * np.sum(law.weights / (u - law.nodes) ** 2) - 1)

    brackets = [(-1, -0.01), (0.01, 0.5), (0.5, 0.99), (1.01, 1.7), (1.7, 2.49), (2.51, 4)]
    roots = np.array([brentq(excess, a, b, xtol=1e-15) for a, b in brackets])
    wanted = roots + variance * law.stieltjes(roots).real
    assert np.ravel(total.support()) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("theta", [1.5, 4.0, -2.0])
def test_subordination_places_the_outlier_of_a_spike(theta: float) -> None:
    # beside a semicircle w(z) = z - v G(z), so that a spike theta is seen at theta + v G_A(theta)
    law, variance = Uniform(-1.0, 1.0), 0.1
    where = theta + variance * float(law.stieltjes(theta).real)
    s = free_add(law, Semicircle(variance)).subordination(where)  # type: ignore[attr-defined]
    assert s.points[0, 0] == pytest.approx(theta, rel=1e-12)


def test_ten_decades() -> None:
    law = free_mul(Discrete(np.geomspace(1e-10, 1.0, 12)), MarchenkoPastur(0.05))
    intervals = law.support()
    assert len(intervals) == 12
    assert intervals[0][0] > 1e-11
    for low, high in intervals:
        x = np.geomspace(low, high, 2000)
        assert np.trapezoid(law.density(x), x) == pytest.approx(1 / 12, rel=1e-3)
        assert np.diff(law.cdf([low, high]))[0] == pytest.approx(1 / 12, rel=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Discrete([]),
        lambda: Discrete([0.0, np.nan]),
        lambda: Discrete([0.0, 1.0], [1.0, -0.5]),
        lambda: Discrete([0.0, 1.0], [1.0]),
        lambda: Mixture([]),
        lambda: Mixture([Semicircle()], [1.0, 2.0]),
        lambda: Mixture([Semicircle(), Uniform()], [1.0, -0.5]),
        lambda: Uniform(1.0, 1.0),
        lambda: Arcsine(2.0, 1.0),
        lambda: KestenMcKay(1.9),
        lambda: jacobi(2.0, 2.0),
        lambda: free_mul(),
        lambda: Semicircle(-1.0),
        lambda: Semicircle(np.nan),
        lambda: MarchenkoPastur(0.0),
        lambda: FussCatalan(-0.1),
        lambda: Wachter(1.2, 0.5),
        lambda: free_mul(Semicircle(), SIGNS),
        lambda: free_power(SIGNS, 2),
        lambda: free_power(Semicircle(), 0.5),
        lambda: free_power(Semicircle(), 2, kind="additive").quantile(1.5),
        lambda: free_compress(SIGNS, 0.0),
        lambda: free_add(),
        lambda: rectangular_product([MarchenkoPastur(0.5)], [100, 50]),
        lambda: GaussianPushforward(lambda h: 1 / h, -1.0),
    ],
)
def test_refuses_with_advice(make: object) -> None:
    with pytest.raises(ValueError, match=r".{20,}"):
        make()  # type: ignore[operator]


def test_sums_with_points_stay_in_closed_form() -> None:
    assert free_add(PointMass(1.0), PointMass(2.0)).atoms() == ((3.0, 1.0),)
    assert free_mul(PointMass(2.0), MarchenkoPastur(0.5)).mean == 2.0
    assert free_mul(PointMass(0.0), MarchenkoPastur(0.5)).atoms() == ((0.0, 1.0),)


@pytest.mark.parametrize("x", [-0.9, 4.2, 9.5])
def test_of_all_real_solutions_only_the_stable_one_is_accepted(x: float) -> None:
    # outside the support w = x + h_B(x + h_A(w)) has many real roots; one of them is the subordination function
    one, two = Discrete([0.0, 1.0, 2.5], [0.5, 0.3, 0.2]), Discrete([0.0, 6.0], [0.6, 0.4])

    def h(law: Discrete, w: np.ndarray) -> np.ndarray:
        return 1.0 / law.stieltjes(w).real - w

    def error(w: np.ndarray) -> np.ndarray:
        return w - x - h(two, x + h(one, w))

    total = free_add(one, two)
    assert total.density(x) == 0.0
    grid = np.linspace(-100, 100, 200001) + 1e-5
    value = error(grid)
    change = np.flatnonzero((value[1:] * value[:-1] < 0) & (np.abs(value[1:] - value[:-1]) < 1.0))
    roots = np.array([brentq(lambda w: float(error(np.array(w))), grid[i], grid[i + 1], xtol=1e-14) for i in change])
    assert len(roots) > 1
    candidates = np.stack([roots, x + h(one, roots)]).astype(complex)
    _, accepted = _settle(total.geometry, np.full(len(roots), complex(x)), candidates)  # type: ignore[attr-defined]
    right = total.subordination(x).points[0, 0].real  # type: ignore[attr-defined]
    assert accepted.sum() == 1
    assert roots[accepted] == pytest.approx(right, rel=1e-9)
