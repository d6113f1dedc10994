from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from torch_rmt.measures import Discrete, FussCatalan, MarchenkoPastur, PointMass, free_mul
from torch_rmt.theory import Architecture, JacobianLaw, Layer, as_activation, jacobian_spectrum, leaky_relu
from torch_rmt.theory.chain import Chain
from torch_rmt.theory.chain_kind import Kind
from torch_rmt.theory.chain_parts import Term
from torch_rmt.theory.equal_layers import EqualLayers
from torch_rmt.theory.isometry import critical_q, limit_law, shifted_relu, slope_variance, universality_class
from torch_rmt.theory.slope_law import slope_law


def linear(depth: int) -> JacobianLaw:
    law = jacobian_spectrum(Architecture.mlp(depth=depth, width=100, activation=None, sigma_w=1.0)).measure
    assert isinstance(law, JacobianLaw)
    return law


def fuss_catalan(depth: int, points: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """(log lambda, log density) by the parametrisation of Biane, as in Forrester and Liu 2015, eq. (1.5)."""
    phi = np.linspace(0, np.pi / (depth + 1), points + 2)[1:-1]
    s = depth
    log_x = (s + 1) * np.log(np.sin((s + 1) * phi)) - np.log(np.sin(phi)) - s * np.log(np.sin(s * phi))
    log_density = (
        2 * np.log(np.sin(phi)) + (s - 1) * np.log(np.sin(s * phi)) - np.log(np.pi) - s * np.log(np.sin((s + 1) * phi))
    )
    return log_x, log_density


@pytest.mark.parametrize("solver", ["branch-free", "continuation"])
@pytest.mark.parametrize("depth", [2, 16, 128, 1024, 8192])
def test_linear_networks_are_fuss_catalan(depth: int, solver: str) -> None:
    log_x, log_density = fuss_catalan(depth)
    log_x, log_density = log_x[log_x > -600], log_density[log_x > -600]
    slopes = slope_law(None, 1.0)
    engine = (
        EqualLayers(slopes, depth, True) if solver == "branch-free" else Chain((Term(1.0, 1.0, float(depth)),), (), 1.0)
    )
    _, u = engine.solve(log_x)
    error = np.abs(np.expm1(np.log(-u.imag / np.pi) - log_x - log_density))
    assert np.median(error) < 1e-10
    assert engine.edges[-1][1] == pytest.approx((depth + 1) * np.log(depth + 1) - depth * np.log(depth), rel=1e-11)
    top = engine.edges[-1][1]
    far = top - log_x > 1e-6
    assert np.nanmax(error[far]) < 1e-6


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_linear_moments_are_fuss_catalan(depth: int) -> None:
    law, reference = linear(depth), FussCatalan(depth)
    for k in range(1, 7):
        assert law.moment(k) == pytest.approx(reference.moment(k), rel=1e-11)
    x = reference.quantile(np.linspace(0.02, 0.98, 25))
    np.testing.assert_allclose(law.cdf(x), reference.cdf(x), atol=1e-10)


CHAINS = [
    ("tanh", 8, False),
    ("tanh", 8, True),
    ("erf", 64, False),
    ("gelu", 3, True),
    ("elu", 5, False),
    ("tanh", 2, False),
]


@pytest.mark.parametrize(("name", "depth", "gaussian"), CHAINS)
def test_the_two_solvers_agree(name: str, depth: int, gaussian: bool) -> None:
    law = slope_law(as_activation(name), 0.4)
    law = law.scaled(1 / law.moment(1))
    free = EqualLayers(law, depth, gaussian)
    terms = (Term(1.0, 1.0, float(depth)),) if gaussian else ()
    followed = Chain(terms, (Kind(law, 1.0, float(depth)),), 1.0)
    top = free.edges[-1][1]
    assert followed.edges[-1][1] == pytest.approx(top, abs=1e-9)
    t = top - 6.0 * np.linspace(0.02, 1, 40) ** 2
    (w, u), (v, m) = free.solve(t), followed.solve(t)
    both = np.isfinite(u) & np.isfinite(m) & (np.abs(u.imag) > 1e-9)
    assert both.sum() > 20
    np.testing.assert_allclose(m[both], u[both], rtol=1e-9)
    np.testing.assert_allclose(
        followed.potential(t[both] + 0j, v[:, both], m[both]).imag,
        free.potential(t[both] + 0j, w[both], u[both]).imag,
        atol=1e-10,
    )


ARCHITECTURES = {
    "tanh": Architecture.mlp(depth=6, width=100, activation="tanh", sigma_w=1.3, sigma_b=0.2),
    "relu orthogonal": Architecture.mlp(depth=4, width=100, activation="relu", sigma_w=1.4, ensemble="orthogonal"),
    "hard tanh, atom on top": Architecture.mlp(
        depth=3, width=100, activation="hard_tanh", sigma_w=1.1, ensemble="orthogonal", q=0.3
    ),
    "leaky, gap": Architecture.mlp(depth=2, width=100, activation=leaky_relu(0.1), sigma_w=1.0, ensemble="orthogonal"),
    "one wide layer": Architecture.mlp(depth=1, width=300, n_in=100, activation="relu", sigma_w=1.0),
    "bottleneck": Architecture.mlp(depth=2, width=50, n_in=120, n_out=80, activation="hard_tanh", sigma_w=1.0, q=1.0),
    "gelu": Architecture.mlp(depth=2, width=100, activation="gelu", sigma_w=1.4, sigma_b=0.4, q=2.0),
    "one orthogonal layer": Architecture.mlp(
        depth=1, width=100, activation="tanh", sigma_w=1.2, ensemble="orthogonal", q=0.5
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mass_moments_and_round_trips(name: str) -> None:
    law = jacobian_spectrum(ARCHITECTURES[name]).measure
    atoms = law.atoms()
    # Mass and moments by quantiles, which know nothing of the power series.
    nodes, weights = np.polynomial.legendre.leggauss(20)
    edges = 0.5 - 0.5 * np.cos(np.pi * np.linspace(0, 1, 41))
    levels = np.concatenate([[0.0], np.cumsum([m for _, m in atoms]), edges])
    places = np.unique(np.concatenate([edges, [law.cdf(np.array(x)) for x, _ in atoms],
                                       [law.cdf(np.array(x)) - m for x, m in atoms]]))  # fmt: skip
    half = np.diff(places)[:, None] / 2
    p = np.clip(places[:-1, None] + half * (1 + nodes), 0, 1).ravel()
    x = law.quantile(p)
    for k in (1, 2, 3, 4):
        assert (half * weights).ravel() @ x**k == pytest.approx(law.moment(k), rel=1e-4), k
    smooth = (p > 1e-4) & (p < 1 - 1e-4)
    for location, mass in atoms:
        top = float(law.cdf(np.array(location)))
        smooth &= (p < top - mass - 1e-6) | (p > top + 1e-6)
    np.testing.assert_allclose(law.cdf(x[smooth]), p[smooth], atol=1e-9)
    assert levels.size
    low, high = law.bounds()
    assert law.cdf(np.array(high)) == pytest.approx(1.0, abs=1e-12)
    assert law.cdf(np.array(-1.0)) == 0.0
    # The density is the slope of the distribution function.
    t = law.quantile(np.array([0.75, 0.9]))
    inside = [v for v in t if any(a * 1.001 < v < b * 0.999 for a, b in law.support())]
    for v in inside:
        slope = float((law.cdf(np.array(v * 1.0001)) - law.cdf(np.array(v * 0.9999))) / (2e-4 * v))
        assert slope == pytest.approx(float(law.density(np.array(v))), rel=1e-4)
    assert low >= 0


@pytest.mark.parametrize("name", ["tanh", "relu orthogonal", "one wide layer"])
def test_stieltjes_transform(name: str) -> None:
    law = jacobian_spectrum(ARCHITECTURES[name]).measure
    z = np.array([-1.0, 2.0 + 1.0j, 0.3 + 0.1j, 50.0 + 3.0j])
    p = (np.arange(4000) + 0.5) / 4000
    direct = np.mean(1 / (z[:, None] - law.quantile(p)), axis=1)
    np.testing.assert_allclose(law.stieltjes(z), direct, rtol=3e-3)
    np.testing.assert_allclose(law.stieltjes(np.conj(z)), np.conj(law.stieltjes(z)), rtol=1e-12)
    assert (law.stieltjes(z[1:]).imag < 0).all()


@pytest.mark.parametrize("name", ["tanh", "gelu", "hard_tanh", "erf"])
@pytest.mark.parametrize("ensemble", ["gaussian", "orthogonal"])
def test_mean_and_variance_formulas(name: str, ensemble: str) -> None:
    """theory.md: mean chi^L, variance / mean^2 = L (mu_2 / mu_1^2 - 1 - s_1) exactly, not only at criticality."""
    depth, q, sigma_w = 7, 0.6, 1.2
    arch = Architecture.mlp(depth=depth, width=10, activation=name, sigma_w=sigma_w, ensemble=ensemble, q=q)
    prediction = jacobian_spectrum(arch)
    chi = prediction.scalars["chi/0"]
    assert prediction.scalars["mean"] == pytest.approx(chi**depth, rel=1e-11)
    share = slope_variance(name, q) + (1.0 if ensemble == "gaussian" else 0.0)
    assert prediction.scalars["variance"] / chi ** (2 * depth) == pytest.approx(depth * share, rel=1e-9)


def test_one_gaussian_layer_is_marchenko_pastur() -> None:
    """W^T W, n_out x n_in, entries of variance 1 / n_in: n_out / n_in times the law of ratio n_in / n_out."""
    law = jacobian_spectrum(Architecture((Layer(200, 100, None, 1.0),))).measure
    reference = MarchenkoPastur(2.0)
    x = np.linspace(0.2, 2.6, 30) * 0.5
    np.testing.assert_allclose(law.cdf(x), reference.cdf(2 * x), atol=1e-9)
    assert law.atoms()[0] == pytest.approx((0.0, 0.5))
    (low, high), (a, b) = law.support()[0], reference.support()[0]
    assert (low, high) == pytest.approx((a / 2, b / 2), rel=1e-8)


def test_measured_laws_are_multiplied_freely() -> None:
    spectrum = Discrete([0.5, 1.0, 2.5], [0.3, 0.4, 0.3])
    arch = Architecture((Layer(100, 100, None, 1.0, ensemble=spectrum), Layer(100, 100, None, 1.0)))
    law, reference = jacobian_spectrum(arch).measure, free_mul(spectrum, MarchenkoPastur(1.0))
    x = np.linspace(0.1, 5.0, 20)
    np.testing.assert_allclose(law.cdf(x), reference.cdf(x), atol=1e-7)


def test_atoms() -> None:
    top = jacobian_spectrum(ARCHITECTURES["hard tanh, atom on top"]).measure
    p = 1 - 2 * 0.5 * (1 - np.vectorize(__import__("math").erf)(1 / np.sqrt(0.6)))
    assert top.atoms()[-1] == pytest.approx((1.1**6, 1 - 3 * (1 - p)), rel=1e-10)
    zero = jacobian_spectrum(ARCHITECTURES["bottleneck"]).measure.atoms()[0]
    assert zero[0] == 0.0
    assert zero[1] == pytest.approx(1 - 0.6826894921 * 50 / 120, rel=1e-8)
    rotation = jacobian_spectrum(
        Architecture.mlp(depth=9, width=10, activation=None, sigma_w=1.1, ensemble="orthogonal")
    )
    assert isinstance(rotation.measure, PointMass)
    assert rotation.measure.mean == pytest.approx(1.1**18)


def test_depth_beyond_the_range_of_floats() -> None:
    law = jacobian_spectrum(Architecture.mlp(depth=8192, width=10, activation="tanh", sigma_w=1.0, q=1.0)).measure
    assert isinstance(law, JacobianLaw)
    high = law.log_support()[-1][1]
    assert np.isfinite(high)
    assert high < -1000
    assert law.quantile(0.5) == 0.0


@pytest.mark.parametrize("name", ["tanh", "erf", "hard_tanh"])
def test_q_for_a_target_variance(name: str) -> None:
    def scalars_at(depth: int) -> Mapping[str, float]:
        point = critical_q(name, depth, 0.25)
        sigmas = {"sigma_w": point.sigma_w, "sigma_b": point.sigma_b}
        arch = Architecture.mlp(depth=depth, width=10, activation=name, **sigmas, ensemble="orthogonal", q=point.q_star)
        return jacobian_spectrum(arch).scalars

    for depth in (16, 256):
        scalars = scalars_at(depth)
        assert scalars["variance"] == pytest.approx(0.25, rel=1e-8)
        assert scalars["chi"] == pytest.approx(1.0, rel=1e-10)
    # ... and the edge tends to that of the universal law, like 1 / depth.
    limit = limit_law(name, 0.25).largest()
    gaps = []
    for depth in (100, 400, 1600):
        gaps.append(abs(scalars_at(depth)["largest_eigenvalue"] - limit))
    assert gaps[2] < gaps[1] < gaps[0]
    assert gaps[2] < 0.2


def test_universality_classes() -> None:
    assert universality_class("tanh") == universality_class("erf") == "smooth"
    assert universality_class("hard_tanh") == universality_class(shifted_relu(1.0)) == "bernoulli"
    with pytest.raises(ValueError, match="apart"):
        universality_class("relu")


@pytest.mark.parametrize("variance", [0.01, 0.25, 1.0, 3.0])
@pytest.mark.parametrize("name", ["hard_tanh", "tanh"])
def test_universal_limits_as_measures(name: str, variance: float) -> None:
    """Mass and moments by quantiles against Lagrange's series; S-transform; edge and atom of `LimitLaw`."""
    limit = limit_law(name, variance)
    law = limit.measure()
    assert law.bounds()[1] == pytest.approx(limit.largest(), rel=1e-9)
    assert limit.atom() is None or law.atoms() == (pytest.approx(limit.atom()),)
    nodes, weights = np.polynomial.legendre.leggauss(30)
    ends = np.concatenate([0.5 - 0.5 * np.cos(np.pi * np.linspace(0, 1, 41)), [1 - m for _, m in law.atoms()]])
    half = np.diff(np.unique(ends))[:, None] / 2
    x = law.quantile((np.unique(ends)[:-1, None] + half * (1 + nodes)).ravel())
    assert law.mean == pytest.approx(1.0, rel=1e-13)
    assert law.variance == pytest.approx(variance, rel=1e-12)
    for k in (1, 2, 3, 4):
        assert (half * weights).ravel() @ x**k == pytest.approx(law.moment(k), rel=1e-7)
    for z in (-1.0, -0.01, 1.0 + 2.0j):
        m = z * complex(law.stieltjes(np.array(z))) - 1
        exponent = variance * (m if name == "tanh" else m / (1 + m))
        assert (1 + m) / m * np.exp(exponent) == pytest.approx(z, rel=1e-10)


@pytest.mark.parametrize(
    ("name", "rate", "variance"),
    [("hard_tanh", 1.0, 0.25), (shifted_relu(1.0), 1.0, 2.0), ("tanh", 0.5, 0.25), ("erf", 0.5, 2.0)],
)
def test_deep_spectra_tend_to_their_universal_limit(name: object, rate: float, variance: float) -> None:
    """Kolmogorov distance at q*(L), L = 64 to 4096: like 1 / L in the Bernoulli class, 1 / sqrt L in the smooth one."""
    limit = limit_law(name, variance).measure()
    p = np.linspace(0.02, 0.98, 97) * (min(variance, 1.0) if limit.atoms() else 1.0)
    x, distances = limit.quantile(p), []
    depths = np.array([64, 512, 4096])
    for depth in depths.tolist():
        point = critical_q(name, depth, variance)
        arch = Architecture.mlp(
            depth=depth, width=10, activation=name, sigma_w=point.sigma_w, ensemble="orthogonal", q=point.q_star
        )
        law = jacobian_spectrum(arch).measure
        distances.append(np.abs(law.cdf(x) - p).max())
        if limit.atoms():
            (place, mass), (at, found) = limit.atoms()[0], law.atoms()[-1]
            assert (at, found) == pytest.approx((place, mass), rel=3.0 / depth)
    slope = np.polyfit(np.log(depths), np.log(distances), 1)[0]
    assert slope == pytest.approx(-rate, abs=0.12)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="fit"):
        Architecture((Layer(3, 4, None, 1.0), Layer(5, 4, None, 1.0)))
    with pytest.raises(ValueError, match="sigma_w"):
        Layer(3, 3, None, -1.0)
    with pytest.raises(ValueError, match="grows without end"):
        jacobian_spectrum(Architecture.mlp(depth=2, width=10, activation="gelu", sigma_w=2.0, sigma_b=0.1))
    with pytest.raises(ValueError, match="not on 0 alone"):
        jacobian_spectrum(Architecture((Layer(3, 3, None, 1.0, ensemble=PointMass(0.0)),)))
    with pytest.raises(ValueError, match="depth"):
        Architecture.mlp(depth=0, width=10, activation="tanh", sigma_w=1.0)
    with pytest.raises(ValueError, match="orthogonal"):
        critical_q("tanh", 8, 0.25, ensemble="gaussian")
