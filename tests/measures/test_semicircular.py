"""A law beside a semicircle: the explicit curve against continuation, against bisection and at gaps and cusps."""

from __future__ import annotations

import numpy as np
import pytest

from torch_rmt.measures import (
    Discrete,
    GaussianPushforward,
    MarchenkoPastur,
    Semicircle,
    SpectralMeasure,
    Uniform,
    free_add,
    subordination,
)
from torch_rmt.measures.convolution import FreeSum
from torch_rmt.measures.semicircular import semicircle_row, solve_beside_semicircle
from torch_rmt.measures.subordination import _settle

LAWS: dict[str, SpectralMeasure] = {
    "two points": Discrete([-1.0, 1.0]),
    "three uneven points": Discrete([0.0, 1.0, 3.0], [0.98, 0.01, 0.01]),
    "fifty nodes": Discrete(np.random.default_rng(0).standard_normal(50)),
    "sixty-four nodes in a row": Discrete(np.arange(64.0)),
    "Marchenko-Pastur": MarchenkoPastur(0.3),
    "Marchenko-Pastur with an atom": MarchenkoPastur(3.0),
    "uniform": Uniform(-1.0, 2.0),
    "pushforward": GaussianPushforward(np.tanh, 0.6),
    "pushforward with an atom": GaussianPushforward(lambda h: np.maximum(h, 0.0), 1.0, kinks=(0.0,)),
}
CASES = [(name, variance) for name in LAWS for variance in (4e-4, 0.1, 1.0, 30.0)]


def points_of(law: SpectralMeasure, variance: float, count: int) -> np.ndarray:
    """Over the support and a little beyond, gaps included."""
    low, high = law.bounds()
    return np.linspace(low - 2.1 * np.sqrt(variance), high + 2.1 * np.sqrt(variance), count) + 1e-4


def by_continuation(monkeypatch: pytest.MonkeyPatch, law: SpectralMeasure, x: np.ndarray) -> np.ndarray:
    """Density by the general solver."""
    with monkeypatch.context() as patch:
        patch.setattr(subordination, "semicircle_row", lambda geometry: None)
        return law.density(x)


@pytest.mark.parametrize(("name", "variance"), CASES)
def test_curve_and_continuation_agree(name: str, variance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x = points_of(LAWS[name], variance, 403)
    law = free_add(LAWS[name], Semicircle(variance))
    assert isinstance(law, FreeSum)
    _, done = solve_beside_semicircle(law.geometry, x.astype(complex), 1, _settle)
    assert done.all()  # nothing is left to the general solver
    assert law.subordination(x).residual.max() < 1e-12
    curve, general = law.density(x), by_continuation(monkeypatch, law, x)
    # beside an edge the density is the root of a distance that is known to rounding of x
    assert np.allclose(curve, general, rtol=1e-9, atol=1e-8 * general.max())
    assert np.median(np.abs(curve - general)) < 1e-12 * general.max()


@pytest.mark.parametrize("variance", [4e-4, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("name", ["two points", "three uneven points", "fifty nodes"])
def test_density_is_the_height_of_the_curve(name: str, variance: float) -> None:
    law = LAWS[name]
    assert isinstance(law, Discrete)
    low, high = law.bounds()
    u = np.linspace(low - np.sqrt(variance), high + np.sqrt(variance), 199)
    if variance < 0.01:
        u = (law.nodes[:, None] + np.sqrt(variance * law.weights)[:, None] * np.linspace(-0.9, 0.9, 7)).ravel()
    below, above = np.zeros(u.shape), np.full(u.shape, np.sqrt(variance))
    for _ in range(60):  # bisection: nothing here is shared with the solver
        y = 0.5 * (below + above)
        inside = variance * (law.weights / ((u[:, None] - law.nodes) ** 2 + y[:, None] ** 2)).sum(axis=1) > 1
        below, above = np.where(inside, y, below), np.where(inside, above, y)
    x = u + variance * (law.weights * (u[:, None] - law.nodes) / ((u[:, None] - law.nodes) ** 2 + y[:, None] ** 2)).sum(
        axis=1
    )
    on_curve = y > 1e-3 * np.sqrt(variance)
    got = free_add(law, Semicircle(variance)).density(x)
    assert on_curve.sum() >= 14
    assert np.allclose(got[on_curve], y[on_curve] / (np.pi * variance), rtol=1e-8)
    with np.errstate(divide="ignore"):
        outside = variance * (law.weights / (u[:, None] - law.nodes) ** 2).sum(axis=1) < 0.999
    assert np.all(got[outside] == 0)


def test_cusp_is_a_cube_root() -> None:
    # two points and variance 1: the gap has just closed, G^3 - 2 x G^2 + x^2 G - x = 0, G ~ x^(1/3)
    x = np.concatenate([-np.geomspace(1e-9, 1e-3, 40)[::-1], np.geomspace(1e-9, 1e-3, 40)])
    truth = np.array([np.max(np.roots([1, -2 * t, t * t, -t]).imag) / np.pi for t in x])
    density = free_add(Discrete([-1.0, 1.0]), Semicircle()).density(x)
    assert np.allclose(density, truth, rtol=1e-8)
    assert np.allclose(
        density[np.abs(x) < 1e-6], np.sqrt(3) / (2 * np.pi) * np.cbrt(np.abs(x[np.abs(x) < 1e-6])), rtol=1e-3
    )


def test_points_at_a_cusp_are_solved_one_by_one() -> None:
    law = free_add(Discrete([-1.0, 1.0]), Semicircle())
    for t in (1e-10, 6e-13, -6e-13, -1e-10):
        truth = np.max(np.roots([1, -2 * t, t * t, -t]).imag) / np.pi
        assert float(law.density(t)) == pytest.approx(truth, rel=1e-3)
    assert abs(float(law.density(0.0))) < 1e-4
    assert np.allclose(law.cdf([law.quantile(0.3), 0.0]), [0.3, 0.5], atol=1e-10)


def test_only_one_other_law_and_a_centred_semicircle_take_the_curve() -> None:
    two, mp = LAWS["two points"], LAWS["Marchenko-Pastur"]

    def row(law: SpectralMeasure) -> int | None:
        assert isinstance(law, FreeSum)
        return semicircle_row(law.geometry)

    assert row(free_add(two, Semicircle())) == 1
    assert row(free_add(two, mp)) is None
    assert row(free_add(two, mp, Semicircle())) is None
    assert row(free_add(two, two, Semicircle())) is None
    moved = free_add(two, Semicircle(2.0, mean=3.0))
    assert np.allclose(moved.density([2.0, 3.3]), free_add(two, Semicircle(2.0)).density([-1.0, 0.3]), rtol=1e-12)


def test_a_repelling_solution_is_not_taken_for_an_interior_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # far from 0 a real solution with rounding above it looks interior; it is repelling, and wrong by all the density
    count = 500
    nodes = Discrete(np.arange(float(count)))
    variance = 1e-4 * (count - 1) ** 2
    law = free_add(nodes, Semicircle(variance))
    x = np.linspace(-2.1 * np.sqrt(variance), count - 1 + 2.1 * np.sqrt(variance), 1000)
    general, curve = by_continuation(monkeypatch, law, x), law.density(x)
    assert np.allclose(general, curve, rtol=0, atol=1e-7 * curve.max())


def test_few_points_are_as_good_as_many() -> None:
    law = free_add(LAWS["fifty nodes"], Semicircle(0.1))
    x = np.linspace(-1.5, 1.5, 9)
    assert np.allclose([float(law.density(t)) for t in x], law.density(x), rtol=1e-12)
