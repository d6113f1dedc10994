"""What a recorded pass is made of besides elementwise maps: weights, norms, diagonal scales, sums of branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torch_rmt.describe.forward_graph import Call, ForwardGraph, Ref, WeightUse
from torch_rmt.describe.norms import hand_written_norm, read_norm
from torch_rmt.describe.stretch import walk_back

_ADD = {"add", "__add__", "add_", "__iadd__", "__radd__", "sub", "sub_", "__sub__", "__isub__"}
_MUL = {"mul", "mul_", "__mul__", "__imul__", "__rmul__"}
_DIV = {"div", "div_", "true_divide", "__truediv__", "__itruediv__"}


@dataclass(frozen=True)
class Norm:
    """A normalisation over units or over the batch, its own weights included.

    Fields:
        name: where it was called.
        kind: as in `theory.Layer`.
        input, output: numbers of the tensors before and after.
        scale: its weights in float64, flat; None where they are all one.
        problem: why theory cannot take it; "" where it can.
    """

    name: str
    kind: Literal["layer", "rms", "batch"]
    input: int
    output: int
    scale: Tensor | None = None
    problem: str = ""


@dataclass(frozen=True)
class Scale:
    """A diagonal linear map: output = factor * input + a constant; factor in float64 of a shape that broadcasts."""

    name: str
    input: int
    output: int
    factor: Tensor


@dataclass(frozen=True)
class Join:
    """A sum of two branches that part at `entry`; `sides` are their ends. An entry of -1: they part nowhere."""

    name: str
    sides: tuple[int, int]
    entry: int
    output: int

    @property
    def input(self) -> int:
        """Where the block begins."""
        return self.entry


Element = WeightUse | Norm | Scale | Join


def elements_of(graph: ForwardGraph) -> dict[int, Element]:
    """Every element of a recorded pass, by the number of its output, in the order of the calls."""
    if not graph.elements:
        found: dict[int, Element] = {use.output: use for use in graph.weights}
        written = {o[0]: i[0] for name, o in graph.module_outputs.items() if (i := graph.module_inputs[name])}
        ends = set(graph.inputs)
        for number in sorted(graph.data & graph.calls.keys()):
            if number not in found:
                element = _norm(graph, number, written.get(number, -1)) or _scale(graph, number)
                element = element or _join(graph, number, ends | found.keys())
                if isinstance(element, Norm):  # what a hand-written one is made of is no element
                    for call in calls_between(graph, element.input, number):
                        found.pop(call.output, None)
                if element is not None:
                    found[number] = element
        graph.elements = {number: found[number] for number in sorted(found)}
    return graph.elements


def _norm(graph: ForwardGraph, number: int, module_input: int) -> Element | None:
    call = graph.calls[number]
    found = read_norm(graph, call)
    if found is None and module_input >= 0:
        found = hand_written_norm(graph, module_input, number)
    if found is None:
        return None
    if isinstance(found.kind, str):
        return Norm(call.where, found.kind, found.input, number, found.scale, found.problem)
    assert found.scale is not None
    return Scale(call.where, found.input, number, found.scale)


def _scale(graph: ForwardGraph, number: int) -> Scale | None:
    """A product with, a quotient by or a sum with a constant that has more than one entry."""
    call = graph.calls[number]
    if call.name not in _MUL | _DIV | _ADD or len(call.args) < 2:
        return None
    data = graph.data_inputs(number)
    first, second = call.args[0], call.args[1]
    other = second if isinstance(first, Ref) and first.number in data else first
    if len(data) != 1 or not isinstance(other, Ref) or graph.shapes[number] != graph.shapes[data[0]]:
        return None
    constant = graph.tensors[other.number].detach()
    if constant.numel() < 2 or not constant.is_floating_point() or (call.name in _DIV and other is first):
        return None
    factor = constant.double()
    if call.name in _ADD:
        factor = torch.ones(1, dtype=torch.float64, device=constant.device)
    elif call.name in _DIV:
        factor = 1.0 / factor
    return Scale(call.where, data[0], number, factor)


def _join(graph: ForwardGraph, number: int, stops: set[int]) -> Join | None:
    call = graph.calls[number]
    if call.name not in _ADD or call.kwargs.get("alpha", 1) != 1 or len(call.args) > 2:
        return None
    sides = [arg.number for arg in call.args if isinstance(arg, Ref) and arg.number in graph.data]
    if len(sides) != 2 or any(graph.shapes[n] != graph.shapes[number] for n in sides):
        return None
    if len(set().union(*(walk_back(graph, n, stops)[1] for n in sides))) < 2:
        return None  # an elementwise map written with a sum
    return Join(call.where, (sides[0], sides[1]), _dominator(graph, number), number)


def _dominator(graph: ForwardGraph, number: int) -> int:
    """The last tensor that every way from the input to this one passes; -1 where there is none."""
    front = set(graph.data_inputs(number))
    while len(front) > 1:
        last = max(front)  # numbers grow along every way
        front.remove(last)
        before = graph.data_inputs(last)
        if not before:
            return -1
        front.update(before)
    return front.pop() if front else -1


def calls_between(graph: ForwardGraph, start: int, end: int) -> list[Call]:
    """The calls that make one tensor of another, in their order."""
    return walk_back(graph, end, {start, *graph.inputs})[0]
