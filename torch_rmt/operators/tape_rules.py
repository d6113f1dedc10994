"""Rules that make a tape shorter: fewer passes over memory for the same product.

All hold for any vector, because the product is linear in it: an elementwise slope is a constant factor, factors in
a row are one, a sum with a matrix product is one call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torch_rmt.operators.tape import Program, Step, Value, mapped
from torch_rmt.operators.tape_memory import biases, early_sums, written_over
from torch_rmt.operators.tape_rewriting import Rewriter, each

_aten = torch.ops.aten
# Sums that are formed in another order may lie otherwise in memory, where `view` would refuse.
_T, _TRANSPOSE, _VIEW = _aten.t.default, _aten.transpose.int, _aten.reshape.default
_ADD, _SUB, _MUL = _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor
_SCALE, _SUM, _ADDCMUL = _aten.mul.Scalar, _aten.sum.dim_IntList, _aten.addcmul.default
# f(gradient, other tensors), linear in the gradient, entry by entry.
_SLOPES = {
    _aten.tanh_backward.default,
    _aten.sigmoid_backward.default,
    _aten.gelu_backward.default,
    _aten.silu_backward.default,
    _aten.threshold_backward.default,
    _aten.softplus_backward.default,
    _aten.mish_backward.default,
    _aten.hardtanh_backward.default,
    _aten.hardswish_backward.default,
    _aten.hardsigmoid_backward.default,
    _aten.leaky_relu_backward.default,
}
_SUMMED = {_aten.mm.default: _aten.addmm.default, _aten.bmm.default: _aten.baddbmm.default}


class Pool:
    """Constants of tapes, so that those of several tapes of one graph are held once."""

    def __init__(self) -> None:
        self._alike: dict[Any, list[Tensor]] = {}

    def one_of(self, a: Tensor) -> Tensor:
        """The constant that equals this one and was seen first."""
        ends = (float(a.view(-1)[0]), float(a.view(-1)[-1])) if a.is_contiguous() and a.numel() else ()
        alike = self._alike.setdefault((a.shape, a.stride(), a.dtype, ends), [])
        for b in alike:
            if torch.equal(a, b):
                return b
        alike.append(a)
        return a


def simplified(program: Program, pool: Pool | None = None) -> Program:
    """The same product in fewer operations; equal constants, here and in other tapes with this pool, are one."""
    pool = Pool() if pool is None else pool
    algebra = (_factors_named, _views, _shared(pool), _factors, _shared(pool), _sums)
    for rule in (*algebra, biases, early_sums, written_over):
        program = rule(program).without_waste()
    return program


def _factors_named(program: Program) -> Program:
    """Slopes, quotients and negatives as products with a constant; differences as sums."""

    def rule(work: Rewriter, step: Step) -> Step | None:
        f, args = step.function, step.args
        if f is _aten.view.default:
            return replace(step, function=_VIEW)
        if f in _SLOPES and not any(isinstance(a, Value) for a in args[1:]) and not step.kwargs:
            like = next(a for a in args[1:] if isinstance(a, Tensor))
            ones = torch.ones(step.shape, dtype=like.dtype, device=like.device)
            return replace(step, function=_MUL, args=(args[0], f(ones, *args[1:])))
        if f is _aten._log_softmax_backward_data.default and isinstance(args[1], Tensor):
            gradient, output, dim = args[:3]  # gradient - softmax * sum of the gradient
            total = (*step.shape[: dim % len(step.shape)], 1, *step.shape[dim % len(step.shape) + 1 :])
            work.keep(replace(step, function=_SUM, args=(gradient, [dim], True), results=(work.fresh(),), shape=total))
            return replace(step, function=_ADDCMUL, args=(gradient, Value(work.next - 1), -output.exp()))
        if f is _MUL and not isinstance(args[1], (Value, Tensor)):
            return replace(step, function=_SCALE)
        if f is _aten.div.Scalar or (f is _aten.div.Tensor and not isinstance(args[1], (Value, Tensor))):
            return replace(step, function=_SCALE, args=(args[0], 1.0 / args[1]))
        if f is _aten.div.Tensor and isinstance(args[1], Tensor):
            return replace(step, function=_MUL, args=(args[0], args[1].reciprocal()))
        if f is _aten.neg.default:
            return replace(step, function=_SCALE, args=(args[0], -1.0))
        if f is _MUL and isinstance(args[1], Value) and isinstance(args[0], Tensor):
            return replace(step, args=(args[1], args[0]))
        if f is _SUB:
            return replace(step, function=_ADD, kwargs={"alpha": -step.kwargs.get("alpha", 1)})
        if f is _ADD and isinstance(args[1], Tensor) and not bool(args[1].any()):
            made = work.made_by(args[0])
            if made is not None and (made.shape, made.dtype) == (step.shape, step.dtype):
                work.same[step.results[0]] = args[0]
                return None
        return step

    return each(program, rule)


def _views(program: Program) -> Program:
    """Transposes that cancel, views of views, transposes on both sides of a sum."""

    def rule(work: Rewriter, step: Step) -> Step | None:
        f, args = step.function, step.args
        before = work.made_by(args[0]) if args else None
        if f is _T and before is not None and before.function is _T:
            work.same[step.results[0]] = before.args[0]
            return None
        if f is _TRANSPOSE and before is not None and before.function is _TRANSPOSE and _dims(step) == _dims(before):
            work.same[step.results[0]] = before.args[0]
            return None
        if f is _VIEW and before is not None and before.function is _SUM and before.args[2:] == (True,):
            summed = {d % len(before.shape) for d in before.args[1]}
            rest = tuple(n for d, n in enumerate(before.shape) if d not in summed)
            if work.once(args[0]) and step.shape == rest:
                return replace(before, args=(*before.args[:2], False), results=step.results, shape=rest)
        if f is _VIEW and before is not None:
            if before.shape == step.shape:
                work.same[step.results[0]] = args[0]
                return None
            if before.function is _VIEW:
                source = work.made_by(before.args[0])
                if source is not None and source.shape == step.shape:
                    work.same[step.results[0]] = before.args[0]
                    return None
                return replace(step, args=(before.args[0], step.shape))
        if f is _ADD:
            sides = [s for s in map(work.made_by, args) if s is not None and s.function is _T and s.shape == step.shape]
            if len(sides) == 2:
                upright = tuple(s.args[0] for s in sides)
                work.keep(replace(step, args=upright, results=(work.fresh(),), shape=step.shape[::-1]))
                return replace(step, function=_T, args=(Value(work.next - 1),), kwargs={})
        return step

    return each(program, rule)


def _dims(step: Step) -> set[int]:
    return {d % len(step.shape) for d in step.args[1:]}


def _key(a: Any) -> Any:
    if isinstance(a, Tensor):
        return "constant", id(a)
    if isinstance(a, (tuple, list)):
        return tuple(_key(b) for b in a)
    return type(a), a


def _shared(pool: Pool) -> Callable[[Program], Program]:
    """What is computed twice is computed once; equal constants are one."""

    def run(program: Program) -> Program:
        seen: dict[Any, Tensor] = {}  # by place: all constants live until the rule has run
        made: dict[Any, tuple[int, ...]] = {}

        def constant(a: Any) -> Any:
            if not isinstance(a, Tensor):
                return a
            place = (a.data_ptr(), a.shape, a.stride(), a.dtype)
            if place not in seen:
                seen[place] = pool.one_of(a)
            return seen[place]

        def rule(work: Rewriter, step: Step) -> Step | None:
            step = replace(step, args=mapped(step.args, constant))
            key = (step.function, _key(step.args), tuple((k, _key(v)) for k, v in sorted(step.kwargs.items())))
            if key in made:
                work.same.update({r: Value(old) for r, old in zip(step.results, made[key], strict=True)})
                return None
            made[key] = step.results
            return step

        return each(program, rule)

    return run


def _factors(program: Program) -> Program:
    """Factors in a row are one factor."""

    def rule(work: Rewriter, step: Step) -> Step:
        while step.function in (_MUL, _SCALE) and not step.kwargs and work.once(step.args[0]):
            before = work.made_by(step.args[0])
            if before is None or before.function not in (_MUL, _SCALE) or isinstance(before.args[1], Value):
                break
            if isinstance(step.args[1], Value):
                break
            factor = before.args[1] * step.args[1]
            function = _MUL if isinstance(factor, Tensor) else _SCALE
            step = replace(step, function=function, args=(before.args[0], factor))
        return step

    return each(program, rule)


def _sums(program: Program) -> Program:
    """A sum with a matrix product, or with a multiple, is one operation."""

    def rule(work: Rewriter, step: Step) -> Step:
        if step.function is not _ADD or not all(isinstance(a, (Value, Tensor)) for a in step.args):
            return step
        alpha = step.kwargs.get("alpha", 1)
        for (other, term), (beta, weight) in (
            ((step.args[0], step.args[1]), (1, alpha)),
            ((step.args[1], step.args[0]), (alpha, 1)),
        ):
            made = work.made_by(term)
            if made is None or not work.once(term) or (made.shape, made.dtype) != (step.shape, step.dtype):
                continue
            if made.function in _SUMMED:
                sizes = {} if (beta, weight) == (1, 1) else {"beta": beta, "alpha": weight}
                return replace(step, function=_SUMMED[made.function], args=(other, *made.args), kwargs=sizes)
        for (other, term), (beta, weight) in (
            ((step.args[0], step.args[1]), (1, alpha)),
            ((step.args[1], step.args[0]), (alpha, 1)),
        ):
            made = work.made_by(term)
            if made is None or not work.once(term) or beta != 1 or made.kwargs:
                continue
            if made.function is _MUL and isinstance(made.args[1], Tensor):
                return replace(step, function=_ADDCMUL, args=(other, *made.args), kwargs={"value": weight})
            if made.function is _SCALE:
                weight = weight * made.args[1]
                return rule(work, replace(step, args=(other, made.args[0]), kwargs={"alpha": weight}))
        return step

    return each(program, rule)
