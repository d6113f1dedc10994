"""Playing a tape: its steps in order, each value let go after its last use, results written where they shall lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_rmt.operators.tape import Program, Step, TapeError, Tensors, Value, leaves, mapped
from torch_rmt.operators.tape_memory import IN_PLACE

_aten = torch.ops.aten
_OUT = {
    _aten.mm.default: _aten.mm.out,
    _aten.addmm.default: _aten.addmm.out,
    _aten.sum.dim_IntList: _aten.sum.IntList_out,
}


def player(program: Program) -> Callable[..., Tensors]:
    """A function `play(vectors, into=None)` that runs the steps.

    With `into`, one tensor for each output, the results lie there; a matrix product is written there at once.
    """
    last = {index: place for place, step in enumerate(program.steps) for index in step.reads()}
    kept = {o.index for o in program.outputs if isinstance(o, Value)}
    size = 1 + max([program.inputs - 1, *(r for step in program.steps for r in step.results)])
    placed = _placed(program)
    lines = []
    for place, step in enumerate(program.steps):
        flat = [(i, a.index) for i, a in enumerate(step.args) if isinstance(a, Value)]
        nested = [
            (i, a)
            for i, a in enumerate(step.args)
            if isinstance(a, (list, tuple)) and any(isinstance(b, Value) for b in leaves(a))
        ]
        if any(isinstance(a, Value) for a in leaves(tuple(step.kwargs.values()))):
            raise TapeError("a value is a keyword argument")
        over = [i for i in {*step.reads(), *step.results} - {-1} if last.get(i, place) == place and i not in kept]
        lines.append((step, flat, nested, over, placed.get(place)))

    def play(vectors: Tensors, into: Tensors | None = None) -> Tensors:
        values: list[Any] = [None] * size
        values[: program.inputs] = vectors
        for step, flat, nested, over, output in lines:
            args = list(step.args)
            for place, index in flat:
                args[place] = values[index]
            for place, tree in nested:
                args[place] = mapped(tree, lambda a: values[a.index] if isinstance(a, Value) else a)
            if into is None or output is None:
                found = step.function(*args, **step.kwargs)
            else:
                found = _OUT[step.function](*args, **step.kwargs, out=into[output])
            if isinstance(found, Tensor):
                values[step.results[0]] = found
            else:
                for index, t in zip(step.results, found, strict=True):
                    if index >= 0:
                        values[index] = t
            del args, found
            for index in over:
                values[index] = None
        results = tuple(values[o.index] if isinstance(o, Value) else o for o in program.outputs)
        if into is None:
            return results
        for there, t in zip(into, results, strict=True):
            if there is not t:
                there.copy_(t)
        return into

    return play


def _placed(program: Program) -> dict[int, int]:
    """Steps that make the memory in which an output lies in the end, by their place; and which output it is."""
    maker: dict[int, tuple[int, Step]] = {r: (i, s) for i, s in enumerate(program.steps) for r in s.results}
    found: dict[int, int] = {}
    for output, value in enumerate(program.outputs):
        made = maker.get(value.index) if isinstance(value, Value) else None
        while made is not None and made[1].function in IN_PLACE and isinstance(made[1].args[0], Value):
            made = maker.get(made[1].args[0].index)
        if made is not None and made[1].function in _OUT:
            found.setdefault(made[0], output)
    return found
