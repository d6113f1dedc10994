"""A network of single samples that stands for one with batch normalisation in training mode."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_rmt.describe import unwrapped
from torch_rmt.guard import undisturbed


def with_batch_statistics(model: nn.Module, inputs: Any) -> nn.Module:
    """Return the model with every batch norm that is in training mode fixed at its statistics of this batch.

    The map from one sample to its output, the batch's means and variances held as the batch gave them: what the
    network does to that sample in training, less the O(1 / batch size) that the sample itself moves the statistics.
    Its Jacobian is a matrix of one sample, whichever others are in the batch. The parameters are the model's own; the
    model is left as it is, and is returned itself where it has no such norm.

    Raises:
        ValueError: the batch is too small for its statistics, or a norm is called more than once.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    >>> x = torch.randn(8, 4)
    >>> torch.allclose(with_batch_statistics(net, x)(x[:1]), net(x)[:1], atol=1e-6)
    True
    """
    inner = unwrapped(model)
    norms = {name: m for name, m in inner.named_modules() if isinstance(m, _BatchNorm) and m.training}
    if not norms:
        return model
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in norms}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            dims = [d for d in range(x.ndim) if d != 1]
            seen[name].append((x.mean(dims), x.var(dims, unbiased=False)))

        return hook

    with undisturbed(inner), torch.no_grad():
        handles = [module.register_forward_pre_hook(keep(name)) for name, module in norms.items()]
        try:
            args = inputs if isinstance(inputs, tuple | list) else () if isinstance(inputs, dict) else (inputs,)
            inner(*args, **(inputs if isinstance(inputs, dict) else {}))
        finally:
            for handle in handles:
                handle.remove()
    fixed = _shallow(inner, {})
    modules = dict(fixed.named_modules())
    for name, found in seen.items():
        if len(found) > 1:
            raise ValueError(
                f"{name}: one batch norm is called {len(found)} times, each with statistics of its own; call "
                "model.eval()"
            )
        for mean, variance in found:
            norm = modules[name]
            norm.training = False
            norm._buffers = {**norm._buffers, "running_mean": mean, "running_var": variance}
    return fixed


def _shallow(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """The tree of modules anew around the same parameters and buffers."""
    if id(module) not in done:
        done[id(module)] = fresh = copy.copy(module)
        fresh._parameters, fresh._buffers = dict(module._parameters), dict(module._buffers)
        fresh._modules = {n: m if m is None else _shallow(m, done) for n, m in module._modules.items()}
    return done[id(module)]
