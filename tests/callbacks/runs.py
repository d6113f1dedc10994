"""Small Lightning runs for the callbacks to watch."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def blobs(samples: int = 48, features: int = 12, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, features, generator=generator)
    return TensorDataset(x, (x[:, :3].argmax(1)).long())


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    )


def norm_and_dropout() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3),
    )  # fmt: skip


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.loss_fn = nn.CrossEntropyLoss()
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss_fn(self(x), y)
        self.log("loss", loss)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(
    module: pl.LightningModule,
    callbacks: list[Any],
    *,
    seed: int = 0,
    logger: Any = False,
    data: Any = None,
    epochs: int = 2,
    checkpointing: bool = False,
    **settings: Any,
) -> pl.Trainer:
    """Train on 48 samples in batches of 16, shuffled."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global state is what the test watches
    random.seed(seed)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=logger,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=checkpointing,
        log_every_n_steps=1,
        **settings,
    )
    trainer.fit(module, data if data is not None else DataLoader(blobs(), batch_size=16, shuffle=True))
    return trainer


def everything(trainer: pl.Trainer, module: Any) -> dict[str, Any]:
    """All that a run leaves behind, to compare bit for bit."""
    return {
        "weights and buffers": {k: v.clone() for k, v in module.state_dict().items()},
        "gradients": {k: None if p.grad is None else p.grad.clone() for k, p in module.named_parameters()},
        "optimiser": trainer.optimizers[0].state_dict(),
        "losses": module.losses,
        "torch rng": torch.get_rng_state(),
        "numpy rng": np.random.get_state()[1],  # noqa: NPY002
        "python rng": random.getstate(),
        "modes": {k: m.training for k, m in module.named_modules()},
        "hooks": {k: (len(m._forward_hooks), len(m._forward_pre_hooks)) for k, m in module.named_modules()},
        "attributes": {k: sorted(vars(m)) for k, m in module.named_modules()},
        "flags": (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.benchmark,
        ),
    }


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """Paths at which two trees differ, NaN equal to NaN, nothing else forgiven."""
    if isinstance(left, Tensor):
        same = isinstance(right, Tensor) and left.dtype == right.dtype and left.shape == right.shape
        return [] if same and torch.equal(left.nan_to_num(123.0), right.nan_to_num(123.0)) else [where]
    if isinstance(left, np.ndarray):
        return [] if np.array_equal(left, right) else [where]
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return [f"{where}: keys"]
        return [d for k in left for d in differences(left[k], right[k], f"{where}/{k}")]
    if isinstance(left, (list, tuple)):
        if len(left) != len(right):
            return [f"{where}: length"]
        pairs = zip(left, right, strict=True)
        return [d for i, (a, b) in enumerate(pairs) for d in differences(a, b, f"{where}/{i}")]
    return [] if left == right or (left != left and right != right) else [where]
