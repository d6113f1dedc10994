from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from torch_rmt.compare import Report, compare, density_curve, freeness_gap
from torch_rmt.measures import Discrete, FussCatalan, MarchenkoPastur, PointMass, Semicircle
from torch_rmt.spectra import SLQ, DenseOperator, Spectrum, exact
from torch_rmt.theory import Prediction


def wigner(n: int, seed: int) -> torch.Tensor:
    g = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (g + g.T) / np.sqrt(2 * n)


def measured(n: int = 60, seed: int = 0) -> Spectrum:
    return exact(DenseOperator(wigner(n, seed), symmetric=True))


def no_constant(value: str) -> float:
    raise AssertionError(f"{value} is not JSON")


@pytest.mark.parametrize("law", [Semicircle(), MarchenkoPastur(2.0), FussCatalan(3.0), PointMass(1.0)], ids=repr)
def test_json_is_strict_and_comes_back(law) -> None:
    report = compare(measured(), Prediction(law, scalars={"bad": float("nan"), "q": 0.5}), name="it")
    back = json.loads(report.to_json(), parse_constant=no_constant)
    assert back == json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert back["prediction"]["scalars"] == {"bad": None, "q": 0.5}
    record = back["spectrum"]
    again = Spectrum(
        **record | {"nodes": np.array(record["nodes"]), "weights": np.array(record["weights"]), "notes": ()}
    )
    np.testing.assert_array_equal(again.nodes, report.spectrum.nodes)
    assert compare(again, Prediction(law)).distances == compare(report.spectrum, Prediction(law)).distances


def test_scalars_are_finite_floats_and_hold_the_distances() -> None:
    report = compare(
        measured(), Prediction(Semicircle(), {"chi": 1.0, "depth_scale": float("inf")}), facts={"extra": 2.0}
    )
    scalars = report.scalars()
    assert all(type(v) is float and np.isfinite(v) for v in scalars.values())
    assert scalars["distance/kolmogorov"] == report.distance("kolmogorov").value
    assert scalars["predicted/chi"] == 1.0
    assert scalars["extra"] == 2.0
    assert "predicted/depth_scale" not in scalars


def test_without_a_law_the_report_says_why() -> None:
    report = compare(measured(), None, name="hessian", reason="nobody has one")
    assert report.agrees is None
    assert report.distances == ()
    assert "nobody has one" in report.verdict
    assert json.loads(report.to_json())["prediction"] is None


@pytest.mark.parametrize(
    ("chi", "depth", "word", "change"),
    [
        (1.2, 40.0, "Chaotic", "grow"),
        (0.8, 40.0, "Ordered", "shrink"),
        (1.0001, 40.0, "Critical", "keep their size"),
        (1.01, 40.0, "Critical", "grow"),
        (0.13, 1.0, "Shallow enough", "shrink"),
        (1.7, 3.0, "Shallow enough", "grow"),
    ],
)
def test_gradients_in_words(chi: float, depth: float, word: str, change: str) -> None:
    report = compare(measured(), Prediction(Semicircle(), {"chi": chi, "depth": depth}))
    assert word in report.verdict
    assert ("critical_init_" in report.verdict) == (word in ("Chaotic", "Ordered"))
    assert f"gradients {change}" in report.verdict


@pytest.mark.parametrize("law", [Semicircle(2.0), MarchenkoPastur(0.5), FussCatalan(2.0), FussCatalan(6.0)], ids=repr)
def test_the_curve_holds_the_mass(law) -> None:
    x, density = density_curve(law, points=2000)
    mass = np.trapezoid(density, x)
    # What lies below the first point, and the hard edge's spike, are outside the curve.
    assert mass == pytest.approx(1 - float(law.cdf(x[0])), abs=5e-3)
    assert np.all(np.diff(x) > 0)


def test_a_law_without_a_continuous_part_has_an_empty_curve() -> None:
    x, density = density_curve(Discrete([0.0, 1.0]))
    assert x.size == density.size == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_probe_noise_and_resolution_are_in_the_floor(seed: int) -> None:
    """An estimate of few steps agrees with the true law within its floor, which is wider than the exact one's."""
    n = 400
    operator = DenseOperator(wigner(n, seed), symmetric=True)
    law = Prediction(Semicircle(), finite_size_error=2 / n)
    full = compare(exact(operator), law).distance("kolmogorov")
    for probes, depth in ((1, 10), (4, 30)):
        estimate = compare(SLQ(probes, depth)(operator, torch.Generator().manual_seed(1000 + seed)), law)
        assert estimate.distance("kolmogorov").noise > full.noise
        assert estimate.agrees, estimate.verdict


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_freeness_gap_tells_free_parts_from_aligned_ones(seed: int) -> None:
    """A + O B O^T is free and A + B, sorted alike, is not; drawn at two sizes."""
    for n in (60, 200):
        a = torch.diag(torch.linspace(-1, 1, n, dtype=torch.float64))
        b = torch.diag(torch.cat([torch.zeros(n // 2), torch.ones(n - n // 2)]).double())
        q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
        parts = [exact(DenseOperator(m, symmetric=True)) for m in (a, b)]
        free = freeness_gap(parts, exact(DenseOperator(a + q @ b @ q.T, symmetric=True)), kind="sum")
        aligned = freeness_gap(parts, exact(DenseOperator(a + b, symmetric=True)), kind="sum")
        assert free.agrees, free.verdict
        assert free.distance("kolmogorov").value < 3 / n
        assert aligned.distance("kolmogorov").value > 0.1
        assert "aligned" in aligned.verdict


@pytest.mark.parametrize("seed", [0, 1])
def test_freeness_gap_of_a_product(seed: int) -> None:
    n, generator = 150, torch.Generator().manual_seed(seed)
    a, b = (torch.randn(2 * n, n, generator=generator, dtype=torch.float64) / np.sqrt(2 * n) for _ in range(2))
    root = torch.linalg.cholesky(b.T @ b).T  # root^T root = b^T b, as the law of a part asks
    parts = [exact(DenseOperator(m)) for m in (a, b)]
    report = freeness_gap(parts, exact(DenseOperator(a @ root.T)), kind="product")
    assert report.agrees, report.verdict
    assert report.distance("kolmogorov").value < 0.05


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_gap_of_estimated_sums_with_many_zeros(seed: int) -> None:
    """As Hessians are: most of each part are zeros, which every estimate puts somewhere else near zero."""
    rng = np.random.default_rng(seed)
    n, rank = 600, 150
    a = np.zeros(n)
    b = np.zeros(n)
    a[:rank], b[:rank] = np.linspace(1.0, 3.0, rank), np.linspace(-4.0, -2.0, rank)
    q, r = np.linalg.qr(rng.normal(size=(n, n)))
    q = q * np.sign(np.diag(r))
    free, aligned = np.diag(a) + (q * b) @ q.T, np.diag(a + b)

    def estimated(matrix: np.ndarray, k: int) -> Spectrum:
        operator = DenseOperator(torch.tensor(matrix), symmetric=True)
        return SLQ(probes=4, depth=48)(operator, torch.Generator().manual_seed(10 * seed + k))

    parts = [estimated(np.diag(a), 0), estimated(np.diag(b), 1)]
    assert freeness_gap(parts, estimated(free, 2), kind="sum").agrees
    assert freeness_gap(parts, estimated(aligned, 3), kind="sum").agrees is False


def test_a_spectrum_that_is_all_zeros_but_for_outliers_decides_nothing() -> None:
    values = np.zeros(2000)
    values[:3] = 5.0, 7.0, 9.0
    operator = DenseOperator(torch.diag(torch.tensor(values)), symmetric=True)
    found = SLQ(probes=1, depth=20)(operator, torch.Generator().manual_seed(0))
    report = freeness_gap([found, found], found, kind="sum")
    assert report.agrees is None
    assert "not tell from zero" in report.verdict


def test_freeness_gap_refuses_what_has_no_meaning() -> None:
    one = measured()
    with pytest.raises(ValueError, match="two parts"):
        freeness_gap([one], one, kind="sum")
    with pytest.raises(ValueError, match="negative"):
        freeness_gap([one, one], one, kind="product")


def test_report_is_frozen() -> None:
    report = Report("x", measured(), None)
    with pytest.raises(AttributeError):
        report.name = "y"  # type: ignore[misc]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_coarse_measurement_decides_nothing(seed: int) -> None:
    """Two eigenvalues on one side of their law could be chance; sixty could not."""
    law = Prediction(Semicircle())
    values = np.sort(np.random.default_rng(seed).uniform(0.6, 1.4, 60))

    def report(count: int) -> Report:
        few = values[:: 60 // count]
        return compare(Spectrum(few[None], np.full((1, count), 1 / count), count, count, "exact"), law)

    assert report(60).agrees is False
    assert report(2).agrees is None
    # all eigenvalues are known: more probes would not help
    assert "Too small to tell" in report(2).verdict
    assert "probes" not in report(2).verdict


def test_a_stated_error_of_zero_is_taken_at_its_word() -> None:
    spectrum, law = measured(), Semicircle()
    floors = [
        {d.kind: d.noise for d in compare(spectrum, Prediction(law, finite_size_error=error)).distances}["kolmogorov"]
        for error in (0.0, None)
    ]
    assert floors[0] == pytest.approx(0.5 / spectrum.dim)
    assert floors[1] > floors[0] + 1 / spectrum.dim
