"""The Spectra tab behind TensorBoard's own server: routes, several runs, odd names, nothing to show."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from werkzeug.serving import make_server
from werkzeug.test import Client

from tests.sinks.drawn_reports import law_in_pieces, semicircle_with_outlier, wide_gaussian
from torch_rmt.sinks import TensorBoardSink, draw
from torch_rmt.sinks.spectra_tab import tab_record
from torch_rmt.tensorboard_plugin.plugin import MOST_STEPS, PLUGIN_NAME, SpectraLoader

ROOT = f"/data/plugin/{PLUGIN_NAME}"
STATIC = Path(__file__).resolve().parents[2] / "torch_rmt" / "tensorboard_plugin" / "static"
ODD = "hessian/<img src=x onerror=alert(1)>/näme&a=b?c#d%20 \"'"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
STEPS = range(0, 260, 10)  # more than TensorBoard keeps of a tensor it does not know
REPORTS = {
    "hessian": semicircle_with_outlier(),
    "jacobian/wide": wide_gaussian(),
    ODD: dataclasses.replace(law_in_pieces(), name=ODD),
}


def served(folder: Path, *arguments: str) -> Any:
    """TensorBoard's WSGI application over a log directory, its events read once."""
    from tensorboard import default, program
    from tensorboard.backend import application
    from tensorboard.backend.event_processing import data_ingester

    board = program.TensorBoard(plugins=[*default.get_static_plugins(), SpectraLoader()])
    board.configure(
        ("", "--logdir", str(folder), "--load_fast=false", "--reload_interval=0", "--reload_task=blocking", *arguments)
    )
    ingester = data_ingester.LocalDataIngester(board.flags)
    ingester.start()
    return application.TensorBoardWSGIApp(board.flags, board.plugin_loaders, ingester.data_provider)


@contextmanager
def listening(application: Any) -> Iterator[str]:
    """The application on a port of this machine; its address."""
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def get(client: Client, path: str, **query: str) -> Any:
    return client.get(path, query_string=query)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    runs = {"one": list(REPORTS.values()), "deep/<b>two</b> & più": [REPORTS["hessian"]]}
    with pytest.MonkeyPatch.context() as patch:
        # Figures take the most time, and have tests of their own.
        patch.setattr("torch_rmt.sinks.tensorboard.figure", lambda *_: None)
        patch.setattr("torch_rmt.sinks.tensorboard.rgb", lambda _: np.zeros((1, 1, 3), dtype=np.uint8))
        for run, reports in runs.items():
            sink = TensorBoardSink(folder / run)
            for step in STEPS if run == "one" else [0]:
                for report in reports:
                    sink.write(dataclasses.replace(report, verdict=f"{report.verdict} At {step}."), step)
            sink.close()
    return folder


@pytest.fixture(scope="module")
def client(logs: Path) -> Client:
    return Client(served(logs))


def test_the_tab_is_listed_as_active(client: Client) -> None:
    listed = get(client, "/data/plugins_listing").json[PLUGIN_NAME]
    assert listed["enabled"]
    assert listed["tab_name"] == "Spectra"
    assert listed["loading_mechanism"] == {"type": "IFRAME", "module_path": f"{ROOT}/static/index.js"}
    assert "static/index.js" in get(client, "/data/plugin_entry.html", name=PLUGIN_NAME).text


def test_runs_and_their_spectra_are_listed(client: Client) -> None:
    answer = get(client, f"{ROOT}/runs").json
    assert answer["most_steps"] == MOST_STEPS
    assert set(answer["runs"]) == {"one", "deep/<b>two</b> & più"}
    assert {(known["name"], known["last_step"]) for known in answer["runs"]["one"]} == {(n, 250) for n in REPORTS}
    (other,) = answer["runs"]["deep/<b>two</b> & più"]
    assert (other["name"], other["last_step"]) == ("hessian", 0)


@pytest.mark.parametrize("name", list(REPORTS), ids=["law", "zeros", "odd name"])
def test_a_series_is_the_drawings_of_all_steps(client: Client, name: str) -> None:
    (tag,) = [k["tag"] for k in get(client, f"{ROOT}/runs").json["runs"]["one"] if k["name"] == name]
    answer = get(client, f"{ROOT}/series", run="one", tag=tag)
    assert answer.status_code == 200
    assert "nan" not in answer.text.lower().replace(json.dumps(name)[1:-1].lower(), "")
    series = answer.json
    assert (series["run"], series["tag"], series["skipped"]) == ("one", tag, 0)
    assert [point.pop("step") for point in series["points"]] == list(STEPS)
    times = [point.pop("wall_time") for point in series["points"]]
    assert times == sorted(times)
    report = REPORTS[name]
    for step, point in zip(STEPS, series["points"], strict=True):
        expected = dataclasses.replace(report, verdict=f"{report.verdict} At {step}.")
        assert point == json.loads(json.dumps(tab_record(expected, draw(report))))


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({"run": "three", "tag": "hessian/beside_its_law"}, 404),
        ({"run": "one", "tag": "hessian"}, 404),
        ({"run": "one", "tag": "hessian/eigenvalues"}, 404),
        ({"run": "one"}, 400),
        ({}, 400),
    ],
    ids=["no run", "no tag", "another plugin's tag", "tag not said", "nothing said"],
)
def test_what_is_missing_is_said(client: Client, query: dict[str, str], status: int) -> None:
    answer = get(client, f"{ROOT}/series", **query)
    assert answer.status_code == status
    assert answer.mimetype == "text/plain"


def test_files_are_served_and_nothing_beside_them(client: Client) -> None:
    for file in STATIC.iterdir():
        answer = get(client, f"{ROOT}/static/{file.name}")
        assert answer.data == file.read_bytes()
        assert answer.mimetype == {".js": "text/javascript", ".css": "text/css"}[file.suffix]
    for path in ("static/../plugin.py", "static/%2e%2e/plugin.py", "static/", "plugin.py"):
        assert get(client, f"{ROOT}/{path}").status_code == 404


def test_a_log_directory_without_spectra_leaves_the_tab_inactive(tmp_path: Path) -> None:
    client = Client(served(tmp_path))
    assert not get(client, "/data/plugins_listing").json[PLUGIN_NAME]["enabled"]
    assert get(client, f"{ROOT}/runs").json["runs"] == {}
    assert "No spectra here yet" in (STATIC / "index.js").read_text(encoding="utf-8")


def test_the_users_number_of_steps_counts(logs: Path) -> None:
    client = Client(served(logs, f"--samples_per_plugin={PLUGIN_NAME}=5,images=1"))
    points = get(client, f"{ROOT}/series", run="one", tag="hessian/beside_its_law").json["points"]
    assert len(points) == 5
    assert points[-1]["step"] == 250
    everything = Client(served(logs, f"--samples_per_plugin={PLUGIN_NAME}=0"))
    points = get(everything, f"{ROOT}/series", run="one", tag="hessian/beside_its_law").json["points"]
    assert len(points) == len(STEPS)


def test_tensorboard_finds_the_tab_by_its_entry_point() -> None:
    (found,) = [e for e in entry_points(group="tensorboard_plugins") if e.name == PLUGIN_NAME]
    assert found.load().__name__ == "SpectraLoader"


def test_the_page_asks_no_one_else_and_reads_no_text_as_html() -> None:
    dangerous = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|@import|url\("
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8")
        assert re.findall(r"https?://[^'\"\s]+", text) in ([], ["http://www.w3.org/2000/svg"])
        assert not re.search(dangerous, text)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium to look with")
def test_a_browser_shows_every_run(logs: Path, tmp_path: Path) -> None:
    with listening(served(logs)) as address:
        page = subprocess.run(
            [BROWSER or "", "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000",
             f"--user-data-dir={tmp_path}", "--dump-dom", f"{address}/data/plugin_entry.html?name={PLUGIN_NAME}"],
            capture_output=True, text=True, check=True, timeout=120,
        ).stdout  # fmt: skip
    # The first spectrum by name is the Hessian: both runs have it, the second at step 0 only.
    assert page.count("<article") == 2
    drawing = draw(REPORTS["hessian"])
    shown = int((drawing.heights > 0).sum())
    pictures = page.split("<article")[1:]
    assert [len(re.findall(r'<rect class="bar"', picture)) for picture in pictures] == [shown, shown]
    assert [len(re.findall(r'<polyline class="law"', picture)) for picture in pictures] == [1, 1]
    assert [picture.count('class="outlier"') for picture in pictures] == [1, 1]
    assert "stands &lt;far&gt; beyond the edge &amp; is no noise. At 250." in page
    assert "At 0." in page
    assert page.count('<circle class="dot departs"') == len(STEPS) + 1
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "<img" not in page
    assert "&lt;b&gt;two&lt;/b&gt; &amp; più" in page
