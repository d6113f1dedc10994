from __future__ import annotations

import numpy as np
import pytest

from tests.sinks.drawn_reports import (
    all_reports,
    exact_spectrum,
    law_in_pieces,
    product_of_gaussians,
    semicircle_with_outlier,
    wide_gaussian,
    without_a_law,
)
from torch_rmt.compare import Report, compare
from torch_rmt.compare.distances import numerical_zero
from torch_rmt.measures import FussCatalan, Semicircle
from torch_rmt.sinks.drawing import Axis, draw
from torch_rmt.spectra import Spectrum
from torch_rmt.theory import Prediction


@pytest.mark.parametrize("report", all_reports(), ids=lambda r: r.name)
def test_bars_hold_all_the_mass_that_is_not_zero(report: Report) -> None:
    drawing = draw(report)
    nodes, weights = report.spectrum.nodes, report.spectrum.weights / report.spectrum.weights.shape[0]
    off = 0.0 if report.spectrum.symmetric else float(weights[nodes <= numerical_zero(report.spectrum)].sum())
    assert off < 1
    assert (drawing.heights * np.diff(drawing.edges)).sum() == pytest.approx(1 - off, abs=1e-9)
    assert drawing.low < drawing.edges.mean() < drawing.high


@pytest.mark.parametrize(
    ("report", "mass", "slack"),
    [
        (semicircle_with_outlier(), 1.0, 2e-3),
        (product_of_gaussians(), 1.0, 2e-2),
        (wide_gaussian(), 0.25, 5e-3),
    ],
    ids=["linear", "log", "with atom"],
)
def test_area_under_the_curve_is_the_mass_of_the_continuous_part(report: Report, mass: float, slack: float) -> None:
    drawing = draw(report)
    area = np.trapezoid(drawing.curve_y, drawing.curve_x)
    assert report.prediction is not None
    if drawing.axis.scale == "log":
        # A logarithmic axis ends where eigenvalues cannot be measured any more.
        mass -= float(report.prediction.measure.cdf(numerical_zero(report.spectrum)))
    assert area == pytest.approx(mass, abs=slack)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_decades_are_drawn_where_nothing_lies(seed: int) -> None:
    """A law that thins out towards zero: all eigenvalues measured lie above 1e-3 of the largest."""
    law = FussCatalan(2.0)
    levels = np.random.default_rng(seed).uniform(0.1, 1.0, 40)
    report = compare(exact_spectrum(law.quantile(np.sort(levels)), symmetric=False), Prediction(law))
    drawing = draw(report)
    assert drawing.axis.scale == "log"
    start = float(drawing.axis.value(np.array([np.nanmin(drawing.curve_x)]))[0])
    assert law.cdf([start])[0] < 5e-3
    assert law.cdf([start])[0] > 1e-4, "the empty tail is cut"
    assert np.trapezoid(drawing.curve_y, drawing.curve_x) == pytest.approx(1.0, abs=1e-2)


def test_no_room_is_left_for_negative_eigenvalues_where_there_are_none() -> None:
    values = np.concatenate([np.zeros(300), np.geomspace(1e-3, 10.0, 60)])
    drawing = draw(compare(exact_spectrum(values, symmetric=True), None))
    assert drawing.axis.scale == "symlog"
    first, second = drawing.edges[:2]
    assert first == pytest.approx(-second), "zero is the middle of the first bar"
    assert (drawing.heights * np.diff(drawing.edges))[0] == pytest.approx(300 / 360)
    both = draw(compare(exact_spectrum(np.append(-1.0, values), symmetric=True), None))
    assert both.low == -both.high


@pytest.mark.parametrize("seed", [0, 1])
def test_bars_lie_on_the_curve_that_is_their_law(seed: int) -> None:
    for make in (semicircle_with_outlier, product_of_gaussians, wide_gaussian):
        drawing = draw(make(seed))
        centres = 0.5 * (drawing.edges[1:] + drawing.edges[:-1])
        law = np.interp(centres, drawing.curve_x, drawing.curve_y, left=0.0, right=0.0)
        gap = np.abs(law - drawing.heights) * np.diff(drawing.edges)
        assert gap.sum() < 0.12


def test_zeros_of_a_wide_matrix_are_told_and_not_drawn() -> None:
    drawing = draw(wide_gaussian())
    assert drawing.notes == ("0.75 of the spectrum is 0 to rounding; the law puts 0.75 there",)
    assert drawing.low > 0 or drawing.axis.scale == "log"
    assert drawing.atoms == ()


def test_scale_follows_the_spread() -> None:
    assert draw(semicircle_with_outlier()).axis.scale == "linear"
    assert draw(product_of_gaussians()).axis.scale == "log"
    indefinite = draw(without_a_law())
    assert indefinite.axis.scale == "symlog"
    bins = np.searchsorted(indefinite.edges, [-1e-9, 1e-9])
    assert bins[0] == bins[1], "what is zero to rounding on either side shares a bar"
    assert indefinite.logarithmic, "a mass of 1e-5 is invisible on a linear axis"


def test_law_with_a_gap_is_not_joined_across_it() -> None:
    class Two(Semicircle):
        def support(self) -> tuple[tuple[float, float], ...]:
            return ((-2.0, -1.0), (1.0, 2.0))

    from torch_rmt.theory import Prediction

    report = Report("x", exact_spectrum(np.array([-1.5, 1.5]), symmetric=True), Prediction(Two()))
    drawing = draw(report)
    assert np.isnan(drawing.curve_x).sum() == 1
    left, right = drawing.curve_x[np.isnan(drawing.curve_x).argmax() + np.array([-1, 1])]
    assert left <= -1.0
    assert right >= 1.0


@pytest.mark.parametrize("axis", [Axis("linear"), Axis("log"), Axis("symlog", 1e-3)], ids=lambda a: a.scale)
def test_stretch_is_the_derivative_of_the_coordinate(axis: Axis) -> None:
    x = np.array([0.01, 0.5, 3.0, 200.0])
    step = 1e-6 * x
    slope = (axis.place(x + step) - axis.place(x - step)) / (2 * step)
    np.testing.assert_allclose(slope * axis.stretch(x), 1.0, rtol=1e-6)
    np.testing.assert_allclose(axis.value(axis.place(x)), x, rtol=1e-12)


def test_a_law_in_many_pieces_is_drawn_in_the_bins_of_the_bars() -> None:
    drawing = draw(law_in_pieces())
    assert drawing.atoms == ()
    assert np.trapezoid(drawing.curve_y, drawing.curve_x) == pytest.approx(1.0, abs=1e-9)
    assert np.abs(drawing.curve_y[::2] - drawing.heights).max() < 0.3


def test_rounding_does_not_stretch_the_axis() -> None:
    nodes, weights = np.array([[-5.0, 1.0, 2.0]]), np.array([[1e-13, 0.5, 0.5 - 1e-13]])
    spectrum = Spectrum(nodes, weights, dim=1000, matvecs=3, method="slq", seed=0)
    assert draw(Report("x", spectrum, None)).low > 0


@pytest.mark.parametrize(
    ("axis", "low", "high"),
    [
        (Axis("linear"), -2.2, 3.1),
        (Axis("linear"), 0.99998, 1.00003),
        (Axis("log"), -23.0, 1.0),
        (Axis("log"), 0.1, 1.6),
        (Axis("symlog", 1e-4), -2.5, 4.5),
    ],
)
def test_ticks_are_few_ordered_distinct_and_inside(axis: Axis, low: float, high: float) -> None:
    ticks = axis.ticks(low, high)
    places, texts = [p for p, _ in ticks], [t for _, t in ticks]
    assert 2 <= len(ticks) <= 9
    assert places == sorted(places)
    assert len(set(texts)) == len(texts)
    assert low <= places[0]
    assert places[-1] <= high


def test_degenerate_spectra_can_be_drawn() -> None:
    for eigenvalues, symmetric in (
        (np.zeros(5), True),
        (np.zeros(5), False),
        (np.full(4, 2.0), False),
        (np.ones(1), True),
    ):
        drawing = draw(Report("x", exact_spectrum(eigenvalues, symmetric=symmetric), None))
        assert drawing.low < drawing.high
        assert np.isfinite(drawing.heights).all()
