"""The page's axes against those of the figures; runs where Node.js is."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.sinks.drawn_reports import all_reports
from torch_rmt.compare import Report
from torch_rmt.sinks import draw
from torch_rmt.sinks.drawing import Axis
from torch_rmt.sinks.spectra_tab import tab_record

NODE = shutil.which("node")
STATIC = Path(__file__).resolve().parents[2] / "torch_rmt" / "tensorboard_plugin" / "static"
pytestmark = pytest.mark.skipif(NODE is None, reason="no Node.js to run the page's modules")


def javascript(folder: Path, code: str, given: Any) -> Any:
    """Run a module that prints JSON; `given` is what the code calls so."""
    (folder / "package.json").write_text('{"type": "module"}')
    for file in STATIC.glob("*.js"):
        shutil.copy(file, folder)
    (folder / "given.json").write_text(json.dumps(given))
    (folder / "main.js").write_text(
        "import {readFileSync} from 'node:fs';\n"
        "import * as axis from './axis.js';\nimport * as layout from './layout.js';\n"
        f"const given = JSON.parse(readFileSync('given.json'));\n{code}"
    )
    run = subprocess.run([NODE or "", "main.js"], capture_output=True, text=True, cwd=folder, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_coordinates_and_ticks_are_those_of_the_figures(tmp_path: Path) -> None:
    axes = [Axis("linear"), Axis("log"), Axis("symlog", 1e-3), Axis("symlog", 10.0)]
    ranges = [(-2.1, 3.3), (-0.04, 0.9), (-7.2, 1.4), (0.1, 0.62), (-3.0, 3.0), (1.00000003, 1.00000065)]
    x = np.array([1e-6, 0.02, 1.0, 35.0, 4e5])
    asked = [
        {
            "axis": {"scale": a.scale, "unit": a.unit},
            "x": [float(v) for v in (x if a.scale == "log" else np.append(-x, x))],
        }
        for a in axes
    ]
    answer = javascript(
        tmp_path,
        """
        console.log(JSON.stringify(given.asked.map(({axis: a, x}) => ({
          place: x.map((v) => axis.place(a, v)),
          back: x.map((v) => axis.value(a, axis.place(a, v))),
          stretch: x.map((v) => axis.stretch(a, v)),
          ticks: given.ranges.map(([low, high]) => axis.ticks(a, low, high)),
        }))));
        """,
        {"asked": asked, "ranges": ranges},
    )
    for ours, theirs, question in zip(axes, answer, asked, strict=True):
        values = np.array(question["x"])
        np.testing.assert_allclose(theirs["place"], ours.place(values), rtol=1e-12)
        np.testing.assert_allclose(theirs["back"], values, rtol=1e-9)
        np.testing.assert_allclose(theirs["stretch"], ours.stretch(values), rtol=1e-12)
        for (low, high), ticks in zip(ranges, theirs["ticks"], strict=True):
            expected = ours.ticks(low, high)
            np.testing.assert_allclose([u for u, _ in ticks], [u for u, _ in expected], atol=1e-12)
            assert len({text for _, text in ticks}) == len(ticks)
            if ours.scale == "symlog":
                assert [text for _, text in ticks] == [text for _, text in expected]


@pytest.mark.parametrize("scale", ["auto", "linear", "log", "symlog"])
def test_every_axis_keeps_the_mass_of_bars_and_law(scale: str, tmp_path: Path) -> None:
    reports: list[Report] = all_reports()
    records = [tab_record(report, draw(report)) for report in reports]
    layouts = javascript(
        tmp_path,
        """
        console.log(JSON.stringify(given.records.map((record) => {
          const a = axis.commonAxis([record], given.scale);
          return {axis: a, range: layout.horizontalRange([layout.layOut(record, a)]), ...layout.layOut(record, a)};
        })));
        """,
        {"records": records, "scale": scale},
    )
    for report, record, laid in zip(reports, records, layouts, strict=True):
        drawing = draw(report)
        if scale == "auto":
            assert laid["axis"]["scale"] == drawing.axis.scale
        elif scale == "log":
            assert laid["axis"]["scale"] == ("symlog" if report.spectrum.symmetric else "log")
        bars = np.array([[bar["from"], bar["to"], bar["height"]] for bar in laid["bars"]])
        mass = (bars[:, 1] - bars[:, 0]) @ bars[:, 2]
        assert mass == pytest.approx(float(drawing.heights @ np.diff(drawing.edges)), rel=1e-3)
        low, high = laid["range"]
        assert low <= bars[:, 0].min()
        assert high >= bars[:, 1].max()
        if record["curve"][0]:
            pieces = [np.array(piece) for piece in laid["curve"]]
            area = sum(float(np.trapezoid(piece[:, 1], piece[:, 0])) for piece in pieces)
            own = np.nan_to_num(np.trapezoid(drawing.curve_y, drawing.curve_x))
            assert area == pytest.approx(float(own), rel=0.03)
        ours = Axis(laid["axis"]["scale"], laid["axis"]["unit"])
        for outlier, measured in zip(laid["outliers"], report.outliers, strict=True):
            assert outlier["x"] == pytest.approx(measured.location)
            assert outlier["u"] == pytest.approx(float(ours.place(np.array([measured.location]))[0]))


def test_runs_on_different_axes_meet_on_one(tmp_path: Path) -> None:
    records = [tab_record(report, draw(report)) for report in all_reports()]
    positive = [record for record in records if record["positive"]]
    answer = javascript(
        tmp_path,
        """
        console.log(JSON.stringify([
          axis.commonAxis(given.records, 'auto'), axis.commonAxis(given.positive, 'auto'),
          axis.commonAxis(given.records, 'log'), axis.commonAxis(given.records, 'linear'),
        ]));
        """,
        {"records": records, "positive": positive},
    )
    assert {record["axis"]["scale"] for record in positive} == {"linear", "log"}
    assert [a["scale"] for a in answer] == ["symlog", "log", "symlog", "linear"]
