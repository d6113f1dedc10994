"""The weights of a recorded pass in their order, each with what lies before it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from torch_rmt.describe.activation import from_torch
from torch_rmt.describe.elements import Element, Join, Norm, Scale, calls_between, elements_of
from torch_rmt.describe.forward_graph import ForwardGraph, WeightUse, unwrapped
from torch_rmt.describe.stretch import SHAPING, Stretch, stretch_to
from torch_rmt.theory import Activation

_GRID = np.linspace(-7.3, 7.3, 401)


@dataclass(frozen=True)
class Link:
    """A weight with what came before it.

    Fields:
        use: the weight.
        before: what lies between it and the element (a weight, norm, scale or join, or the input) that it follows.
        activation: the elementwise map of `before`; None for the identity or where it was not understood.
        parent: index of the link that it follows directly in `read_links`; None behind anything but a weight.
    """

    use: WeightUse
    before: Stretch
    activation: Activation | None
    parent: int | None


def read_links(graph: ForwardGraph) -> list[Link]:
    """Every use of a weight in the order of the calls, each with what precedes it."""
    stops = elements_of(graph).keys() | set(graph.inputs)
    place = {use.output: i for i, use in enumerate(graph.weights)}
    links = []
    for use in graph.weights:
        before = stretch_to(graph, use.input, stops)
        understood, activation = activation_of(before)
        parent = place.get(before.source) if understood.problems == () else None
        links.append(Link(use, understood, activation, parent))
    return links


@dataclass(frozen=True)
class Block:
    """A residual block: the join at its end, and the ways that come together there from where they part.

    The shortcut is the identity where it has no links; the branch is the other.
    """

    join: Join
    branch: Way
    shortcut: Way

    @property
    def name(self) -> str:
        """The module that adds."""
        return self.join.name

    @property
    def input(self) -> int:
        """Number of the tensor where the branches part."""
        return self.join.entry

    @property
    def output(self) -> int:
        """Number of the sum."""
        return self.join.output


Step = WeightUse | Norm | Scale | Block


@dataclass(frozen=True)
class Way:
    """What lies between two tensors.

    Fields:
        first: activation of the tensor where the way starts; None for the identity.
        first_stretch: the same as a stretch.
        links: weights, norms, scales and blocks in order, each with the stretch that *follows* it.
        notes: what was passed over.
    """

    first: Activation | None
    first_stretch: Stretch
    links: tuple[tuple[Step, Stretch, Activation | None], ...]
    notes: tuple[str, ...]

    @property
    def identity(self) -> bool:
        """Whether nothing happens on it."""
        return not self.links and self.first is None and self.first_stretch.dropout == 0

    def weights(self) -> Iterator[WeightUse]:
        """Every weight on the way, those inside blocks too."""
        for step, _, _ in self.links:
            if isinstance(step, WeightUse):
                yield step
            elif isinstance(step, Block):
                yield from step.shortcut.weights()
                yield from step.branch.weights()


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
    """Follow the end back to the start, element by element; a string says why that cannot be done."""
    elements = elements_of(graph)
    stops = elements.keys() | set(graph.inputs) | {start}
    found: list[tuple[Step, Stretch, Activation | None]] = []
    notes: list[str] = []
    current = end
    while True:
        before, activation = activation_of(stretch_to(graph, current, stops))
        notes += before.notes
        if before.problems:
            return "; ".join(before.problems)
        factor = None if before.function is None else _constant_slope(before.function)
        if factor is not None and factor != 1.0:
            where = next(c.where for c in calls_between(graph, before.source, current) if c.name not in SHAPING)
            one = torch.full((1,), factor, dtype=torch.float64)
            found.insert(0, (Scale(where, before.source, current, one), Stretch(-1, dropout=before.dropout), None))
            before = replace(before, function=None, dropout=0.0)
            activation = None
        if before.source == start:
            return Way(activation, before, tuple(found), tuple(dict.fromkeys(notes)))
        element = elements.get(before.source)
        if element is None:
            return "the source does not lie on the way to the target"
        step = step_of(graph, element)
        if isinstance(step, str):
            return step
        if isinstance(step, WeightUse) and step.note:
            notes.append(f"{step.name}: {step.note}")
        if isinstance(step, Block):
            notes += (*step.branch.notes, *step.shortcut.notes)
            if step.input < start:
                return f"the source lies inside of a branch that ends at {step.name}"
        found.insert(0, (step, before, activation))
        current = step.input


def step_of(graph: ForwardGraph, element: Element) -> Step | str:
    """The element with its branches read; a string says why that cannot be done."""
    if isinstance(element, Norm) and element.problem:
        return element.problem
    if not isinstance(element, Join):
        return element
    joins = f"{element.name}: joins 2 branches ({graph.calls[element.output].name})"
    if element.entry < 0:
        return joins
    ways = []
    for side in element.sides:
        way = way_between(graph, element.entry, side)
        if isinstance(way, str):
            return f"{joins}, of which one was not understood: {way}"
        ways.append(way)
    ways.sort(key=lambda way: (not way.identity, len(list(way.weights())), len(way.links)))
    shortcut, branch = ways
    if not branch.links:
        return f"{joins} of which none has a weight"
    return Block(element, branch, shortcut)


def _constant_slope(function: Callable[[Tensor], Tensor]) -> float | None:
    """The factor of an affine map, such as a product with a number; None for any other."""
    h = torch.tensor(_GRID)
    with torch.no_grad():
        value = function(h)
    factor = float((value[-1] - value[0]) / (h[-1] - h[0]))
    middle = len(_GRID) // 2
    line = value[middle] + factor * (h - h[middle])
    return factor if torch.allclose(value, line, rtol=1e-9, atol=1e-12) else None


def output_number(graph: ForwardGraph, module: nn.Module, name: str) -> int:
    """The number of a module's output; "name#2" is that of its second call.

    Raises:
        ValueError: no such module, it is not called, or it is called several times and the name says not which.
    """
    plain, _, call = name.partition("#")
    module = unwrapped(module)
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
