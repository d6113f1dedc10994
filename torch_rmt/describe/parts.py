"""The factors of a chain's Jacobian as they are now: every weight as a linear map, every activation's slopes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_rmt.describe.forward_graph import Call, ForwardGraph, Ref, WeightUse, record
from torch_rmt.describe.links import output_number, way_between
from torch_rmt.describe.stretch import Stretch


@dataclass(frozen=True)
class WeightPart:
    """A weight alone: `module` maps `example`, one sample of its input, as the network does (its bias included)."""

    name: str
    n_in: int
    n_out: int
    module: nn.Module
    example: Tensor


@dataclass(frozen=True)
class SlopePart:
    """A diagonal factor: `slopes` are phi'(h) at the entries h of one sample, in float64.

    `dropout` is the probability that an active dropout behind it drops an entry; the slopes are without it.
    """

    name: str
    slopes: Tensor
    dropout: float = 0.0


class _Alone(nn.Module):
    """One recorded call as a module of its own."""

    def __init__(self, call: Call, graph: ForwardGraph, use: WeightUse) -> None:
        super().__init__()
        self.call = call
        self.input = use.input
        self.constants = {n: graph.tensors[n].detach() for n in call.inputs if n != use.input}

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.call.function(*self._fill(self.call.args, h), **self._fill(self.call.kwargs, h))
        return out

    def _fill(self, tree: Any, h: Tensor) -> Any:
        if isinstance(tree, Ref):
            return h if tree.number == self.input else self.constants[tree.number]
        if isinstance(tree, dict):
            return {key: self._fill(value, h) for key, value in tree.items()}
        if isinstance(tree, tuple | list):
            return type(tree)(self._fill(value, h) for value in tree)
        return tree


def parts_between(
    module: nn.Module, sample: Any, source: str | None = None, target: str | None = None
) -> tuple[WeightPart | SlopePart, ...]:
    """Take the Jacobian between two modules apart: J = D_L W_L ... D_1 W_1 (D_0 first, from a pre-activation).

    The parts are in the order in which a signal meets them. Ends as in `describe`.

    Args:
        sample: a batch of one.

    Raises:
        ValueError: something on the way was not understood, a name is wrong, or the batch is larger than one.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> [part.name for part in parts_between(net, torch.ones(1, 3))]
    ['0', 'after 0', '2']
    """
    after: list[Tensor] = []

    def keep(_use: WeightUse, call: Callable[[], Tensor]) -> Tensor:
        out = call()
        after.append(out.detach().clone())  # an activation may work in place
        return out

    graph = record(module, sample, on_weight=keep)
    if any(graph.shapes[n][:1] != (1,) for n in graph.inputs):
        raise ValueError("the Jacobian of one sample is taken apart: pass a batch of one, such as batch[0][:1]")
    values = {use.output: out for use, out in zip(graph.weights, after, strict=True)}
    start = graph.inputs[0] if source is None else output_number(graph, module, source)
    end = graph.output if target is None else output_number(graph, module, target)
    way = way_between(graph, start, end)
    if isinstance(way, str):
        first, last = source or "the input", target or "the output"
        raise ValueError(f"the way from {first} to {last} was not understood: {way}")
    parts: list[WeightPart | SlopePart] = []
    if way.first_stretch.function is not None or way.first_stretch.dropout > 0:
        value = values.get(start, graph.tensors[start])
        if not torch.equal(value.flatten()[:1024], graph.samples[start]):
            raise ValueError(f"the output of {source or 'the input'} is overwritten in place; name another source")
        parts.append(_slopes(f"after {source or 'the input'}", way.first_stretch, value))
    for use, following, _ in way.links:
        example = torch.zeros(graph.shapes[use.input], dtype=use.weight.dtype, device=use.weight.device)
        alone = _Alone(graph.calls[use.output], graph, use)
        parts.append(WeightPart(use.name, example.numel(), graph.size(use.output), alone, example))
        if following.function is not None or following.dropout > 0:
            parts.append(_slopes(f"after {use.name}", following, values[use.output]))
    return tuple(parts)


def _slopes(name: str, stretch: Stretch, value: Tensor) -> SlopePart:
    h = value.detach().double().flatten().requires_grad_()
    if stretch.function is None:
        return SlopePart(name, torch.ones_like(h).detach(), stretch.dropout)
    with torch.enable_grad():
        (slopes,) = torch.autograd.grad(stretch.function(h).sum(), h)
    return SlopePart(name, slopes, stretch.dropout)
