"""Training with a callback leaves behind, bit for bit, what training without it leaves behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from tests.callbacks.runs import Classifier, differences, everything, fit, mlp, norm_and_dropout
from tests.cases import CALLBACKS

NETWORKS = {"mlp": mlp, "norm and dropout": norm_and_dropout}


def _run(net: Callable[[], nn.Module], callbacks: list[Any], folder: Path, seed: int, **settings: Any) -> Any:
    torch.manual_seed(seed)
    module = Classifier(net())
    with warnings.catch_warnings():
        # A measurement that fails would leave the run undisturbed too.
        warnings.filterwarnings("error", category=RuntimeWarning, message=".*Spectr")
        warnings.filterwarnings("error", category=RuntimeWarning, message=".*Curvature")
        loggers = settings.pop("logger", CSVLogger(folder))
        trainer = fit(module, callbacks, seed=seed, logger=loggers, **settings)
    return everything(trainer, module)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("net", NETWORKS.values(), ids=NETWORKS)
def test_all_three_spectra(net: Callable[[], nn.Module], precision: Any, tmp_path: Path) -> None:
    monitor = CALLBACKS["SpectralMonitor"](schedule=lambda step: step == 2, max_seconds=1e9)
    without = _run(net, [], tmp_path / "without", 1, precision=precision)
    within = _run(net, [monitor], tmp_path / "with", 1, precision=precision)
    assert differences(without, within) == []
    assert len(monitor.latest) == 3


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("seed", [2])
def test_every_callback(name: str, seed: int, tmp_path: Path) -> None:
    callback = CALLBACKS[name](schedule=lambda step: step == 3, max_seconds=1e9)
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")]
    without = _run(norm_and_dropout, [], tmp_path / "without", seed)
    within = _run(norm_and_dropout, [callback], tmp_path / "with", seed, logger=loggers)
    assert differences(without, within) == []
    assert callback.latest


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"max_steps": 4}])
def test_trainer_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    monitor = CALLBACKS["CurvatureSpectrum"](what=["fisher"], schedule=lambda step: step == 2, max_seconds=1e9)
    without = _run(norm_and_dropout, [], tmp_path / "without", 4, **settings)
    within = _run(norm_and_dropout, [monitor], tmp_path / "with", 4, **settings)
    assert differences(without, within) == []


class _Rude(pl.Callback):
    """Draws one random number: what the comparison must notice."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.rand(1)


def test_the_comparison_notices_a_single_random_number(tmp_path: Path) -> None:
    without = _run(norm_and_dropout, [], tmp_path / "without", 5)
    within = _run(norm_and_dropout, [_Rude()], tmp_path / "with", 5)
    found = differences(without, within)
    assert any("losses" in path for path in found)
    assert any("weights" in path for path in found)
    assert any("torch rng" in path for path in found)
