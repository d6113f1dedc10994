"""Spectra in a loop of your own, no trainer: diagnose() now and then, reports to a file and a page.

python examples/plain_loop.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import torch_rmt as rmt
from torch_rmt.callbacks import logarithmic_then_regular
from torch_rmt.sinks import JsonLinesSink


def main() -> None:
    torch.manual_seed(0)
    hidden = [m for _ in range(8) for m in (nn.Linear(32, 32), nn.Tanh())]
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), *hidden, nn.Linear(32, 4))
    x = torch.randn(512, 16)
    y = (x[:, :4] + 0.5 * x[:, 4:8]).argmax(1)
    loss_fn = nn.CrossEntropyLoss()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    out = Path(tempfile.mkdtemp(prefix="torch_rmt-"))
    sink = JsonLinesSink(out / "spectra.jsonl")
    for step in range(81):
        batch = torch.randint(0, 512, (64,))
        if logarithmic_then_regular(step):
            # The Hessian beside the free sum of its parts costs most: leave it for the end.
            found = rmt.diagnose(model, (x[batch], y[batch]), loss_fn, what=("jacobian", "fisher"))
            for report in found.reports:
                sink.write(report, step)
            top = found.scalars()["fisher/largest_eigenvalue"]
            print(f"step {step}: top Fisher eigenvalue {top:.3g}, gradient ratio {found.gradient_ratio:.3g}")
        optimiser.zero_grad()
        loss = loss_fn(model(x[batch]), y[batch])
        loss.backward()
        optimiser.step()
    print(f"loss {loss.item():.3f}")
    print(f"spectra: {sink.path}")
    diagnosis = rmt.diagnose(model, (x[:64], y[:64]), loss_fn)
    print(f"page: {diagnosis.to_html(out / 'last.html')}")


if __name__ == "__main__":
    main()
