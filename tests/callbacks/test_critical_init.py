from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from tests.callbacks.runs import Classifier, blobs, differences, fit, mlp
from torch_rmt.callbacks import CriticalInit, JacobianSpectrum
from torch_rmt.init import critical_init_


def deep(depth: int = 20, width: int = 24) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(12, width), nn.Tanh()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


class Snapshots(Classifier):
    """Keeps the weights that the first step starts from, and all batches."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if not self.losses:
            self.at_start = {k: v.clone() for k, v in self.net.state_dict().items()}
            self.batches: list[torch.Tensor] = []
        self.batches.append(batch[0].clone())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("seed", [0, 1])
def test_weights_are_critical_before_the_first_step(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    module = Snapshots(deep())
    before = {k: v.clone() for k, v in module.net.state_dict().items()}
    callback = CriticalInit()
    fit(module, [callback], logger=CSVLogger(tmp_path), seed=seed, epochs=1)
    assert callback.report is not None
    assert callback.report.chi_before < 0.5
    assert callback.report.chi_after == pytest.approx(1.0, abs=0.05)
    assert len(differences(before, module.at_start)) == len(before)
    for k, v in module.at_start.items():
        if k.endswith("weight") and v.shape == (24, 24):
            gram = v @ v.T / v.square().sum() * 24
            torch.testing.assert_close(gram, torch.eye(24), atol=1e-4, rtol=0)
    (path,) = tmp_path.rglob("metrics.csv")
    assert "critical_init/chi_after" in path.read_text().splitlines()[0]


def test_the_monitor_measures_after_it_whatever_the_order() -> None:
    kept: list[Any] = []

    class Keep:
        def write(self, report: Any, step: int) -> None:
            kept.append((step, report))

    for order in (lambda a, b: [a, b], lambda a, b: [b, a]):
        torch.manual_seed(0)
        init, monitor = CriticalInit(), JacobianSpectrum(sinks=[Keep()], max_seconds=1e9)
        fit(Snapshots(deep()), order(init, monitor), epochs=1)
    first = [report for step, report in kept if step == 0]
    assert [r.scalars()["mean"] for r in first] == [pytest.approx(1.0, rel=0.5)] * 2


@pytest.mark.parametrize("own_generator", [False, True])
def test_the_order_of_the_batches_stays(own_generator: bool) -> None:
    """With the weights drawn by hand instead, from the same random state, the run is the same."""

    def loader() -> DataLoader:
        generator = torch.Generator().manual_seed(5) if own_generator else None
        return DataLoader(blobs(), batch_size=16, shuffle=True, generator=generator)

    example = blobs().tensors[0][:16]
    torch.manual_seed(3)
    by_callback = Classifier(mlp())
    fit(by_callback, [CriticalInit(example_input=example)], data=loader(), seed=3)
    torch.manual_seed(3)
    from_batch = Snapshots(mlp())
    fit(from_batch, [CriticalInit()], data=loader(), seed=3)

    class ByHand(Snapshots):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if not self.losses:
                critical_init_(self, example)

    torch.manual_seed(3)
    by_hand = ByHand(mlp())
    fit(by_hand, [], data=loader(), seed=3)
    assert differences(by_hand.state_dict(), by_callback.state_dict()) == []
    # The example differs, hence the first layer's scale; the batches and all other weights are drawn alike.
    assert len(from_batch.batches) == len(by_hand.batches)
    assert all(torch.equal(a, b) for a, b in zip(from_batch.batches, by_hand.batches, strict=True))
    assert from_batch.losses[0] == pytest.approx(by_hand.losses[0], rel=0.2)


def test_a_resumed_run_keeps_its_weights(tmp_path: Path) -> None:
    import pytorch_lightning as pl

    torch.manual_seed(0)
    trainer = fit(Classifier(mlp()), [CriticalInit()], epochs=1)
    trainer.save_checkpoint(tmp_path / "with.ckpt")
    torch.load(tmp_path / "with.ckpt", weights_only=True)
    torch.manual_seed(0)
    trainer = fit(Classifier(mlp()), [], epochs=1)
    trainer.save_checkpoint(tmp_path / "without.ckpt")

    def resume(name: str, callbacks: list[Any]) -> dict[str, torch.Tensor]:
        module = Snapshots(mlp())
        settings = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        again = pl.Trainer(max_epochs=2, callbacks=callbacks, logger=False, accelerator="cpu", **settings)
        again.fit(module, DataLoader(blobs(), batch_size=16), ckpt_path=str(tmp_path / name))
        return module.at_start

    for name in ("with.ckpt", "without.ckpt"):
        saved = torch.load(tmp_path / name, weights_only=True)["state_dict"]
        if name == "with.ckpt":
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="CriticalInit")
                start = resume(name, [CriticalInit()])
        else:
            with pytest.warns(RuntimeWarning, match="resumed from step 3"):
                start = resume(name, [CriticalInit()])
        assert differences({k.removeprefix("net."): v for k, v in saved.items()}, start) == []


def test_bf16_weights_are_drawn_too() -> None:
    torch.manual_seed(0)
    callback = CriticalInit()
    fit(Classifier(deep()), [callback], precision="bf16-true", epochs=1)
    assert callback.report is not None
    assert callback.report.chi_after == pytest.approx(1.0, abs=0.1)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        CriticalInit(sigma_b=0.1, q_star=0.2)
    with pytest.raises(ValueError, match="no module 'nett'"):
        fit(Classifier(mlp()), [CriticalInit(model="nett")])
