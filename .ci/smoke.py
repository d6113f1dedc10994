"""Run from outside the repository against a wheel without extras: import, initialise, diagnose, monitor."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch

import torch_rmt as rmt
from torch_rmt.callbacks import SpectralMonitor

assert "site-packages" in (rmt.__file__ or ""), rmt.__file__
assert importlib.util.find_spec("matplotlib") is None, "the smoke test is about an install without extras"
assert (Path(rmt.__file__).parent / "py.typed").is_file()

torch.manual_seed(0)
layers = [m for _ in range(8) for m in (torch.nn.Linear(16, 16), torch.nn.Tanh())]
model = torch.nn.Sequential(*layers, torch.nn.Linear(16, 4))
x, y = torch.randn(32, 16), torch.randint(0, 4, (32,))
print(rmt.critical_init_(model, x))
print(rmt.diagnose(model, (x, y), torch.nn.functional.cross_entropy).scalars())


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.loss = model, torch.nn.CrossEntropyLoss()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
with tempfile.TemporaryDirectory() as folder:
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[SpectralMonitor()],
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(), loader)
    assert any(Path(folder).rglob("events.out.tfevents*")), "TensorBoard logs are written by default"
print("smoke test passed")
