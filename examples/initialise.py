"""Make a deep network trainable: see where its gradients go, then draw its weights at the critical point.

python examples/initialise.py
"""

from __future__ import annotations

import torch
from rich import print
from torch import nn

import torch_rmt as rmt
from torch_rmt.theory import critical_point, mean_field


def main() -> None:
    torch.manual_seed(0)
    hidden = [m for _ in range(30) for m in (nn.Linear(128, 128), nn.Tanh())]
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), *hidden, nn.Linear(128, 10))
    x = torch.randn(64, 64)

    architecture = rmt.describe(model, x)
    layer = architecture.layers[5]
    found = mean_field("tanh", layer.sigma_w, layer.sigma_b)
    print(f"as PyTorch draws it: sigma_w = {layer.sigma_w:.3f}, chi = {found.chi:.3f}, {found.phase} phase")
    point = critical_point("tanh", sigma_b=0.05)
    print(f"critical, with sigma_b = 0.05: sigma_w = {point.sigma_w:.3f}")

    report = rmt.critical_init_(model, x)
    print(report.verdict)


if __name__ == "__main__":
    main()
