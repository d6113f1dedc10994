"""How often the verdict is wrong: drawn matrices against their own law, and against another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from torch_rmt.compare import Report, compare
from torch_rmt.measures import Discrete, FussCatalan, MarchenkoPastur, Semicircle, SpectralMeasure, free_add
from torch_rmt.spectra import Spectrum
from torch_rmt.theory import Prediction

Draw = Callable[[int, np.random.Generator], np.ndarray]


def wigner(n: int, random: np.random.Generator) -> np.ndarray:
    g = random.standard_normal((n, n))
    return np.linalg.eigvalsh((g + g.T) / np.sqrt(2 * n))


def wishart(ratio: float) -> Draw:
    def draw(n: int, random: np.random.Generator) -> np.ndarray:
        x = random.standard_normal((n, round(n / ratio)))
        return np.linalg.eigvalsh(x @ x.T / x.shape[1])

    return draw


def product(factors: int, alive: float = 1.0) -> Draw:
    """Squared singular values of Gaussian matrices, a share of the rows of each switched off at random."""

    def draw(n: int, random: np.random.Generator) -> np.ndarray:
        m = np.eye(n)
        for _ in range(factors):
            m = (random.random(n) < alive)[:, None] * (random.standard_normal((n, n)) / np.sqrt(n)) @ m
        return np.linalg.svd(m, compute_uv=False) ** 2

    return draw


def rotated_signs(n: int, random: np.random.Generator) -> np.ndarray:
    signs = np.resize([1.0, -1.0], n)
    q = np.linalg.qr(random.standard_normal((n, n)))[0]
    return np.linalg.eigvalsh(np.diag(signs) + (q * signs) @ q.T)


#: name -> how to draw, its law, a law that it has not and that 200 eigenvalues must tell from it.
LAWS: dict[str, tuple[Draw, SpectralMeasure, SpectralMeasure]] = {
    "semicircle": (wigner, Semicircle(), Semicircle(1.5)),
    "marchenko-pastur": (wishart(0.5), MarchenkoPastur(0.5), MarchenkoPastur(0.8)),
    "atom at zero": (wishart(2.0), MarchenkoPastur(2.0), MarchenkoPastur(0.8)),
    "heavy spread": (product(8), FussCatalan(8), FussCatalan(4)),
    "binomial atom": (product(1, 0.5), MarchenkoPastur(2.0, variance=0.5), MarchenkoPastur(1.0)),
    "infinite edges": (rotated_signs, free_add(Discrete([-1.0, 1.0]), Discrete([-1.0, 1.0])), Semicircle(2.0)),
}


def reports(draw: Draw, law: SpectralMeasure, n: int, seeds: int) -> list[Report]:
    prediction, weights = Prediction(law), np.full((1, n), 1 / n)
    spectra = (np.sort(draw(n, np.random.default_rng(seed)))[None] for seed in range(seeds))
    return [compare(Spectrum(nodes, weights, n, n, "exact"), prediction) for nodes in spectra]


@pytest.mark.parametrize("name", LAWS)
def test_no_false_alarm_in_sixty_draws(name: str) -> None:
    """At 32, 64 and 200 eigenvalues; sixty draws without one bound the rate below 5 % at 95 % confidence."""
    draw, law, _ = LAWS[name]
    for n, seeds in ((32, 28), (64, 24), (200, 8)):
        found = reports(draw, law, n, seeds)
        assert [report.verdict for report in found if report.agrees is False] == []
        distances = [report.distance("kolmogorov") for report in found]
        assert 0.15 < np.median([d.ratio for d in distances if d is not None]) < 1.0


@pytest.mark.parametrize("name", LAWS)
def test_another_law_is_told_from_it_at_200_eigenvalues(name: str) -> None:
    draw, _, other = LAWS[name]
    found = reports(draw, other, 200, 6)
    assert [report.verdict for report in found if report.agrees is not False] == []


def test_a_scale_off_by_its_own_noise_is_no_difference_of_shape_at_an_infinite_edge() -> None:
    """At 1000 eigenvalues dividing by the fitted scale moved enough of the edge for an alarm (3.1 times the noise)."""
    draw, law, _ = LAWS["infinite edges"]
    (report,) = reports(draw, law, 1000, 1)
    assert report.agrees, report.verdict
