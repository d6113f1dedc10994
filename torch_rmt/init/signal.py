"""How large signals and gradients are at every weight of a network, by one forward and one backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_rmt.describe import WeightUse, record


@dataclass(frozen=True)
class LayerSignal:
    """What one sample's signal looks like at the output of one weight.

    Fields:
        name: of the weight.
        q: mean square of the pre-activation.
        gradient: norm of the gradient by the pre-activation of a random unit combination of the outputs, the
            root mean square over samples.
    """

    name: str
    q: float
    gradient: float


def signals(module: nn.Module, example_input: Any, *, seed: int = 0) -> tuple[LayerSignal, ...]:
    """Measure q and the gradient norm at every use of a weight, in the order of the calls, undisturbed.

    The gradient is of sum_i u_i f_i, u uniform on the unit sphere for each sample, drawn from `seed`.

    Raises:
        TypeError: the output is not a floating-point tensor, or that of a weight is complex.
        ValueError: no weight was found.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    >>> [s.name for s in signals(net, torch.ones(1, 4))]
    ['0', '2']
    """
    probes: list[Tensor] = []

    def on_weight(use: WeightUse, call: Callable[[], Tensor]) -> Tensor:
        out = call()
        if out.is_complex():
            raise TypeError(
                f"the output of {use.name!r} is complex: signals and critical points are known for real ones"
            )
        probe = torch.zeros_like(out, requires_grad=True)
        probes.append(probe)
        return out + probe

    gradients: list[Tensor | None] = []
    samples = 1

    def differentiate(out: Tensor) -> None:
        nonlocal samples
        if not out.is_floating_point():
            raise TypeError(f"the output is of type {out.dtype}: gradients need a floating-point output")
        if not probes:
            raise ValueError("no weights were found: nn.Linear, nn.Conv and the functions behind them are read")
        samples = out.shape[0] if out.ndim > 1 else 1
        generator = torch.Generator().manual_seed(seed)
        u = torch.randn(samples, out.numel() // samples, generator=generator, dtype=torch.float64)
        u = u / u.norm(dim=1, keepdim=True)
        total = (out.reshape(samples, -1).double() * u.to(out.device)).sum()
        gradients.extend(torch.autograd.grad(total, probes, allow_unused=True))

    graph = record(module, example_input, on_weight=on_weight, differentiate=differentiate)
    return tuple(
        LayerSignal(
            use.name,
            graph.mean_square[use.output],
            0.0 if g is None else math.sqrt(float(g.double().square().sum()) / samples),
        )
        for use, g in zip(graph.weights, gradients, strict=True)
    )


def chi_per_layer(measured: Sequence[LayerSignal]) -> float:
    """Factor by which the squared gradient grows from one weight to the one before it, the geometric mean.

    chi = (|g_first|^2 / |g_last|^2)^(1 / (number of weights - 1)); NaN with fewer than two or with dead
    gradients.
    """
    if len(measured) < 2 or measured[0].gradient <= 0 or measured[-1].gradient <= 0:
        return math.nan
    ratio = measured[0].gradient / measured[-1].gradient
    return float(ratio ** (2 / (len(measured) - 1))) if math.isfinite(ratio) else math.nan


def gradient_ratio(measured: Sequence[LayerSignal]) -> float:
    """Gradient norm at the first weight over that at the last."""
    last = measured[-1].gradient
    return measured[0].gradient / last if last > 0 else math.inf
