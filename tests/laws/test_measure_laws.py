"""Every law and every convolution obeys the laws of measures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import CONVOLUTIONS, LAWS
from tests.measures.table import integral
from torch_rmt.measures import (
    Bernoulli,
    Discrete,
    MarchenkoPastur,
    PointMass,
    Semicircle,
    SpectralMeasure,
    dilate,
    free_add,
    free_cumulants,
    free_mul,
    free_power,
    moments_from_free_cumulants,
    r_transform,
    s_transform,
)

EVERY = {**{name: (lambda law=law: law) for name, law in LAWS.items()}, **CONVOLUTIONS}
KINKED = {"gauss-relu", "sum-uniform", "product-three", "product-signed-three"}  # kinks of a density cost digits


@pytest.fixture(scope="module", params=EVERY)
def named(request: pytest.FixtureRequest) -> tuple[str, SpectralMeasure]:
    return request.param, EVERY[request.param]()


@pytest.fixture
def law(named: tuple[str, SpectralMeasure]) -> SpectralMeasure:
    return named[1]


def plane(law: SpectralMeasure) -> np.ndarray:
    low, high = law.bounds()
    x = np.linspace(low - 0.3, high + 0.3, 9)
    return np.concatenate([x + 1e-2j, x + 0.3j, x + 10j])


def test_stieltjes_maps_the_upper_half_plane_to_the_lower(law: SpectralMeasure) -> None:
    z = plane(law)
    g = law.stieltjes(z)
    assert np.all(g.imag < 0)
    assert np.all(np.abs(g) <= 1 / z.imag * (1 + 1e-12))
    assert np.allclose(law.stieltjes(np.conj(z)), np.conj(g), rtol=1e-14)


def test_mass_and_four_moments_from_the_density(named: tuple[str, SpectralMeasure]) -> None:
    name, law = named
    tolerance = 1e-4 if name in KINKED else 1e-6
    size = max(abs(end) for end in law.bounds())
    assert law.moment(0) == 1.0
    with pytest.raises(ValueError, match="k >= 0"):
        law.moment(-1)
    assert integral(law, np.ones_like) == pytest.approx(1.0, abs=tolerance)
    for k in range(1, 5):
        assert integral(law, lambda x, k=k: x**k) == pytest.approx(
            law.moment(k), rel=tolerance, abs=tolerance * size**k
        )


def test_moments_by_contour_agree(law: SpectralMeasure) -> None:
    size = max(abs(end) for end in law.bounds())
    for k in range(1, 5):
        assert SpectralMeasure.moment(law, k) == pytest.approx(law.moment(k), rel=1e-10, abs=1e-12 * size**k)
    assert law.mean == pytest.approx(law.moment(1), rel=1e-12, abs=1e-13 * size)
    assert law.variance == pytest.approx(law.moment(2) - law.moment(1) ** 2, rel=1e-9)


def test_stieltjes_is_the_integral(named: tuple[str, SpectralMeasure]) -> None:
    name, law = named
    low, high = law.bounds()
    for z in (0.3 * low + 0.7 * high + 0.5j * (high - low), high + 0.2 * (high - low) + 0.1j):
        wanted = integral(law, lambda x, z=z: (1 / (z - x)).real) + 1j * integral(
            law, lambda x, z=z: (1 / (z - x)).imag
        )
        assert law.stieltjes(z) == pytest.approx(wanted, rel=1e-4 if name in KINKED else 1e-6)


def test_slope_and_potential_differentiate(law: SpectralMeasure) -> None:
    z = plane(law)
    step = 1e-3 * z.imag
    offsets, weights = np.array([-2, -1, 1, 2]), np.array([1, -8, 8, -1]) / 12
    for function, derivative in ((law.stieltjes, law.slope), (law.log_potential, law.stieltjes)):
        difference = sum(w * function(z + k * step) for k, w in zip(offsets, weights, strict=True)) / step
        assert np.allclose(difference, derivative(z), rtol=2e-8, atol=1e-10)


def test_general_potential_and_slope_agree(law: SpectralMeasure) -> None:
    low, high = law.bounds()
    z = np.linspace(low - 0.1, high + 0.1, 5) + 0.07j * (high - low)
    assert np.allclose(SpectralMeasure.log_potential(law, z), law.log_potential(z), rtol=1e-11, atol=1e-11)
    assert np.allclose(SpectralMeasure.slope(law, z), law.slope(z), rtol=1e-9)


def test_far_away_only_the_mean_is_seen(law: SpectralMeasure) -> None:
    # G = 1/z + m/z^2 + O(z^-3), and no digits are lost in it
    z = 1e8 * max(abs(end) for end in law.bounds()) * np.exp(1j * np.array([0.1, 1.5, 3.0]))
    assert np.allclose(z * law.stieltjes(z) - 1.0, law.mean / z, rtol=0.0, atol=2e-15)
    assert np.allclose(law.log_potential(z), np.log(z), rtol=1e-9)


def test_the_axis_is_seen_from_above(law: SpectralMeasure) -> None:
    size = law.bounds()[1] - law.bounds()[0]
    for low, high in law.support():
        x = low + (high - low) * np.array([0.21, 0.47, 0.83])
        assert np.allclose(-law.stieltjes(x).imag / np.pi, law.density(x), rtol=1e-8, atol=1e-12)
        above = x + 1e-7j * size
        for function, tolerance in ((law.stieltjes, 1e-4), (law.slope, 1e-2), (law.log_potential, 1e-4)):
            assert np.allclose(function(x), function(above), rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match="levels"):
        law.quantile(1.5)


def test_distribution_is_the_integral_of_the_density(named: tuple[str, SpectralMeasure]) -> None:
    name, law = named
    low, high = law.bounds()
    x = np.linspace(low - 0.1, high + 0.1, 41)
    total = law.cdf(x)
    assert np.all(np.diff(total) >= -1e-13)
    assert total[0] == pytest.approx(0.0, abs=1e-13)
    assert total[-1] == pytest.approx(1.0, abs=1e-13)
    for a, b in law.support():
        inner = a + (b - a) * np.array([0.2, 0.25])
        fine = np.linspace(inner[0], inner[1], 401)
        mass = np.trapezoid(law.density(fine), fine)
        mass += sum(m for t, m in law.atoms() if inner[0] < t <= inner[1])
        assert np.diff(law.cdf(inner))[0] == pytest.approx(mass, rel=3e-4 if name in KINKED else 2e-5)


def test_quantiles_invert_the_distribution(law: SpectralMeasure) -> None:
    p = np.linspace(0.003, 0.997, 80)
    x = law.quantile(p)
    assert np.all(np.diff(x) >= 0)
    reached = law.cdf(x)
    atoms = [location for location, _ in law.atoms()]
    smooth = ~np.isin(x, atoms)
    assert np.allclose(reached[smooth], p[smooth], rtol=0.0, atol=1e-12)
    assert np.all(reached >= p - 1e-12)
    low, high = law.bounds()
    assert law.quantile(1.0) == pytest.approx(high, abs=1e-12 * (high - low))
    assert law.quantile(0.0) == pytest.approx(low, abs=1e-12 * (high - low))


def test_atoms_are_poles(law: SpectralMeasure) -> None:
    for location, mass in law.atoms():
        residues = [h * abs(law.stieltjes(location + 1j * h).imag) for h in (1e-4, 1e-6)]
        assert residues[1] == pytest.approx(mass, abs=2e-3)
        assert abs(residues[1] - mass) <= abs(residues[0] - mass) + 1e-9
        below = law.cdf(location - 1e-9 * max(1.0, abs(location)))
        assert law.cdf(location) - below == pytest.approx(mass, abs=1e-4)


def test_residual_is_small(law: SpectralMeasure) -> None:
    assert law.residual < 1e-12


# --- hypothesis: convolutions of drawn discrete laws -----------------------------------------------------------------

masses = st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5)


@st.composite
def discrete(draw: st.DrawFn, low: float = -2.0) -> Discrete:
    weights = draw(masses)
    gaps = draw(st.lists(st.floats(0.05, 1.5), min_size=len(weights), max_size=len(weights)))
    return Discrete(low + np.cumsum(gaps), weights)


def points(law: SpectralMeasure) -> np.ndarray:
    low, high = law.bounds()
    return np.linspace(low - 0.5, high + 0.5, 7) + 0.05j


few = settings(max_examples=5, deadline=None, derandomize=True)
fewer = settings(max_examples=15, deadline=None, derandomize=True)


@few
@given(discrete(), discrete(), discrete())
def test_sums_commute_and_associate(a: Discrete, b: Discrete, c: Discrete) -> None:
    flat = free_add(a, b, c)
    z = np.linspace(-3, 6, 7) + 0.05j
    opaque = Opaque(free_add(b, c))
    for other in (free_add(c, b, a), free_add(a, opaque)):
        assert np.allclose(flat.stieltjes(z), other.stieltjes(z), rtol=1e-10)


@few
@given(discrete(0.0), discrete(0.0), discrete(0.0))
def test_products_commute_and_associate(a: Discrete, b: Discrete, c: Discrete) -> None:
    flat = free_mul(a, b, c)
    z = np.geomspace(0.1, 30, 7) * np.exp(0.1j)
    opaque = Opaque(free_mul(b, c))
    for other in (free_mul(c, b, a), free_mul(a, opaque)):
        assert np.allclose(flat.stieltjes(z), other.stieltjes(z), rtol=1e-10)


@few
@given(discrete(), discrete())
def test_r_adds_and_free_cumulants_add(a: Discrete, b: Discrete) -> None:
    both = free_add(a, b)
    size = max(np.abs(both.bounds()))
    u = np.array([0.05, -0.04, 0.02 + 0.03j]) / size
    general = r_transform.dispatch(object)
    assert np.allclose(general(both, u), general(a, u) + general(b, u), rtol=1e-10, atol=1e-12)
    moments = [[law.moment(k) for k in range(1, 7)] for law in (a, b)]
    contour = [SpectralMeasure.moment(both, k) for k in range(1, 7)]
    total = moments_from_free_cumulants(free_cumulants(moments[0]) + free_cumulants(moments[1]))
    assert np.allclose(total, contour, rtol=1e-9, atol=1e-11 * size**6)


@few
@given(discrete(0.0), discrete(0.0))
def test_s_multiplies_and_means_multiply(a: Discrete, b: Discrete) -> None:
    both = free_mul(a, b)
    u = np.array([-0.02, 0.01 + 0.02j, -0.04j])
    general = s_transform.dispatch(object)
    assert np.allclose(general(both, u), general(a, u) * general(b, u), rtol=1e-10)
    assert SpectralMeasure.moment(both, 1) == pytest.approx(a.mean * b.mean, rel=1e-10)
    wanted = a.moment(2) * b.mean**2 + a.mean**2 * b.moment(2) - a.mean**2 * b.mean**2
    assert SpectralMeasure.moment(both, 2) == pytest.approx(wanted, rel=1e-10)


@fewer
@given(discrete(), discrete())
def test_equations_hold_on_the_axis(a: Discrete, b: Discrete) -> None:
    both = free_add(a, b)
    x = np.linspace(*both.bounds(), 41)[1:-1] + 1e-3
    s = both.subordination(x)  # type: ignore[attr-defined]
    g = both.stieltjes(x)
    finite = np.isfinite(g) & (np.abs(g) < 1e6) & (np.abs(s.points).max(axis=0) < 1e3) & (g.imag < -1e-3)
    for law, w in zip((f.law for f in both.factors), s.points, strict=True):  # type: ignore[attr-defined]
        assert np.allclose(law.stieltjes(w)[finite], g[finite], rtol=1e-11)
    assert np.allclose((s.points.sum(axis=0) - x - 1 / g)[finite], 0.0, atol=1e-11)
    assert np.all(s.points.imag >= 0)


@fewer
@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_atoms_follow_the_rule(p: float, q: float) -> None:
    total = free_add(Bernoulli(p), Bernoulli(q, high=3.0))
    masses = {0.0: 1 - p - q, 1.0: p - q, 3.0: q - p, 4.0: p + q - 1}
    wanted = tuple((t, m) for t, m in sorted(masses.items()) if m > 1e-12)
    assert np.allclose(np.array(total.atoms()).reshape(-1, 2), np.array(wanted).reshape(-1, 2), rtol=0.0, atol=1e-12)
    product = free_mul(Bernoulli(p), Bernoulli(q, high=3.0))
    wanted = ((0.0, 1 - min(p, q)), *(((3.0, p + q - 1),) if p + q - 1 > 1e-12 else ()))
    assert np.allclose(np.array(product.atoms()), np.array(wanted), rtol=0.0, atol=1e-12)


@fewer
@given(discrete(), st.floats(0.2, 5.0), st.floats(-3.0, 3.0))
def test_scaling_and_shifting(a: Discrete, factor: float, shift: float) -> None:
    b = Semicircle(0.3)
    z = np.linspace(-4, 4, 5) + 0.1j
    moved = free_add(dilate(a, factor), dilate(b, factor), PointMass(shift))
    assert np.allclose(moved.stieltjes(factor * z + shift) * factor, free_add(a, b).stieltjes(z), rtol=1e-11)
    mirrored = free_add(dilate(a, -factor), b)
    assert np.allclose(
        mirrored.stieltjes(-np.conj(z)), -np.conj(free_add(dilate(a, factor), b).stieltjes(z)), rtol=1e-11
    )
    positive = Discrete(np.exp(a.nodes), a.weights)
    scaled = free_mul(dilate(positive, factor), MarchenkoPastur(0.5))
    assert np.allclose(
        scaled.stieltjes(factor * z) * factor, free_mul(positive, MarchenkoPastur(0.5)).stieltjes(z), rtol=1e-10
    )


@few
@given(discrete(0.0), st.floats(1.0, 4.0), st.floats(1.0, 3.0))
def test_powers_compose(a: Discrete, n: float, m: float) -> None:
    z = np.geomspace(0.05, 40, 6) * np.exp(0.2j)
    twice = free_power(Opaque(free_power(a, n)), m)
    assert np.allclose(twice.stieltjes(z), free_power(a, n * m).stieltjes(z), rtol=1e-9)
    twice = free_power(Opaque(free_power(a, n, kind="additive")), m, kind="additive")
    assert np.allclose(twice.stieltjes(z), free_power(a, n * m, kind="additive").stieltjes(z), rtol=1e-9)


class Opaque(SpectralMeasure):
    """A law that hides what it is made of, so that nothing is flattened and nothing is known in closed form."""

    def __init__(self, law: SpectralMeasure) -> None:
        self.law = law

    def stieltjes(self, z: object) -> np.ndarray:
        return self.law.stieltjes(z)  # type: ignore[arg-type]

    def slope(self, z: object) -> np.ndarray:
        return self.law.slope(z)  # type: ignore[arg-type]

    def stieltjes_and_slope(self, z: object) -> tuple[np.ndarray, np.ndarray]:
        return self.law.stieltjes_and_slope(z)  # type: ignore[arg-type]

    def moment(self, k: int) -> float:
        return self.law.moment(k)

    def support(self) -> tuple[tuple[float, float], ...]:
        return self.law.support()

    def atoms(self) -> tuple[tuple[float, float], ...]:
        return self.law.atoms()
