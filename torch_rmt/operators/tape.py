"""A product with a kept graph, written down once as a list of operations and played for every further vector.

Automatic differentiation walks its graph anew for each vector and does again what does not depend on the vector:
slopes of activations, centred and scaled inputs of a normalisation, transposes. A tape records one such walk below
autograd, keeps the results of all operations that the vector does not enter as constants, and simplifies the rest
(`tape_rules`). What it replays is checked against the graph before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

Tensors = tuple[Tensor, ...]


class TapeError(RuntimeError):
    """The walk cannot be written down; the message says why."""


@dataclass(frozen=True)
class Value:
    """A tensor that depends on the vector, by its number."""

    index: int


@dataclass(frozen=True)
class Step:
    """One operation: `results = function(*args, **kwargs)`; arguments hold Values, constants and plain numbers.

    A result that is no tensor has the number -1; shape and dtype are those of the first.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def reads(self) -> list[int]:
        """Numbers of the values among the arguments, as often as they occur."""
        return [v.index for v in leaves((self.args, tuple(self.kwargs.values()))) if isinstance(v, Value)]


@dataclass(frozen=True)
class Program:
    """Steps from `inputs` values (the first numbers) to outputs, each a Value or a constant."""

    inputs: int
    steps: tuple[Step, ...]
    outputs: tuple[Any, ...]

    def uses(self) -> dict[int, int]:
        """How often each value is read; an output counts twice, since it must survive."""
        count: dict[int, int] = {}
        for step in self.steps:
            for index in step.reads():
                count[index] = count.get(index, 0) + 1
        for output in self.outputs:
            if isinstance(output, Value):
                count[output.index] = count.get(output.index, 0) + 2
        return count

    def without_waste(self) -> Program:
        """Only the steps that an output needs."""
        needed = {o.index for o in self.outputs if isinstance(o, Value)}
        kept: list[Step] = []
        for step in reversed(self.steps):
            if needed.intersection(step.results):
                kept.append(step)
                needed.update(step.reads())
        return replace(self, steps=tuple(reversed(kept)))


def length(tensors: Tensors) -> Tensor:
    """Euclidean norm of some tensors together."""
    norm: Tensor = torch.stack([t.norm() for t in tensors]).norm()
    return norm


def leaves(tree: Any) -> list[Any]:
    """All that is in nested tuples and lists."""
    if isinstance(tree, (tuple, list)):
        return [leaf for branch in tree for leaf in leaves(branch)]
    return [tree]


def mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Nested tuples and lists with the function applied to what is in them."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(mapped(branch, function) for branch in tree)
    return function(tree)


def record(product: Callable[[Tensors], Tensors], vectors: Tensors) -> tuple[Program, Tensors]:
    """Write down how `product` turns these vectors into its result, and return that result too.

    Raises:
        TapeError: an operation writes into a tensor that something else looks at, or depends on the vector's values.
    """
    recorder = _Recorder(vectors)
    with recorder:
        results = product(vectors)
    outputs = tuple(recorder.known.get(t, None) for t in results)
    constants = tuple(t.detach() if o is None else Value(o) for t, o in zip(results, outputs, strict=True))
    return Program(len(vectors), tuple(recorder.steps), constants).without_waste(), results


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows tensors that depend on the inputs; weakly, so that recording holds no more memory than running."""

    def __init__(self, inputs: Tensors) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.known: Any = WeakIdKeyDictionary()
        self.family: list[int] = []  # values that look at the same memory share a number
        self.constants: set[int] = set()  # memory that steps refer to
        for t in inputs:
            self._name(t, None)

    def _name(self, t: Tensor, family: int | None) -> int:
        index = len(self.family)
        self.family.append(index if family is None else family)
        self.known[t] = index
        return index

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in leaves((args, tuple(kwargs.values()))) if isinstance(t, Tensor)]
        dependent = any(t in self.known for t in tensors)
        schema = func._schema
        if schema.is_mutable:
            target = args[0]
            self._may_write(func, target, dependent)
        if not dependent or func in _READS_SHAPE:
            return func(*args, **kwargs)
        if func in _READS_VALUES:
            raise TapeError(f"{func} depends on the vector's values")
        before = mapped(args, self._argument), {key: mapped(a, self._argument) for key, a in kwargs.items()}
        result = func(*args, **kwargs)
        if schema.is_mutable:
            self._step(_functional(func), before, (self._name(args[0], None),), args[0])
            return result
        seen = next((self.family[self.known[t]] for t in tensors if t in self.known), None)
        looks = func in _UNSAFE_VIEWS or any(r.alias_info is not None for r in schema.returns)
        if looks and any(result is t for t in tensors):
            return result
        made = [t for t in leaves(result) if isinstance(t, Tensor)]
        if not made:
            raise TapeError(f"{func} returns something else than tensors")
        parts = result if isinstance(result, (tuple, list)) else (result,)
        names = tuple(self._name(t, seen if looks else None) if isinstance(t, Tensor) else -1 for t in parts)
        self._step(func, before, names, made[0])
        return result

    def _step(self, func: Any, given: tuple[Any, dict[str, Any]], results: tuple[int, ...], first: Tensor) -> None:
        self.steps.append(Step(func, tuple(given[0]), given[1], results, tuple(first.shape), first.dtype))

    def _argument(self, a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        if a in self.known:
            return Value(self.known[a])
        self.constants.add(a.untyped_storage()._cdata)
        return a.detach()

    def _may_write(self, func: Any, target: Any, dependent: bool) -> None:
        """Writing is the same as making a new tensor where nobody else looks at the old one."""
        writes = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
        if writes.count(True) != 1 or not writes[0] or not isinstance(target, Tensor):
            raise TapeError(f"{func} writes into other arguments than its first")
        if target in self.known:
            mine = self.family[self.known[target]]
            if sum(self.family[i] == mine for t, i in self.known.items()) > 1:
                raise TapeError(f"{func} writes into memory that another tensor looks at")
        elif target.untyped_storage()._cdata in self.constants:
            raise TapeError(f"{func} writes into a constant")
        if dependent:
            _functional(func)


_READS_SHAPE = {
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.ones_like.default,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.new_ones.default,
}
_READS_VALUES = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
_UNSAFE_VIEWS = {torch.ops.aten._unsafe_view.default, torch.ops.aten._reshape_alias.default}


def _functional(func: Any) -> Any:
    """The operation that returns what this one writes."""
    name, overload = func._schema.name.removeprefix("aten::"), func._overloadname
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    found = getattr(packet, overload, None)
    if found is None:
        raise TapeError(f"{func} writes into its argument")
    return found
