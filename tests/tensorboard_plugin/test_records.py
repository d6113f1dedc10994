"""What the Spectra tab is told of a report, and how it comes out of an event file again."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import torch_rmt.tensorboard_plugin.plugin as reader
from tests.sinks.drawn_reports import (
    all_reports,
    exact_spectrum,
    law_in_pieces,
    product_of_gaussians,
    semicircle_with_outlier,
    without_a_law,
)
from torch_rmt.compare import Outlier, Report
from torch_rmt.sinks import TensorBoardSink, draw, spectra_tab
from torch_rmt.sinks.spectra_tab import tab_record, tab_summary


def numbers(values: list[Any]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], dtype=float)


@pytest.mark.parametrize("report", all_reports(), ids=lambda r: r.name)
def test_a_record_holds_the_drawing(report: Report) -> None:
    drawing = draw(report)
    record = json.loads(json.dumps(tab_record(report, drawing), allow_nan=False))
    assert record["axis"] == {"scale": drawing.axis.scale, "unit": drawing.axis.unit}
    assert (record["label"], record["verdict"], record["agrees"]) == (drawing.label, report.verdict, report.agrees)
    # Bars are told by their ends alone.
    np.testing.assert_allclose(np.linspace(record["low"], record["high"], len(record["bars"]) + 1), drawing.edges)
    np.testing.assert_allclose(record["bars"], drawing.heights, rtol=1e-4)
    if record["law_bars"] is not None:
        np.testing.assert_allclose(np.repeat(record["law_bars"], 2), drawing.curve_y, rtol=1e-4)
        np.testing.assert_allclose(np.repeat(drawing.edges, 2)[1:-1], drawing.curve_x)
        assert record["curve"] == [[], []]
    else:
        x, y = map(numbers, record["curve"])
        np.testing.assert_allclose(x, drawing.curve_x, atol=1e-5 * (drawing.high - drawing.low))
        np.testing.assert_allclose(y, drawing.curve_y, rtol=1e-4)
    assert [tuple(atom) for atom in record["atoms"]] == list(drawing.atoms)
    assert tuple(record["outliers"]) == drawing.outliers
    assert record["notes"] == list(drawing.notes)
    assert record["distances"] == {d.kind: [d.value, d.noise] for d in report.distances}
    assert (record["law"] is None) == (report.prediction is None)
    assert record["measured"]["dim"] == report.spectrum.dim


def test_only_a_law_in_pieces_is_told_in_bars() -> None:
    def told_in_bars(report: Report) -> bool:
        return tab_record(report, draw(report))["law_bars"] is not None

    assert told_in_bars(law_in_pieces())
    assert not told_in_bars(semicircle_with_outlier())
    assert not told_in_bars(without_a_law())


@pytest.mark.parametrize("n", [20, 2000])
def test_a_record_is_a_few_thousand_letters_at_any_size(n: int) -> None:
    report = product_of_gaussians(n=min(n, 300))
    values = np.concatenate([np.abs(np.random.default_rng(0).normal(size=n)), 10.0 ** np.arange(3.0, 5.0, 2.0 / n)])
    outliers = tuple(Outlier(float(v), 1.0 / n, 1.0, 9.0) for v in values[n:])
    worst = dataclasses.replace(
        report, spectrum=exact_spectrum(values, symmetric=False), outliers=outliers, verdict="departs " * 5000
    )
    record = tab_record(worst, draw(worst))
    assert record["outlier_count"] == n
    assert len(tab_summary("worst", record).SerializeToString()) < 16_000


def test_what_is_not_finite_becomes_null() -> None:
    report = semicircle_with_outlier()
    record = tab_record(
        dataclasses.replace(report, distances=(dataclasses.replace(report.distances[0], value=float("nan")),)),
        draw(report),
    )
    assert record["distances"] == {"kolmogorov": [None, 0.01]}
    json.dumps(record, allow_nan=False)


def test_both_sides_know_one_name_and_one_version() -> None:
    assert reader.PLUGIN_NAME == spectra_tab.PLUGIN_NAME
    assert reader.RECORD_VERSION == spectra_tab.RECORD_VERSION


def test_an_event_file_is_read_without_the_plugin(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    report = product_of_gaussians()
    sink = TensorBoardSink(tmp_path)
    sink.write(report, 3)
    sink.close()
    (file,) = tmp_path.glob("events.*")
    ours = [
        (event.step, value)
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == spectra_tab.PLUGIN_NAME
    ]
    ((step, value),) = ours
    assert (step, value.metadata.display_name) == (3, "jacobian")
    assert json.loads(value.tensor.string_val[0]) == tab_record(report, draw(report))


def test_a_writer_of_another_kind_is_told_once() -> None:
    written = []
    other = SimpleNamespace(
        add_histogram_raw=lambda *args, **kwargs: written.append("histogram"),
        add_image=lambda *args, **kwargs: written.append("image"),
    )
    sink = TensorBoardSink(other)
    with pytest.warns(RuntimeWarning, match=r"torch\.utils\.tensorboard\.SummaryWriter"):
        sink.write_pictures(product_of_gaussians(), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sink.write_pictures(product_of_gaussians(), 1)
    assert written == ["histogram", "image"] * 2


def datum(step: int, content: object, wall_time: float = 1.0) -> Any:
    return SimpleNamespace(step=step, wall_time=wall_time, numpy=np.array(content, dtype=object))


def test_records_come_in_order_once_a_step_and_without_what_cannot_be_read() -> None:
    def text(said: str, version: int = 1) -> bytes:
        return json.dumps({"version": version, "verdict": said}).encode()

    found, skipped = reader.records(
        [
            datum(20, text("first try")),
            datum(10, text("ten"), wall_time=float("nan")),
            datum(20, text("resumed")),
            datum(30, b"\xff no text"),
            datum(31, b"[1, 2]"),
            datum(32, text("from the future", version=2)),
            datum(33, b""),
            datum(34, [1.0, 2.0]),
            datum(35, 1.5),
        ]
    )
    assert [(r["step"], r["verdict"], r["wall_time"]) for r in found] == [(10, "ten", 0.0), (20, "resumed", 1.0)]
    assert skipped == 6
