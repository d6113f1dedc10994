from __future__ import annotations

import json
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.sinks.drawn_reports import all_reports, product_of_gaussians, semicircle_with_outlier
from torch_rmt.compare import Report
from torch_rmt.sinks import JsonLinesSink, Sink, TensorBoardSink, figure, write_html
from torch_rmt.sinks.drawing import draw
from torch_rmt.sinks.tensorboard import rgb
from torch_rmt.spectra import Spectrum


def test_json_lines_are_strict_and_whole(tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path / "deep" / "spectra.jsonl")
    assert isinstance(sink, Sink)
    reports = all_reports()
    for step, report in enumerate(reports):
        sink.write(report, step)
    lines = sink.path.read_text().splitlines()
    assert len(lines) == len(reports)
    for step, (line, report) in enumerate(zip(lines, reports, strict=True)):
        back = json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
        assert (back["step"], back["name"], back["verdict"]) == (step, report.name, report.verdict)
        np.testing.assert_array_equal(back["spectrum"]["nodes"], report.spectrum.nodes)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of processes")
def test_a_line_that_does_not_fit_on_the_disk_is_taken_back(tmp_path: Path) -> None:
    import resource

    first, second = all_reports()[:2]
    sink = JsonLinesSink(tmp_path / "spectra.jsonl")
    sink.write(first, 0)
    whole = sink.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 40, limits[1]))  # room for the beginning of a line
    try:
        with pytest.raises(OSError, match=r"No space left|too large"):
            sink.write(second, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sink.path.read_bytes() == whole
    with sink.path.open("ab") as file:
        file.write(b'{"step": 2, "na' + b"x" * 100_000)  # the process was killed here
    sink.write(second, 3)
    assert sink.path.read_bytes().startswith(whole)
    assert [json.loads(line)["step"] for line in sink.path.read_text().splitlines()] == [0, 3]


def _events(folder: Path) -> dict[str, dict[str, list]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    read = {"scalars": events.Scalars, "histograms": events.Histograms, "images": events.Images}
    return {kind: {tag: reader(tag) for tag in tags[kind]} for kind, reader in read.items()}


@pytest.mark.parametrize("report", all_reports(), ids=lambda r: r.name)
def test_tensorboard_gets_scalars_histogram_and_figure(report: Report, tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write(report, 7)
    sink.close()
    events = _events(tmp_path)
    scalars = {tag: points[0] for tag, points in events["scalars"].items()}
    assert {tag: p.value for tag, p in scalars.items()} == {
        f"{report.name}/{key}": pytest.approx(value, rel=1e-6) for key, value in report.scalars().items()
    }
    assert {p.step for p in scalars.values()} == {7}
    ((tag, (histogram,)),) = events["histograms"].items()
    kind = "eigenvalues" if report.spectrum.symmetric else "log10_eigenvalues"
    assert tag == f"{report.name}/{kind}"
    weights = report.spectrum.weights / report.spectrum.weights.shape[0]
    if not report.spectrum.symmetric:
        weights = weights[report.spectrum.nodes > 0]
    value = histogram.histogram_value
    assert value.num == pytest.approx(weights.sum() * report.spectrum.dim)
    assert sum(value.bucket) == pytest.approx(value.num)
    used = report.spectrum.weights > 0
    nodes, counts = report.spectrum.nodes[used].astype(float), report.spectrum.weights[used] * report.spectrum.dim
    counts = counts / report.spectrum.weights.shape[0]
    if not report.spectrum.symmetric:
        nodes, counts = np.log10(nodes[nodes > 0]), counts[nodes > 0]
    assert (value.min, value.max) == (pytest.approx(nodes.min()), pytest.approx(nodes.max()))
    assert value.sum == pytest.approx(counts @ nodes)
    assert value.sum_squares == pytest.approx(counts @ nodes**2)
    for limit, below in zip(value.bucket_limit, np.cumsum(value.bucket), strict=True):
        assert below == pytest.approx(counts[nodes <= limit].sum(), rel=1e-6)
    ((image,),) = events["images"].values()
    assert (image.step, image.encoded_image_string[:4]) == (7, b"\x89PNG")


def test_pictures_keep_their_colours() -> None:
    from matplotlib.figure import Figure

    image = rgb(Figure(figsize=(1, 1), facecolor=(1.0, 0.5, 0.0)))
    assert image.dtype == np.uint8
    assert image[0, 0].tolist() == [255, 128, 0]


def test_a_report_of_nothing_but_zeros_is_written(tmp_path: Path) -> None:
    zeros = Spectrum(np.zeros((1, 5)), np.full((1, 5), 0.2), dim=5, matvecs=5, method="exact", symmetric=False)
    sink = TensorBoardSink(tmp_path)
    sink.write(Report("dead", zeros, None), 0)
    sink.close()
    events = _events(tmp_path)
    assert events["histograms"] == {}  # of no logarithm
    assert set(events["images"]) == {"dead/spectrum"}


def test_what_one_probe_saw_of_an_eigenvalue_is_drawn() -> None:
    """Its weight is a random share of 1 / dim, far above rounding."""
    nodes, weights = np.array([[1.0, 2.0, 3.0]]), np.array([[1e-3, 0.499, 0.5]])
    drawing = draw(Report("x", Spectrum(nodes, weights, dim=10, matvecs=3, method="slq", seed=0), None))
    assert (drawing.heights * np.diff(drawing.edges)).sum() == pytest.approx(1.0)
    assert drawing.low < 1.0


def test_tensorboard_refuses_what_it_cannot_write_to() -> None:
    with pytest.raises(TypeError, match="log directory or a SummaryWriter"):
        TensorBoardSink(3)


def test_without_matplotlib_one_warning_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"torch-rmt\[plots\]"):
        figure(product_of_gaussians())
    sink = TensorBoardSink(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"pip install 'torch-rmt\[plots\]'"):
        sink.write(product_of_gaussians(), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sink.write(product_of_gaussians(), 1)
    sink.close()
    events = _events(tmp_path)
    assert events["images"] == {}
    assert [point.step for point in events["histograms"]["jacobian/log10_eigenvalues"]] == [0, 1]


@pytest.mark.parametrize("report", all_reports(), ids=lambda r: r.name)
def test_figure_shows_bars_law_and_verdict(report: Report, tmp_path: Path) -> None:
    made = figure(report)
    (axes,) = made.axes
    labels = set(axes.get_legend_handles_labels()[1])
    assert "measured" in labels
    assert ("law" in labels) == (report.prediction is not None)
    assert ("outliers" in labels) == bool(report.outliers)
    made.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_figure_leaves_pyplot_alone() -> None:
    code = (
        "import sys; from tests.sinks.drawn_reports import product_of_gaussians;"
        "from torch_rmt.sinks import figure; figure(product_of_gaussians());"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


class _Page(HTMLParser):
    """Counts elements, checks that they nest, and keeps whatever would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.fetched: list[str] = []
        self.text = ""
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.fetched += [v or "" for k, v in attrs if k in {"src", "href", "xlink:href", "data", "srcset"}]
        if tag not in {"meta", "br", "link", "img", "hr", "!doctype"}:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_needs_nothing_but_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write_html(
        tmp_path / "made" / "page.html",
        {"default": all_reports()[:2], "critical": all_reports()[2:4]},
        title="A <title> & more",
        summary=["First line.", "Second line."],
        table=[["run", "accuracy"], ["default", "0.1"], ["critical", "0.9"]],
    )
    page = _Page()
    text = path.read_text(encoding="utf-8")
    page.feed(text)
    assert page._open == []
    assert (page.count["svg"], page.count["article"], page.count["section"]) == (4, 4, 2)
    assert "script" not in page.count
    assert page.fetched == []
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    for said in (
        "A <title> & more",
        "Second line.",
        "critical",
        "stands <far> beyond the edge & is no noise.",
    ):
        assert said in page.text
    assert "nan" not in text.split("<style>")[0] + text.split("</style>")[1].lower()


def test_page_takes_a_plain_list_and_refuses_a_ragged_table(tmp_path: Path) -> None:
    path = write_html(tmp_path / "page.html", [semicircle_with_outlier()])
    assert path.read_text().count("<svg") == 1
    with pytest.raises(ValueError, match="differ in length"):
        write_html(tmp_path / "page.html", [], table=[["a", "b"], ["c"]])
