"""From what was read of a way to theory's layers and residual blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from torch_rmt.describe.elements import Norm, Scale
from torch_rmt.describe.forward_graph import ForwardGraph, WeightUse
from torch_rmt.describe.links import Block, Way
from torch_rmt.describe.stretch import Stretch
from torch_rmt.measures import Discrete, PointMass
from torch_rmt.theory import Activation, Layer, Residual

Item = Layer | Residual
_ONE = 0.1  # relative variance of a diagonal's squares up to which it counts as one number; a weight and ReLU have 2
_NODES = 32  # of the measured law of a diagonal


def layers_on(graph: ForwardGraph, way: Way, start: int, *, measured: bool = True) -> list[Item]:
    """Theory's layers and blocks on a way from tensor `start`; with `measured`, each with its q and share of taps.

    A layer takes up the norm, the activation and the dropout behind its weight. What has no weight in front of it, and
    a diagonal that is no multiple of the identity, is a layer of its own with a law as its weight: the slopes behind
    a residual sum too, as measured (without `measured`, the block has the activation).
    """
    chain = _Chain(graph, graph.size(start), measured)
    chain.activate(way.first, way.first_stretch.dropout, start)
    for step, following, activation in way.links:
        if isinstance(step, WeightUse):
            if measured and step.read < 1.0:  # a projection on the places that it reads comes first
                read = max(1, round(chain.width * step.read))
                chain.items.append(
                    Layer(chain.width, read, None, 1.0, ensemble="orthogonal", name=f"{step.name} reads")
                )
            layer = layer_of(graph, step, None, chain.width)
            kept = math.sqrt(step.kept) if measured else 1.0
            chain.items.append(replace(layer, sigma_w=layer.sigma_w * kept))
        elif isinstance(step, Norm):
            chain.normalise(step)
        elif isinstance(step, Scale):
            chain.scale(step.name, step.factor)
        else:
            chain.join(step)
        if isinstance(step, Block) and activation is not None and measured and chain.measured_slopes(step, following):
            continue
        chain.activate(activation, following.dropout, step.output)
    return chain.items


class _Chain:
    """Items under construction; the last one takes up what it still can."""

    def __init__(self, graph: ForwardGraph, width: int, measured: bool) -> None:
        self.graph, self.start_width, self.measured = graph, width, measured
        self.items: list[Item] = []

    @property
    def width(self) -> int:
        return self.items[-1].n_out if self.items else self.start_width

    def q(self, number: int) -> float | None:
        return self.graph.mean_square.get(number) if self.measured else None

    def open(self) -> Item:
        """The last item if nothing follows its weight but a norm; else a new identity."""
        if self.items and self.items[-1].activation is None and self.items[-1].dropout == 0:
            return self.items.pop()
        return _identity(self.width, 1.0, "")

    def activate(self, activation: Activation | None, dropout: float, number: int) -> None:
        if activation is None and dropout == 0:
            return
        item = self.open()
        q = item.q if item.normalisation is not None else self.q(number) if activation is not None else item.q
        name = item.name or ("" if self.items else "source")
        self.items.append(replace(item, activation=activation, dropout=dropout, q=q, name=name))

    def normalise(self, norm: Norm) -> None:
        item = self.open()
        if item.normalisation is not None or isinstance(item, Residual):
            self.items.append(item)
            item = _identity(self.width, 1.0, norm.name)
        self.items.append(replace(item, normalisation=norm.kind, q=self.q(norm.input), name=item.name or norm.name))
        if norm.scale is not None:
            self.scale(norm.name, norm.scale)

    def scale(self, name: str, factor: Tensor) -> None:
        squares = np.asarray(factor.cpu().square().flatten().numpy(), dtype=np.float64)
        mean = float(squares.mean())
        if squares.var() > _ONE * mean**2:
            nodes = np.quantile(squares, (np.arange(_NODES) + 0.5) / _NODES) if squares.size > _NODES else squares
            law = Discrete(nodes * (mean / nodes.mean()))
            self.items.append(Layer(self.width, self.width, None, 1.0, ensemble=law, name=name))
            return
        if mean == 1.0:
            return
        last = self.items[-1] if self.items else None
        plain = isinstance(last, Layer) and last.activation is None and last.dropout == 0 and last.normalisation is None
        if plain and isinstance(last, Layer) and isinstance(last.ensemble, str):
            root = math.sqrt(mean)
            self.items[-1] = replace(last, sigma_w=last.sigma_w * root, sigma_b=last.sigma_b * root)
        elif plain and isinstance(last, Layer) and isinstance(last.ensemble, PointMass):
            self.items[-1] = replace(last, ensemble=PointMass(last.ensemble.mean * mean), sigma_w=1.0)
        else:
            self.items.append(_identity(self.width, mean, name))

    def join(self, block: Block) -> None:
        branch = layers_on(self.graph, block.branch, block.input, measured=self.measured)
        shortcut = layers_on(self.graph, block.shortcut, block.input, measured=self.measured)
        if not branch or _silent(branch):
            self.items += shortcut
            return
        plain = tuple(item for item in shortcut if isinstance(item, Layer))
        if len(plain) < len(shortcut):
            raise ValueError(f"{block.name}: both branches hold sums of branches; theory has no law for that")
        q = self.q(block.output)
        self.items.append(Residual(tuple(branch), plain, None, q, block.name))

    def measured_slopes(self, block: Block, following: Stretch) -> bool:
        """Put the measured law of its slopes behind a sum: the values of a sum are neither centred nor Gaussian.

        A block behind a ReLU adds to what is never negative, and opens two units of three in the place of every other.
        """
        number = block.output
        value = self.graph.values.get(number, self.graph.samples.get(number))
        if value is None or following.function is None:
            return False
        squares = slopes_at(following.function, value).square().cpu().numpy()
        if np.unique(squares.round(12)).size <= 8:
            places, numbers = np.unique(squares.round(12), return_counts=True)
            counts = numbers.astype(np.float64)
        else:
            places, counts = np.quantile(squares, (np.arange(_NODES) + 0.5) / _NODES), np.ones(_NODES)
            places = places * (squares.mean() / places.mean())
        law = Discrete(places, counts / counts.sum())
        slopes = Layer(self.width, self.width, None, 1.0, ensemble=law, name=f"after {block.name}")
        self.items.append(replace(slopes, dropout=following.dropout))
        return True


_FEW_ROWS = 8


def slopes_at(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Derivative of an elementwise map at every entry, flat and in float64."""
    h = value.detach().double().flatten().requires_grad_()
    with torch.enable_grad():
        (slopes,) = torch.autograd.grad(function(h).sum(), h)
    return slopes


def _identity(width: int, square: float, name: str) -> Layer:
    return Layer(width, width, None, 1.0, ensemble=PointMass(square), name=name)


def _silent(branch: list[Item]) -> bool:
    """Whether a branch is zero at the end, as with a last norm or a LayerScale that begins at zero."""
    return any(
        isinstance(item, Layer)
        and (item.ensemble.mean == 0 if isinstance(item.ensemble, PointMass | Discrete) else item.sigma_w == 0)
        for item in branch
    )


def layer_of(graph: ForwardGraph, use: WeightUse, activation: Activation | None, n_in: int | None = None) -> Layer:
    """The theory's layer for a weight and the activation that follows it."""
    weight = use.weight.double()
    sigma_w = math.sqrt(float(weight.square().mean()) * use.fan_in)
    sigma_b = 0.0 if use.bias is None else math.sqrt(float(use.bias.double().square().mean()))
    return Layer(
        n_in=graph.size(use.input) if n_in is None else n_in,
        n_out=graph.size(use.output),
        activation=activation,
        sigma_w=sigma_w,
        sigma_b=sigma_b,
        ensemble="orthogonal" if _is_orthogonal(use) else "gaussian",
        name=use.name,
    )


def _is_orthogonal(use: WeightUse) -> bool:
    """Whether W W^T or W^T W is nearer to a multiple of the identity than to that of a Gaussian weight.

    By its action on four random vectors p: E|W W^T p - s p|^2 / |s p|^2 is 0 for the one and rows / columns for the
    other. Half precision, and the first steps of training, leave an orthogonal weight one.
    """
    weight = use.weight.double()
    if use.kind == "conv":
        centre = tuple(k // 2 for k in weight.shape[2:])
        index: tuple[slice | int, ...] = (slice(None), slice(None), *centre)
        tap = weight[index]
        if use.groups > 1 or float(weight.square().sum() - tap.square().sum()) > 0.1 * float(tap.square().sum()):
            return False
        weight = tap
    if weight.shape[0] > weight.shape[1]:
        weight = weight.T
    probes = torch.randn(weight.shape[0], 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probes = probes.to(weight.device)
    image = weight @ (weight.T @ probes)
    scale = float((image * probes).sum() / probes.square().sum())
    # Of fewer rows a Gaussian weight may by chance be nearly orthogonal.
    nearest = 0.5 * math.sqrt(weight.shape[0] / weight.shape[1]) if weight.shape[0] >= _FEW_ROWS else 1e-2
    return scale > 0 and float((image - scale * probes).norm()) < nearest * scale * float(probes.norm())
