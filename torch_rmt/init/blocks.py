"""What a critical initialisation does about residual blocks, norms, and whatever was not understood."""

from __future__ import annotations

from torch import nn

from torch_rmt.describe import (
    SHAPING,
    Block,
    ForwardGraph,
    Join,
    Link,
    Norm,
    Scale,
    WeightUse,
    elements_of,
    read_trunk,
    step_of,
    walk_back,
)


def branch_ends(graph: ForwardGraph) -> tuple[dict[int, tuple[int, float]], dict[str, str]]:
    """Weights that end a branch, by the number of their output, each with the block's entry and its share.

    One of L blocks in a row adds a branch of 1 / L of the mean square of what enters it, so that signals and gradients
    grow by at most e over all of them; a projection in the place of the identity keeps the mean square. A branch that
    ends in a norm or in a factor of its own has its share set by that: the second dictionary names them.

    Source: Hanin and Rolnick 2018 and Hayou et al. 2021 for shares whose sum is bounded; Zhang, Dauphin and Ma 2019 for
    scaling the branch's weights alone.
    """
    places, elements = read_trunk(graph), elements_of(graph)
    ends: dict[int, tuple[int, float]] = {}
    set_by_others: dict[str, str] = {}
    joins = [number for number, element in elements.items() if isinstance(element, Join)]
    for number in joins:
        block = step_of(graph, elements[number])
        if not isinstance(block, Block):
            continue
        row = sum(places[other].blocks == places[number].blocks for other in joins)
        if block.shortcut.links and isinstance(last := block.shortcut.links[-1][0], WeightUse):
            ends[last.output] = (block.input, 1.0)
        last = block.branch.links[-1][0]
        if isinstance(last, WeightUse):
            ends[last.output] = (block.input, 1.0 / row)
        elif isinstance(last, Norm) or (isinstance(last, Scale) and bool((last.factor != 1).any())):
            set_by_others[last.name] = "sets the share of its residual branch itself"
    return ends, set_by_others


def left_alone(module: nn.Module, graph: ForwardGraph, links: list[Link]) -> dict[str, str]:
    """By name, why a weight is not to be drawn."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    feeds, normed = _feeding_the_unknown(graph, links), _normed(graph)
    others = {
        id(graph.tensors[n]): call.name
        for number, call in graph.calls.items()
        for n in call.inputs
        if isinstance(graph.tensors[n], nn.Parameter) and not any(use.output == number for use in graph.weights)
    }
    left: dict[str, str] = {}
    for link in links:
        use = link.use
        parameter = parameters.get(use.parameter)
        if parameter is None:
            left[use.name] = "its weight is computed from others (a parametrisation)"
        elif not parameter.requires_grad:
            left[use.name] = "frozen"
        elif link.before.problems and not link.before.pooled:
            left[use.name] = "; ".join(link.before.problems)
        elif id(parameter) in others:
            left[use.name] = f"its weight is also used by {others[id(parameter)]}"
        elif use.output in feeds:
            left[use.name] = f"what follows was not understood ({feeds[use.output]})"
        elif use.output in normed:
            left[use.name] = "its scale is taken off by the norm that follows"
    return left


def _normed(graph: ForwardGraph) -> set[int]:
    """Numbers that go to a norm and nowhere else."""
    elements = elements_of(graph)
    stops = elements.keys() | set(graph.inputs)
    readers: dict[int, list[bool]] = {}
    for element in elements.values():
        ends = element.sides if isinstance(element, Join) else (element.input,)
        for end in ends:
            calls, sources = walk_back(graph, end, stops)
            moved = all(call.name in SHAPING for call in calls)
            for source in sources:
                readers.setdefault(source, []).append(moved and isinstance(element, Norm))
    for source in walk_back(graph, graph.output, stops)[1]:
        readers.setdefault(source, []).append(False)
    return {source for source, are_norms in readers.items() if all(are_norms)}


def _feeding_the_unknown(graph: ForwardGraph, links: list[Link]) -> dict[int, str]:
    """Numbers from which the next thing is a sum or a stretch that was not understood, and why."""
    elements = elements_of(graph)
    stops = elements.keys() | set(graph.inputs)
    feeds: dict[int, str] = {}
    for link in links:
        if link.before.problems and not link.before.pooled:
            feeds |= dict.fromkeys(walk_back(graph, link.use.input, stops)[1], "; ".join(link.before.problems))
    for element in elements.values():
        problem = step_of(graph, element) if isinstance(element, Join) else None
        if isinstance(element, Join) and isinstance(problem, str):
            for side in element.sides:
                feeds |= dict.fromkeys(walk_back(graph, side, stops)[1], problem)
    return feeds
