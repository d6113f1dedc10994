"""Rules that make a tape touch less memory: early sums, and results in the place of values that nobody reads again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from torch_rmt.operators.tape import Program, Step, Value
from torch_rmt.operators.tape_rewriting import Rewriter, each

_aten = torch.ops.aten
_ADD, _SUM = _aten.add.Tensor, _aten.sum.dim_IntList
# Operations that may write their result over their first argument.
_OVER = {
    _aten.addmm.default: _aten.addmm_.default,
    _aten.baddbmm.default: _aten.baddbmm_.default,
    _aten.addcmul.default: _aten.addcmul_.default,
    _ADD: _aten.add_.Tensor,
    _aten.mul.Tensor: _aten.mul_.Tensor,
    _aten.mul.Scalar: _aten.mul_.Scalar,
}
IN_PLACE = frozenset(_OVER.values())
# Operations whose result is memory of its own, in which nothing else looks.
_NEW = {
    *_OVER,
    *IN_PLACE,
    _aten.mm.default,
    _aten.bmm.default,
    _aten._softmax_backward_data.default,
    _aten.clone.default,
}


def biases(program: Program) -> Program:
    """A vector added to every row of a product is added after it, instead of being written out in full before."""

    def rule(work: Rewriter, step: Step) -> Step:
        if step.function is not _aten.addmm.default or step.kwargs:
            return step
        made = work.made_by(step.args[0])
        if made is None or made.function is not _aten.expand.default:
            return step
        work.keep(replace(step, function=_aten.mm.default, args=step.args[1:], results=(work.fresh(),)))
        return replace(step, function=_ADD, args=(Value(work.next - 1), made.args[0]))

    return each(program, rule)


def early_sums(program: Program) -> Program:
    """Sums directly after what they sum, as long as it is in the cache."""
    later: dict[int, list[Step]] = {}
    for step in program.steps:
        if step.function is _SUM and isinstance(step.args[0], Value):
            later.setdefault(step.args[0].index, []).append(step)
    steps: list[Step] = []
    for step in program.steps:
        if step.function is _SUM and isinstance(step.args[0], Value) and step.args[0].index >= program.inputs:
            continue
        waiting = [step]
        while waiting:
            now = waiting.pop(0)
            steps.append(now)
            waiting += [s for r in now.results for s in later.get(r, [])]
    return replace(program, steps=tuple(steps))


def written_over(program: Program) -> Program:
    """The result takes the place of an argument that is not read again, and in which nothing else looks."""
    readers: dict[int, list[int]] = {}
    for place, step in enumerate(program.steps):
        for index in step.reads():
            readers.setdefault(index, []).append(place)
    outputs = {o.index for o in program.outputs if isinstance(o, Value)}

    def ends(work: Rewriter, side: Any, step: Step) -> bool:
        """Whether the step is the last that reads a value, and none before it made a view of it."""
        made = work.made_by(side)
        if made is None or made.function not in _NEW or side.index in outputs:
            return False
        *before, last = readers[side.index]
        if program.steps[last] is not step or last in before:
            return False
        return all(program.steps[i].function in _NEW or program.steps[i].function is _SUM for i in before)

    def rule(work: Rewriter, step: Step) -> Step:
        if step.function not in _OVER:
            return step
        sides = [step.args[0]]
        if step.function is _ADD and step.kwargs.get("alpha", 1) == 1:
            sides.append(step.args[1])
        for side in sides:
            made = work.made_by(side)
            if made is None or not ends(work, side, step):
                continue
            if (made.shape, made.dtype) != (step.shape, step.dtype):
                continue
            args = step.args if side is step.args[0] else (side, step.args[0])
            return replace(step, function=_OVER[step.function], args=args)
        return step

    return each(program, rule)
