"""`describe`: from a real module to an `Architecture`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from torch_rmt.describe.common_q import pool_q
from torch_rmt.describe.forward_graph import ForwardGraph, record
from torch_rmt.describe.layers import layers_on
from torch_rmt.describe.links import activation_of, start_of, way_between, way_of
from torch_rmt.describe.stretch import Stretch, stretch_to
from torch_rmt.describe.trunk import read_trunk
from torch_rmt.theory import Architecture


def describe(
    module: nn.Module, example_input: Any, source: str | None = None, target: str | None = None
) -> Architecture:
    """Read an `Architecture` off a module by one forward pass: weights, activations, measured sigmas.

    sigma_w^2 = fan-in times the mean square of the weights; sigma_b the root mean square of the biases. A
    layer is "orthogonal" where W W^T or W^T W is nearer to a multiple of the identity than that of a Gaussian
    weight is (for a convolution: of the centre tap, next to nothing beside it), else "gaussian". A convolution
    counts its entries, channels times positions, as its width.

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
    return architecture_between(record(module, example_input), module, source, target)


def architecture_between(
    graph: ForwardGraph, module: nn.Module, source: str | None, target: str | None
) -> Architecture:
    """As `describe_between`, from a pass that was recorded."""
    start, way = start_of(graph, module, source), way_of(graph, module, source, target)
    layers = layers_on(graph, way, start)
    if not layers:
        first, last = source or "the input", target or "the output"
        raise ValueError(f"the way from {first} to {last} was not understood: there is no layer on it")
    return Architecture(pool_q(layers), graph.mean_square.get(start), way.notes)


def _longest_chain(graph: ForwardGraph) -> Architecture:
    if not graph.weights:
        raise ValueError("no weights were found: describe reads nn.Linear, nn.Conv and the functions behind them")
    trunk = read_trunk(graph)
    best = max(trunk.values(), key=lambda place: (place.weights, place.output))
    first = best
    while first.parent is not None:
        first = trunk[first.parent]
    start = first.before.source if not first.before.problems else first.input
    tail, _ = activation_of(stretch_to(graph, graph.output, trunk.keys() | set(graph.inputs)))
    end = graph.output if not tail.problems and tail.source == best.output else best.output
    way = way_between(graph, start, end)
    if isinstance(way, str):
        raise ValueError(f"no chain was understood: {way}")
    unknown = [note for place in trunk.values() for note in (*place.before.problems, *place.before.notes)]
    unknown += [place.problem for place in trunk.values() if place.problem]
    unknown += [*tail.problems, *tail.notes, *way.notes]
    inside = {use.name for use in way.weights()}
    unknown += [f"{use.name}: outside the chain" for use in graph.weights if use.name not in inside]
    if way.first is not None:
        unknown.append(f"{way.links[0][0].name}: the input passes through {way.first.name} first")
        way = replace(way, first=None, first_stretch=Stretch(start))
    layers = layers_on(graph, way, start, measured=False)
    return Architecture(tuple(layers), graph.mean_square.get(first.input), tuple(dict.fromkeys(unknown)))
