"""`describe`: from a real module to an `Architecture`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import nn

from torch_rmt.describe.common_q import pool_q
from torch_rmt.describe.forward_graph import ForwardGraph, record
from torch_rmt.describe.links import activation_of, layer_of, names_of, read_links, start_of, way_of
from torch_rmt.describe.stretch import stretch_to
from torch_rmt.measures import PointMass
from torch_rmt.theory import Architecture, Layer


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

    >>> import torch
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
    Jacobian `operators.Jacobian(module, x, source, target)` measures. So sigma_w^2 of a convolution is times the share
    of its taps that do not fall on zero padding: that is the mean of its squared singular values.

    Raises:
        ValueError: something on the way was not understood, or a name is wrong.
    """
    graph = record(module, example_input)
    start, way = start_of(graph, module, source), way_of(graph, module, source, target)
    width, second_moment = graph.size(start), graph.mean_square.get(start)
    layers: list[Layer] = []
    if way.first is not None or way.first_stretch.dropout > 0:
        one = Layer(width, width, way.first, 1.0, ensemble=PointMass(1.0), q=second_moment, name="source")
        layers.append(replace(one, dropout=way.first_stretch.dropout))
    for use, stretch, following in way.links:
        layer = layer_of(graph, use, following, layers[-1].n_out if layers else width)
        layer = replace(layer, sigma_w=layer.sigma_w * math.sqrt(use.kept), dropout=stretch.dropout)
        layers.append(layer if following is None else replace(layer, q=graph.mean_square.get(use.output)))
    if not layers:
        first, last = source or "the input", target or "the output"
        raise ValueError(f"the way from {first} to {last} was not understood: source and target are the same place")
    return Architecture(pool_q(layers), second_moment, way.notes)


def default_ends(module: nn.Module, example_input: Any) -> tuple[str | None, str | None]:
    """Choose the Jacobian's ends: first and last pre-activation of the longest run of equally wide layers.

    `(None, None)`, input to output, where no two layers of that kind follow each other; the source is then the first
    module with real numbers where the input itself has none (token numbers).

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> default_ends(net, torch.ones(1, 3))
    ('0', '2')
    """
    graph = record(module, example_input)
    links = read_links(graph)
    named = names_of(graph)
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
        return _first_real(graph, named), None
    first = last
    for _ in range(run - 1):
        first = links[first].parent or 0
    return named[links[first].use.output], named[links[last].use.output]


def _first_real(graph: ForwardGraph, named: dict[int, str]) -> str | None:
    if graph.inputs[0] in graph.mean_square:
        return None
    real = [n for n in named if n in graph.mean_square and n != graph.output]
    return named[min(real)] if real else None


def _longest_chain(graph: ForwardGraph) -> Architecture:
    links = read_links(graph)
    stops = {use.output for use in graph.weights} | set(graph.inputs)
    tail, last_activation = activation_of(stretch_to(graph, graph.output, stops))
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
    following = [(links[i].activation, links[i].before.dropout) for i in path[1:]]
    ends_the_net = not tail.problems and tail.source == links[path[-1]].use.output
    following.append((last_activation, tail.dropout) if ends_the_net else (None, 0.0))
    layers: list[Layer] = []
    for i, (activation, dropout) in zip(path, following, strict=True):
        n_in = layers[-1].n_out if layers else None
        if n_in is None and not links[i].before.problems:
            n_in = graph.size(links[i].before.source)
        layers.append(replace(layer_of(graph, links[i].use, activation, n_in), dropout=dropout))
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
