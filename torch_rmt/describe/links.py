"""The weights of a recorded pass in their order, each with what lies before it."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from torch_rmt.describe.activation import from_torch
from torch_rmt.describe.forward_graph import ForwardGraph, WeightUse
from torch_rmt.describe.stretch import Stretch, stretch_to
from torch_rmt.theory import Activation, Layer

_GRID = np.linspace(-7.3, 7.3, 401)


@dataclass(frozen=True)
class Link:
    """A weight with what came before it.

    Fields:
        use: the weight.
        before: what lies between it and the weight (or the end) that it follows.
        activation: the elementwise map of `before`; None for the identity or where it was not understood.
        parent: index of the link that it follows in `read_links`; None at an input or a gap.
    """

    use: WeightUse
    before: Stretch
    activation: Activation | None
    parent: int | None


def read_links(graph: ForwardGraph) -> list[Link]:
    """Every use of a weight in the order of the calls, each with what precedes it."""
    stops = {use.output for use in graph.weights} | set(graph.inputs)
    place = {use.output: i for i, use in enumerate(graph.weights)}
    links = []
    for use in graph.weights:
        before = stretch_to(graph, use.input, stops)
        understood, activation = activation_of(before)
        parent = place.get(before.source) if understood.problems == () else None
        links.append(Link(use, understood, activation, parent))
    return links


@dataclass(frozen=True)
class Way:
    """The weights between two tensors.

    Fields:
        first: activation of the tensor where the way starts; None for the identity.
        first_stretch: the same as a stretch.
        links: the weights in order, each with the stretch that *follows* it.
        notes: what was passed over.
    """

    first: Activation | None
    first_stretch: Stretch
    links: tuple[tuple[WeightUse, Stretch, Activation | None], ...]
    notes: tuple[str, ...]


def way_of(graph: ForwardGraph, module: nn.Module, source: str | None, target: str | None) -> Way:
    """The way from one module's output to another's; None is the network's input or output.

    Raises:
        ValueError: something on the way was not understood, or a name is wrong.
    """
    start = start_of(graph, module, source)
    way = way_between(graph, start, graph.output if target is None else output_number(graph, module, target))
    if isinstance(way, str):
        first, last = source or "the input", target or "the output"
        raise ValueError(f"the way from {first} to {last} was not understood: {way}")
    return way


def start_of(graph: ForwardGraph, module: nn.Module, source: str | None) -> int:
    """Number of the tensor where a way begins."""
    return graph.inputs[0] if source is None else output_number(graph, module, source)


def way_between(graph: ForwardGraph, start: int, end: int) -> Way | str:
    """Follow the end back to the start, weight by weight; a string says why that cannot be done."""
    stops = {use.output for use in graph.weights} | set(graph.inputs) | {start}
    found: list[tuple[WeightUse, Stretch, Activation | None]] = []
    notes: list[str] = []
    current = end
    while True:
        before, activation = activation_of(stretch_to(graph, current, stops))
        notes += before.notes
        if before.problems:
            return "; ".join(before.problems)
        if before.source == start:
            return Way(activation, before, tuple(found), tuple(dict.fromkeys(notes)))
        use = graph.weight_of(before.source)
        if use is None:
            return "the source does not lie on the way to the target"
        if use.note:
            notes.append(f"{use.name}: {use.note}")
        found.insert(0, (use, before, activation))
        current = use.input


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


def output_number(graph: ForwardGraph, module: nn.Module, name: str) -> int:
    """The number of a module's output; "name#2" is that of its second call.

    Raises:
        ValueError: no such module, it is not called, or it is called several times and the name says not which.
    """
    plain, _, call = name.partition("#")
    module = getattr(module, "_orig_mod", module)
    modules = dict(module.named_modules(remove_duplicate=False))
    names = [n for n in modules if n]
    if plain in names:
        first = next(n for n, m in modules.items() if m is modules[plain])  # of a module with two names
        numbers = graph.module_outputs.get(first, [])
        if not numbers:
            raise ValueError(f"module {name!r} returns no tensor or is not called in this forward pass")
        if len(numbers) > 1 and not call:
            raise ValueError(f"module {name!r} is called {len(numbers)} times; say which, as in '{name}#1'")
        if call and not (call.isdigit() and 1 <= int(call) <= len(numbers)):
            raise ValueError(f"{name!r}: module {plain!r} is called {len(numbers)} times")
        return numbers[int(call) - 1 if call else 0]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:5]
    raise ValueError(f"no module is called {name!r}; nearest: {', '.join(map(repr, near)) or 'there are none'}")


def names_of(graph: ForwardGraph) -> dict[int, str]:
    """Module names by the number of their output; the outermost of several, the network itself left out."""
    names: dict[int, str] = {}
    for name, numbers in graph.module_outputs.items():
        for call, number in enumerate(numbers, start=1):
            if name and (number not in names or len(name) < len(names[number])):
                names[number] = name if len(numbers) == 1 else f"{name}#{call}"
    return names


def _is_orthogonal(use: WeightUse) -> bool:
    """Whether W W^T or W^T W is a multiple of the identity, by its action on four random vectors."""
    weight = use.weight.double()
    if use.kind == "conv":
        centre = tuple(k // 2 for k in weight.shape[2:])
        index: tuple[slice | int, ...] = (slice(None), slice(None), *centre)
        tap = weight[index]
        if use.groups > 1 or float(weight.square().sum() - tap.square().sum()) > 1e-6 * float(tap.square().sum()):
            return False
        weight = tap
    if weight.shape[0] > weight.shape[1]:
        weight = weight.T
    probes = torch.randn(weight.shape[0], 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probes = probes.to(weight.device)
    image = weight @ (weight.T @ probes)
    scale = float((image * probes).sum() / probes.square().sum())
    return scale > 0 and float((image - scale * probes).norm()) < 1e-3 * scale * float(probes.norm())


_seen: dict[bytes, Activation] = {}


def activation_of(before: Stretch) -> tuple[Stretch, Activation | None]:
    """The activation of a stretch; None for the identity. A function theory cannot take becomes a problem."""
    if before.function is None:
        return before, None
    with torch.no_grad():
        key = before.function(torch.tensor(_GRID)).numpy().tobytes()
    if key not in _seen:
        try:
            _seen[key] = from_torch(before.function, "activation")
        except (ValueError, TypeError) as error:
            return replace(before, function=None, problems=(*before.problems, str(error)), dropout=0.0), None
    activation = _seen[key]
    return before, None if activation.name == "linear" else activation
