"""Where a network can be cut: every weight, norm and sum, what it follows, and which two ends to look between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from torch_rmt.describe.elements import Join, elements_of
from torch_rmt.describe.forward_graph import ForwardGraph, WeightUse, record
from torch_rmt.describe.links import Block, activation_of, names_of, step_of
from torch_rmt.describe.stretch import Stretch, stretch_to, walk_back


@dataclass(frozen=True)
class Place:
    """The output of a weight, norm, scale or sum of branches.

    Fields:
        output, input: numbers of the tensors behind and in front of it; in front of a sum, where its branches part.
        before: what lies between it and the place that it follows.
        parent: number of that place; None at the network's input and where something was not understood.
        weights: number of weights on the whole understood way to it, its own and those in its branches included.
        blocks: the sums of the understood blocks that it lies inside of.
        problem: why the step itself was not understood; "" if it was.
    """

    output: int
    input: int
    before: Stretch
    parent: int | None
    weights: int
    problem: str = ""
    blocks: tuple[int, ...] = ()


def read_trunk(graph: ForwardGraph) -> dict[int, Place]:
    """Every place of a recorded pass, in the order of the calls."""
    elements = elements_of(graph)
    stops = elements.keys() | set(graph.inputs)
    places: dict[int, Place] = {}
    for number, element in elements.items():
        step = step_of(graph, element)
        if isinstance(step, str):
            places[number] = Place(number, number, Stretch(number), None, 0, step)
            continue
        before, _ = activation_of(stretch_to(graph, step.input, stops))
        parent = before.source if not before.problems and before.source in places else None
        own = 0
        if isinstance(step, WeightUse):
            own = 1
        elif isinstance(step, Block):
            own = len([*step.branch.weights(), *step.shortcut.weights()])
        so_far = places[parent].weights if parent is not None else 0
        places[number] = Place(number, step.input, before, parent, so_far + own)
        if isinstance(step, Block):
            for inside in places.keys() & set(_inside(step)):
                places[inside] = replace(places[inside], blocks=(*places[inside].blocks, number))
    return places


def _inside(block: Block) -> Iterator[int]:
    for step, _, _ in (*block.branch.links, *block.shortcut.links):
        yield step.output
        if isinstance(step, Block):
            yield from _inside(step)


def default_ends(module: nn.Module, example_input: Any) -> tuple[str | None, str | None]:
    """Choose the Jacobian's ends: the longest run of equally wide layers and blocks that was understood.

    First and last pre-activation of the run; a block that adds counts from its sum, or the activation behind it.
    A run of less than a quarter of the longest understood stretch is none. Then the longest stretch between equal
    widths, whatever lies between. Where the whole network was not understood the same inside of a branch (the
    perceptron in a transformer's block), then any stretch. `(None, None)`, input to output, where nothing is better;
    the source is then the first module with real numbers where the input itself has none (token numbers).

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> default_ends(net, torch.ones(1, 3))
    ('0', '2')
    """
    return ends_of(record(module, example_input))


def ends_of(graph: ForwardGraph) -> tuple[str | None, str | None]:
    """As `default_ends`, from a pass that was recorded."""
    places, named = read_trunk(graph), names_of(graph)
    names = _place_names(graph, places, named)
    longest = max((place.weights for place in places.values()), default=0)
    none = (0, -1, -1)  # weights, first, last
    best = dict.fromkeys(("even", "equal", "even, inside", "equal, inside", "any"), none)
    for number, place in places.items():
        if number not in names:
            continue
        one_width, inside = True, ", inside" if place.blocks else ""
        for before in _followed(places, place):
            one_width = one_width and graph.size(before) == graph.size(number)
            if before not in names or places[before].blocks != place.blocks:
                continue
            run = (place.weights - places[before].weights, before, number)
            kinds = ["any"]
            if graph.size(before) == graph.size(number):
                kinds += [f"equal{inside}", *([f"even{inside}"] if one_width else [])]
            for kind in kinds:
                best[kind] = max(best[kind], run, key=lambda r: r[0])
    whole = _ends_well(graph, places) == longest > 0
    for kind in ("even", "equal", *(() if whole else ("even, inside", "equal, inside"))):
        weights, first, last = best[kind]
        if weights > 0 and 4 * weights >= longest:
            return names[first], names[last]
    if best["any"][0] > 1 and not whole:
        return names[best["any"][1]], names[best["any"][2]]
    return _first_real(graph, named), None


def in_a_branch(graph: ForwardGraph, number: int) -> bool:
    """Whether a tensor lies inside of a branch, understood or not: another way leads past it to a later sum."""
    for join in elements_of(graph).values():
        if isinstance(join, Join) and 0 <= join.entry < number < join.output:
            between = (walk_back(graph, side, {join.entry, *graph.inputs})[0] for side in join.sides)
            if any(call.output == number for calls in between for call in calls):
                return True
    return False


def _followed(places: dict[int, Place], place: Place) -> Iterator[int]:
    while place.parent is not None:
        yield place.parent
        place = places[place.parent]


def _place_names(graph: ForwardGraph, places: dict[int, Place], named: dict[int, str]) -> dict[int, str]:
    """A module whose output is the place, or, behind a sum, one that only puts an activation on it."""
    names = {number: named[number] for number in places if number in named}
    stops = places.keys() | set(graph.inputs)
    for number in sorted(named):
        if number in places or number not in graph.data:
            continue
        before, _ = activation_of(stretch_to(graph, number, stops))
        if not before.problems and before.source in places and "add" in graph.calls[before.source].name:
            names.setdefault(before.source, named[number])
    return names


def _ends_well(graph: ForwardGraph, places: dict[int, Place]) -> int:
    """Number of weights from the input to the output, if all of that was understood; else zero."""
    tail, _ = activation_of(stretch_to(graph, graph.output, places.keys() | set(graph.inputs)))
    if tail.problems or tail.source not in places:
        return 0
    last = places[tail.source]
    first = last
    while first.parent is not None:
        first = places[first.parent]
    understood = not first.problem and not first.before.problems and first.before.source in graph.inputs
    return last.weights if understood else 0


def _first_real(graph: ForwardGraph, named: dict[int, str]) -> str | None:
    if graph.inputs[0] in graph.mean_square:
        return None
    real = [n for n in named if n in graph.mean_square and n != graph.output]
    return named[min(real)] if real else None
