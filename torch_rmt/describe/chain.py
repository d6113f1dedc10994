"""`describe`: from a real module to what theory may know of it; the one bridge from torch.nn to theory."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from torch_rmt.describe.activation import from_torch
from torch_rmt.describe.forward_graph import ForwardGraph, WeightUse, record
from torch_rmt.describe.stretch import Stretch, stretch_to
from torch_rmt.measures import PointMass
from torch_rmt.theory import Activation, Architecture, Layer
from torch_rmt.theory.gaussian import gaussian_rule

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


def describe(
    module: nn.Module, example_input: Any, source: str | None = None, target: str | None = None
) -> Architecture:
    """Read an `Architecture` off a module by one forward pass: weights, activations, measured sigmas.

    sigma_w^2 = fan-in times the mean square of the weights; sigma_b the root mean square of the biases. A
    layer is "orthogonal" where W W^T or W^T W is proportional to the identity (for a convolution: the centre
    tap, all else zero), else "gaussian". A convolution counts its entries, channels times positions, as its
    width.

    Args:
        module: any nn.Module; it is left as it was.
        example_input: a tensor (batch first), a tuple of positional or a dict of keyword arguments.
        source, target: module names; the chain then runs from the output of the one to the output of the
            other, as in `operators.Jacobian`. A chain that starts at a pre-activation has a first layer with
            the identity as its weight. None stands for the input and the output of the network.

    Returns:
        The chain. With neither end given, the longest stretch that was understood; everything else, with the
        reason, is in `unknown`.

    Raises:
        TypeError: not a module, or its output holds no tensor.
        ValueError: the example is empty, a name does not exist or is not called, or no layer was understood.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> [(layer.name, layer.n_out, layer.activation and layer.activation.name) for layer in
    ...  describe(net, torch.ones(1, 8)).layers]
    [('0', 8, 'tanh'), ('2', 2, None)]
    """
    if source is None and target is None:
        return _longest_chain(record(module, example_input))
    return describe_between(module, example_input, source, target)


def describe_between(module: nn.Module, example_input: Any, source: str | None, target: str | None) -> Architecture:
    """Describe the way from one module's output to another's; None is the network's input or output.

    As `describe` with ends, and strict for the whole network too: what is returned is the chain whose
    Jacobian `operators.Jacobian(module, x, source, target)` measures.

    Raises:
        ValueError: something on the way was not understood, or a name is wrong.
    """
    graph = record(module, example_input)
    stop = graph.inputs[0] if source is None else _output_number(graph, module, source)
    end = graph.output if target is None else _output_number(graph, module, target)
    chain = _chain_between(graph, stop, end)
    if isinstance(chain, str):
        first, last = source or "the input", target or "the output"
        raise ValueError(f"the way from {first} to {last} was not understood: {chain}")
    return chain


def default_ends(module: nn.Module, example_input: Any) -> tuple[str | None, str | None]:
    """Choose the Jacobian's ends: first and last pre-activation of the longest run of equally wide layers.

    `(None, None)`, input to output, where no two layers of that kind follow each other.

    >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> default_ends(net, torch.ones(1, 3))
    ('0', '2')
    """
    graph = record(module, example_input)
    links = read_links(graph)
    named = _names(graph)
    best: tuple[int, int] = (0, -1)  # length, index of the last
    length: dict[int, int] = {}
    for i, link in enumerate(links):
        length[i] = 1 if link.use.output in named else 0
        p = link.parent
        if p is not None and length[i] and length[p]:
            same = graph.size(links[p].use.output) == graph.size(link.use.output)
            length[i] += length[p] if same else 0
        best = max(best, (length[i], i), key=lambda pair: pair[0])
    run, last = best
    if run < 2:
        return None, None
    first = last
    for _ in range(run - 1):
        first = links[first].parent or 0
    return named[links[first].use.output], named[links[last].use.output]


def read_links(graph: ForwardGraph) -> list[Link]:
    """Every use of a weight in the order of the calls, each with what precedes it."""
    stops = {use.output for use in graph.weights} | set(graph.inputs)
    place = {use.output: i for i, use in enumerate(graph.weights)}
    links = []
    for use in graph.weights:
        before = stretch_to(graph, use.input, stops)
        understood, activation = _activation_of(before)
        parent = place.get(before.source) if understood.problems == () else None
        links.append(Link(use, understood, activation, parent))
    return links


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


# --- chains


def _longest_chain(graph: ForwardGraph) -> Architecture:
    links = read_links(graph)
    stops = {use.output for use in graph.weights} | set(graph.inputs)
    tail, last_activation = _activation_of(stretch_to(graph, graph.output, stops))
    if not links:
        raise ValueError("no weights were found: describe reads nn.Linear, nn.Conv and the functions behind them")
    depth: list[int] = []
    for link in links:
        depth.append(1 + (depth[link.parent] if link.parent is not None else 0))
    index: int | None = max(range(len(links)), key=lambda i: (depth[i], i))
    path: list[int] = []
    while index is not None:
        path.insert(0, index)
        index = links[index].parent
    activations = [links[i].activation for i in path[1:]]
    ends_the_net = not tail.problems and tail.source == links[path[-1]].use.output
    activations.append(last_activation if ends_the_net else None)
    layers: list[Layer] = []
    for i, activation in zip(path, activations, strict=True):
        n_in = layers[-1].n_out if layers else None
        if n_in is None and not links[i].before.problems:
            n_in = graph.size(links[i].before.source)
        layers.append(layer_of(graph, links[i].use, activation, n_in))
    first = links[path[0]]
    second_moment = graph.mean_square.get(first.use.input)
    unknown = [p for link in links for p in (*link.before.problems, *link.before.notes)]
    unknown += [*tail.problems, *tail.notes]
    unknown += [f"{links[i].use.name}: {links[i].use.note}" for i in path if links[i].use.note]
    inside = {links[i].use.name for i in path}
    unknown += [f"{link.use.name}: outside the chain" for link in links if link.use.name not in inside]
    if first.activation is not None and not first.before.problems:
        unknown.append(f"{first.use.name}: the input passes through {first.activation.name} first")
    return Architecture(tuple(layers), second_moment, tuple(dict.fromkeys(unknown)))


def _chain_between(graph: ForwardGraph, start: int, end: int) -> Architecture | str:
    stops = {use.output for use in graph.weights} | set(graph.inputs) | {start}
    found: list[tuple[WeightUse, Activation | None]] = []
    notes: list[str] = []
    current = end
    while True:
        before, activation = _activation_of(stretch_to(graph, current, stops))
        notes += before.notes
        if before.problems:
            return "; ".join(before.problems)
        use = graph.weight_of(before.source)
        if before.source == start:
            break
        if use is None:
            return "the source does not lie on the way to the target"
        if use.note:
            notes.append(f"{use.name}: {use.note}")
        found.insert(0, (use, activation))
        current = use.input
    width = graph.size(start)
    second_moment = graph.mean_square.get(start)
    layers: list[Layer] = []
    if activation is not None:
        one = Layer(width, width, activation, 1.0, ensemble=PointMass(1.0), q=second_moment, name="source")
        layers.append(one)
    for use, following in found:
        layer = layer_of(graph, use, following, layers[-1].n_out if layers else width)
        layers.append(layer if following is None else replace(layer, q=graph.mean_square.get(use.output)))
    if not layers:
        return "source and target are the same place"
    return Architecture(_pool_q(layers), second_moment, tuple(dict.fromkeys(notes)))


def _pool_q(layers: list[Layer]) -> tuple[Layer, ...]:
    """Give layers of one activation a common q, that of their mean log E phi'^2, where it keeps scale and spread.

    The spread of the Jacobian's spectrum is sum_l (E phi'^4 / (E phi'^2)^2 - 1), and one more for a Gaussian weight.
    Where one q for all would move it by over a tenth, layers share theirs within a factor of 4 only: the law of many
    unlike layers takes long to solve.
    """
    pooled = list(layers)
    gaussian = sum(layer.ensemble == "gaussian" for layer in layers)
    for activation in {layer.activation.name: layer.activation for layer in layers if layer.activation}.values():
        measured = sorted((layer.q, i) for i, layer in enumerate(layers) if layer.q and layer.activation is activation)
        groups = [measured] if measured else []
        if measured:
            q = _common_q(activation, [q for q, _ in measured])
            spread = math.fsum(_slope_moments(activation, q)[1] for q, _ in measured)
            if abs(len(measured) * _slope_moments(activation, q)[1] - spread) > 0.1 * (spread + gaussian):
                bins = {int(math.log(q / measured[0][0], 4)) for q, _ in measured}
                groups = [[m for m in measured if int(math.log(m[0] / measured[0][0], 4)) == k] for k in bins]
        for group in groups:
            q = _common_q(activation, [q for q, _ in group])
            for _, i in group:
                pooled[i] = replace(layers[i], q=q)
    return tuple(pooled)


def _common_q(activation: Activation, measured: list[float]) -> float:
    """The q whose log E phi'^2 is the mean of that of the measured ones."""
    slopes = {q: _slope_moments(activation, q)[0] for q in measured}
    mean = math.fsum(slopes[q] for q in measured) / len(measured)
    low, high = math.log(min(slopes, key=slopes.__getitem__)), math.log(max(slopes, key=slopes.__getitem__))
    for _ in range(30):
        middle = (low + high) / 2
        below = _slope_moments(activation, math.exp(middle))[0] < mean
        low, high = (middle, high) if below else (low, middle)
    return math.exp((low + high) / 2)


def _slope_moments(activation: Activation, q: float) -> tuple[float, float]:
    """(log E phi'^2, E phi'^4 / (E phi'^2)^2 - 1)."""
    nodes, weights = gaussian_rule(q, activation.kinks)
    squares = np.asarray(activation.derivative(nodes)) ** 2
    first = max(float(weights @ squares), 1e-300)
    return math.log(first), float(weights @ squares**2) / first**2 - 1


def _output_number(graph: ForwardGraph, module: nn.Module, name: str) -> int:
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


def _names(graph: ForwardGraph) -> dict[int, str]:
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


def _activation_of(before: Stretch) -> tuple[Stretch, Activation | None]:
    """The activation of a stretch; None for the identity. A function theory cannot take becomes a problem."""
    if before.function is None:
        return before, None
    with torch.no_grad():
        key = before.function(torch.tensor(_GRID)).numpy().tobytes()
    if key not in _seen:
        try:
            _seen[key] = from_torch(before.function, "activation")
        except (ValueError, TypeError) as error:
            return Stretch(before.source, None, (*before.problems, str(error)), before.notes), None
    activation = _seen[key]
    return before, None if activation.name == "linear" else activation
