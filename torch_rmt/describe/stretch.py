"""What lies between two weights of a recorded forward pass: an elementwise map, or a reason why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_rmt.describe.forward_graph import Call, ForwardGraph, Ref

# Calls that move entries but change none; "pad" is one as part of a convolution.
_KEEP = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "pad"}
_KEEP |= {"contiguous", "clone", "to", "float", "double", "half", "bfloat16", "type", "type_as", "alias"}
_KEEP |= {"detach", "requires_grad_"}
_MOVE = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "t", "T", "mT", "channel_shuffle"}
SHAPING = _KEEP | _MOVE
_DROPOUT = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
_PRODUCTS = {"matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "__matmul__", "__rmatmul__", "tensordot"}


@dataclass(frozen=True)
class Stretch:
    """What lies between a tensor and the one tensor that it was computed from.

    Fields:
        source: number of the tensor before; -1 where there are several or none.
        sources: all of them.
        function: the elementwise map on a float64 tensor of any shape; None for the identity.
        problems: why the stretch was not understood, one line each; empty when it was.
        notes: what was passed over, such as dropout.
        pooled: everything that was not understood is pooling, and `function` is the map before it.
        dropout: probability that an entry is dropped behind the map; what drops otherwise is a note.
    """

    source: int
    function: Callable[[Tensor], Tensor] | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    pooled: bool = False
    sources: frozenset[int] = frozenset()
    dropout: float = 0.0

    @property
    def joins(self) -> bool:
        """Whether branches come together."""
        return len(self.sources) > 1


def stretch_to(graph: ForwardGraph, end: int, stops: set[int]) -> Stretch:
    """Follow a tensor back to the nearest of `stops`, and say what was done on the way."""
    calls, sources = walk_back(graph, end, stops)
    notes: list[str] = []
    kept = 1.0
    last = max((i for i, c in enumerate(calls) if c.name not in SHAPING | _DROPOUT), default=-1)
    for i, call in enumerate(calls):
        chance = _dropped(call)
        if chance > 0 and call.name == "dropout" and i > last:
            kept *= 1.0 - chance
        elif chance > 0:
            notes.append(f"{call.where}: dropout is active and was taken as absent; model.eval() turns it off")
    if len(sources) != 1:
        join = next((c for c in calls if len(_sources_of(graph, c, stops)) > 1), calls[-1] if calls else None)
        where = join.where if join else "the output"
        what = f"joins {len(sources)} branches ({join.name})" if join and sources else "sees no input"
        culprits = tuple(p for c in calls if c is not join and (p := _problem(graph, c)))
        return Stretch(-1, None, (f"{where}: {what}", *culprits), tuple(notes), sources=frozenset(sources))
    source = next(iter(sources))
    acting = [c for c in calls if c.name not in SHAPING | _DROPOUT]
    if not acting:
        return Stretch(source, None, (), tuple(notes), dropout=1.0 - kept)

    def function(h: Tensor) -> Tensor:
        return replay(graph, calls, source, end, h)

    if _is_elementwise(function) and _agrees(graph, calls, function, source, end):
        return Stretch(source, function, (), tuple(notes), dropout=1.0 - kept)
    problems = tuple(dict.fromkeys(p for c in acting if (p := _problem(graph, c))))
    pools = [c for c in acting if "pool" in c.name]
    if pools and len(problems) == len({c.where for c in pools}):
        first = min(c.output for c in pools)
        before = next(n for n in graph.calls[first].inputs if n in graph.data)
        inner = stretch_to(graph, before, stops)
        if not inner.problems:
            return Stretch(inner.source, inner.function, problems, tuple(notes), pooled=True)
    return Stretch(source, None, problems or (f"{acting[0].where}: not elementwise",), tuple(notes))


def _dropped(call: Call) -> float:
    """Probability with which a call drops entries; zero for every other call and in eval mode."""
    if call.name not in _DROPOUT:
        return 0.0
    given = dict(zip(("input", "p", "training"), call.args, strict=False)) | call.kwargs
    return float(given.get("p", 0.5)) if given.get("training", True) else 0.0


def walk_back(graph: ForwardGraph, end: int, stops: set[int]) -> tuple[list[Call], set[int]]:
    """The calls between `stops` and `end` that handle data, in the order they ran, and the stops reached."""
    found: dict[int, Call] = {}
    sources: set[int] = set()
    left = [end]
    while left:
        n = left.pop()
        if n in stops:
            sources.add(n)
        elif n in graph.calls and n not in found:
            found[n] = graph.calls[n]
            left += [m for m in graph.calls[n].inputs if m in graph.data]
    return [found[n] for n in sorted(found)], sources


def _sources_of(graph: ForwardGraph, call: Call, stops: set[int]) -> set[int]:
    inputs = [n for n in call.inputs if n in graph.data]
    if len(inputs) < 2:
        return set()
    return set().union(*(walk_back(graph, n, stops)[1] for n in inputs))


def replay(graph: ForwardGraph, calls: list[Call], source: int, end: int, h: Tensor) -> Tensor:
    """Run the recorded calls on another tensor, shapes ignored, constants in its type."""
    values = {source: h}

    def fill(ref: Any) -> Any:
        if not isinstance(ref, Ref):
            return ref
        if ref.number in values:
            return values[ref.number].clone()  # the call may write into it
        constant = graph.tensors[ref.number].detach()
        return constant.to(h.device, h.dtype) if constant.is_floating_point() else constant.to(h.device)

    for call in calls:
        first = next((n for n in call.inputs if n in values), None)
        if first is None:
            continue
        if call.name in SHAPING | _DROPOUT:
            values[call.output] = values[first]
            continue
        args, kwargs = _fill(call.args, fill), _fill(call.kwargs, fill)
        out = call.function(*args, **kwargs)
        values[call.output] = args[0] if out is None else out
    return values[end]


def _fill(tree: Any, fill: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {key: _fill(value, fill) for key, value in tree.items()}
    if isinstance(tree, tuple | list) and not isinstance(tree, torch.Size):
        return type(tree)(_fill(value, fill) for value in tree)
    return fill(tree)


def _is_elementwise(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether entry i of f(h) depends on entry i of h alone, the same way for all i; tried on 61 points."""
    h = torch.linspace(-3.0, 3.0, 61, dtype=torch.float64)
    order = torch.arange(61) * 17 % 61
    other = torch.where(torch.arange(61) < 30, h, h.flip(0) + 0.37)
    try:
        with torch.no_grad():
            value, permuted, changed = function(h), function(h[order]), function(other)
    except Exception:  # any call at all is tried here, on a shape it may not take: whatever it raises, it says no
        return False
    return (
        isinstance(value, Tensor)  # unbind and chunk give several
        and value.shape == h.shape
        and value.is_floating_point()
        and torch.allclose(permuted, value[order], rtol=1e-9, atol=1e-12)
        and torch.allclose(changed[:30], value[:30], rtol=1e-9, atol=1e-12)
    )


def _agrees(
    graph: ForwardGraph, calls: list[Call], function: Callable[[Tensor], Tensor], source: int, end: int
) -> bool:
    """Whether the replayed map gives the values that were recorded; not tried where entries were moved."""
    if any(c.name in _MOVE | _DROPOUT | {"pad"} for c in calls):
        return True
    if graph.shapes[source].numel() != graph.shapes[end].numel():
        return False
    if source not in graph.samples or end not in graph.samples:
        return False
    given, seen = graph.samples[source], graph.samples[end].double()
    with torch.no_grad():
        expected = function(given.double())
    finite = torch.isfinite(seen)
    if not finite.any():
        return True  # a network that has diverged: nothing to compare with
    expected, seen = expected[finite], seen[finite]
    slack = 1e-4 if given.dtype in (torch.float32, torch.float64) else 0.05
    return torch.allclose(expected, seen, rtol=slack, atol=slack * float(seen.abs().max()))


def _problem(graph: ForwardGraph, call: Call) -> str:
    """Why a single call is not understood; "" if it is."""
    if call.name in SHAPING | _DROPOUT:
        return ""
    inputs = [n for n in call.inputs if n in graph.data]
    if len(inputs) == 1 and _is_elementwise(lambda h: replay(graph, [call], inputs[0], call.output, h)):
        return ""
    if len(inputs) > 1 and call.name in {"mul", "add", "sub", "div", "where", "__mul__", "__add__"}:
        return ""
    if "norm" in call.name:
        return f"{call.where}: normalises ({call.name}); its map is not elementwise"
    if "pool" in call.name:
        return f"{call.where}: pools ({call.name})"
    if "attention" in call.name:
        return f"{call.where}: attention; its projections are hidden inside one call"
    if call.name in _PRODUCTS:
        return f"{call.where}: a product written as {call.name}; F.linear(x, weight) would be read"
    return f"{call.where}: {call.name} is not an elementwise map"
