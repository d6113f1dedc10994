"""Convolutions and points of laws that a fuzzer over pairs of laws once found wrong, slow or refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import ndtr

from torch_rmt.measures import (
    Affine,
    Arcsine,
    Bernoulli,
    Discrete,
    FussCatalan,
    GaussianPushforward,
    KestenMcKay,
    MarchenkoPastur,
    Mixture,
    PointMass,
    QuarterCircle,
    Semicircle,
    SpectralMeasure,
    Uniform,
    Wachter,
    free_add,
    free_mul,
)
from torch_rmt.measures.geometry import Factor, Geometry
from torch_rmt.measures.stability import is_stable

LEAKY = GaussianPushforward(lambda h: np.maximum(h, 0.01 * h), 0.7, kinks=(0.0,))
BUMP = GaussianPushforward(lambda h: np.cosh(h) ** -4.0, 3.2)
TWO_PARTS = Mixture([Semicircle(0.5, mean=-3.0), MarchenkoPastur(2.0)], [0.4, 0.6])
PAIRS: dict[str, Callable[[], SpectralMeasure]] = {
    "a Gaussian tail beside a semicircle": lambda: free_add(LEAKY, Semicircle(0.8, mean=0.5)),
    "a Gaussian tail beside two points": lambda: free_add(LEAKY, Discrete([-1.0, 4.0])),
    "a mixture beside a quarter circle": lambda: free_add(TWO_PARTS, QuarterCircle(1.5)),
    "a quarter circle beside a uniform": lambda: free_add(Uniform(-1.5, 1.6), QuarterCircle(2.0)),
    "Fuss-Catalan beside points": lambda: free_add(FussCatalan(2.8), Bernoulli(0.4, low=-2.7)),
    "Fuss-Catalan beside a mirrored law": lambda: free_add(FussCatalan(0.6), Affine(MarchenkoPastur(2.0), -1.0, 0.2)),
    "a product with a quarter circle": lambda: free_mul(QuarterCircle(2.2), Uniform(0.7, 2.5)),
    "a product with a bump": lambda: free_mul(BUMP, Discrete(np.geomspace(0.01, 20.0, 40))),
    "a signed product with an atom": lambda: free_mul(
        Arcsine(-3.0, 2.0), Mixture([PointMass(0.0), MarchenkoPastur(0.4)], [0.4, 0.6])
    ),
    "a signed product of a tree": lambda: free_mul(KestenMcKay(2.7), QuarterCircle(0.4)),
    "atoms on both sides": lambda: free_add(Wachter(0.3, 0.6), Mixture([PointMass(-1.0), Semicircle()], [3.0, 1.0])),
}


@pytest.mark.parametrize("name", PAIRS)
def test_distribution_density_and_moments_belong_to_one_law(name: str) -> None:
    law = PAIRS[name]()
    atoms = np.array(law.atoms()).reshape(-1, 2)
    masses = [
        np.diff(law.cdf([a, b]))[0] - atoms[(atoms[:, 0] > a) & (atoms[:, 0] <= b), 1].sum() for a, b in law.support()
    ]
    assert sum(masses) + atoms[:, 1].sum() == pytest.approx(1.0, abs=1e-8)
    assert law.residual < 1e-12
    low, high = law.bounds()
    assert np.diff(law.cdf(np.linspace(low, high, 801))).min() > -1e-9
    levels = np.linspace(0.013, 0.987, 40)
    x = law.quantile(levels)
    away = np.abs(x[:, None] - np.append(atoms[:, 0], np.inf)).min(axis=1) > 1e-4 * (high - low)
    assert np.allclose(law.cdf(x)[away], levels[away], atol=1e-10)
    x = x[away]
    step = 1e-5 * np.minimum(np.abs(x), high - low)
    slope = (law.cdf(x - 2 * step) - 8 * law.cdf(x - step) + 8 * law.cdf(x + step) - law.cdf(x + 2 * step)) / (
        12 * step
    )
    error = np.abs(slope / law.density(x) - 1)
    assert np.median(error) < 1e-7
    assert np.max(error) < 1e-2  # beside kinks and edges a difference is coarse
    size = max(abs(low), abs(high))
    for k in (1, 2, 3):
        contour = SpectralMeasure.moment(law, k)
        assert contour == pytest.approx(law.moment(k), abs=1e-11 * size**k)


def test_every_point_beside_a_narrow_semicircle_has_its_interval() -> None:
    # G vanishes between the points, where the subordination function of the points is infinite
    law = free_add(Discrete(np.arange(64.0)), Semicircle(1e-4))
    intervals = law.support()
    assert len(intervals) == 64
    assert np.allclose(np.diff(law.cdf(np.array(intervals)), axis=1), 1 / 64, atol=1e-10)


@pytest.mark.parametrize("z", [-1e-3, -0.5, -1.999, -7.0, 2.3, 40.0, 1e-4 + 0.2j, -0.3 + 0.01j])
def test_quarter_circle_is_its_integral(z: complex) -> None:
    def part(name: str) -> float:
        def integrand(angle: float) -> float:
            value = complex(4 / np.pi * np.sin(angle) ** 2 / (z - 2 * np.cos(angle)))
            return float(getattr(value, name))

        return float(quad(integrand, 0, np.pi / 2, epsabs=1e-14, epsrel=1e-13, limit=500)[0])

    assert complex(QuarterCircle().stieltjes(z)) == pytest.approx(part("real") + 1j * part("imag"), rel=1e-11)


def test_fuss_catalan_beside_its_axes() -> None:
    sizes = np.geomspace(1e-16, 1e6, 45)
    z = np.concatenate([-sizes, -sizes * (1 - 1e-13j), sizes * np.exp(1e-9j), 4 + sizes, 1j * sizes])
    assert np.allclose(FussCatalan(1).stieltjes(z), MarchenkoPastur(1.0).stieltjes(z), rtol=1e-9, atol=0)
    general = FussCatalan(2.5)
    m = z * general.stieltjes(z) - 1
    far = np.abs(z) > 1e-8  # where z G - 1 is exact enough for the equation z M = (1 + M)^(s + 1)
    assert np.allclose((z * m)[far], ((1 + m) ** 3.5)[far], rtol=1e-6)
    assert np.all(general.stieltjes(z).imag <= 0)


def test_pushforward_is_exact_beside_its_own_nodes() -> None:
    law, wanted = GaussianPushforward(ndtr, 1.0), Uniform(0.0, 1.0)
    nodes = law._values_at.ravel()
    nodes = nodes[(nodes > 0.05) & (nodes < 0.95)]
    for offset in (1e-4, 1e-6, 1e-8):
        assert np.allclose(
            law.stieltjes(nodes + offset), wanted.stieltjes(nodes + offset), rtol=1e-7 * 1e-3 / offset * 1e-3
        )


def test_pushforward_is_exact_beside_a_joint_of_panels() -> None:
    law = GaussianPushforward(np.tanh, 0.6)
    z = np.append(1j * np.geomspace(1e-20, 1e-8, 25), 0.0)
    assert np.allclose(law.stieltjes(z), -1j * np.pi * law.density(0.0), rtol=1e-7)


def test_plateaus_are_atoms_up_to_the_kink() -> None:
    law = GaussianPushforward(lambda h: np.maximum(h, 0.0) ** 2, 1.0, kinks=(0.0,))
    assert law.atoms() == ((0.0, pytest.approx(0.5, abs=1e-15)),)


def test_density_beside_an_atom_at_zero_is_no_rounding() -> None:
    law = PAIRS["a signed product with an atom"]()
    x = np.concatenate([-np.geomspace(1e-3, 1e-60, 58), np.geomspace(1e-60, 1e-3, 58)])
    assert law.density(x).max() < 1.2 * law.density(1e-3)


def test_fuss_catalan_a_hair_above_the_axis_near_its_hard_edge() -> None:
    # log(1 + M) nears a limit of its angle, by which alone the right solution would be told from the wrong ones
    x = np.geomspace(1e-300, 1e-2, 80)
    for order in (0.3, 2, 10):
        law = FussCatalan(order)
        for angle in (1e-20, 1.5e-17, 1e-13):
            assert np.allclose(law.stieltjes(x + 1j * x * angle), law.stieltjes(x), rtol=1e-9, atol=0)


def test_where_the_transform_nearly_vanishes_only_the_stable_solution_is_taken() -> None:
    # at a zero of one summand's G the equations have a second real solution, with the others near infinity
    law = free_add(
        Discrete([-0.2, 0.1, 0.5], [0.49797535259866976, 0.23941529953854437, 0.26260934786278595]),
        Discrete(
            [-6.808937769510813, -4.0812313951669665, -3.725427225614469, 0.28209731358927864],
            [0.054976886014911804, 0.39710805655453363, 0.18908102810462954, 0.358834029325925],
        ),
        Discrete([-0.2, -0.1, 0.2], [0.2758948601456331, 0.25535936879693505, 0.46874577105743187]),
        Discrete([-0.3024344893159716, 2.537116972952822], [0.7553780363431333, 0.2446219636568667]),
    )
    low, high = law.bounds()
    assert np.diff(law.cdf(np.linspace(low, high, 1501))).min() > -1e-12


@pytest.mark.parametrize("last", [0.1, 3.0])
def test_a_repelling_real_solution_is_refused_however_far_the_other_coordinates_are(last: float) -> None:
    """Two laws, the second's coordinate at the zero of its G: the slope there is V_1 |G_2'|, whatever F is."""
    geometry = Geometry((Factor(Semicircle(last)), Factor(Bernoulli(0.5, low=-1.0, high=1.0))))
    zeta = np.zeros(1, dtype=complex)
    stable = []
    for far in (1e3, 1e6, 1e9):
        w = np.array([[far], [-1.0 / far]], dtype=complex)  # F_2 = w - 1/w
        _, dh = geometry.fields(w)
        stable.append(bool(is_stable(geometry, zeta, w, dh, 1.0)[0]))
    assert stable == [last < 1.0] * 3
