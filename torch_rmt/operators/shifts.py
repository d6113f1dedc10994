"""The network as a function of shifts of its modules' outputs: derivatives by a shift are those by the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from torch_rmt.operators.engines import Differentiable, Tensors
from torch_rmt.operators.places import Place, hooked, shifted_by
from torch_rmt.operators.pure import PureModel


def by_shifts(
    pure: PureModel, inputs: Any, places: Sequence[Place], zeros: Tensors, finish: Callable[[Tensor], Tensor]
) -> Differentiable:
    """`finish(output)` by shifts added at the places, taken where all shifts are `zeros`.

    A checkpointed part that runs again in the backward pass must find the shifts that it found before, or it saves
    other tensors; so modules that are called once are shifted then, too.
    """
    forward = [False]
    modules = [place.module for place in places]

    def shifted(*shifts: Tensor) -> Tensor:
        forward[0] = True
        try:
            with ExitStack() as stack:
                for place, shift in zip(places, shifts, strict=True):
                    stack.enter_context(hooked(place, partial(shifted_by, place, shift)))
                output = pure(pure.params, inputs)
        finally:
            forward[0] = False
        return finish(output)

    def within(shifts: Tensors, thunk: Callable[[], Any]) -> Any:
        with ExitStack() as stack:
            for place, shift in zip(places, shifts, strict=True):
                if modules.count(place.module) == 1:
                    again = partial(_again, forward, place, shift)
                    stack.callback(place.module.register_forward_hook(again).remove)
            return pure.within(pure.params, thunk)

    return Differentiable(shifted, zeros, pure.guarded, within)


def _again(forward: list[bool], place: Place, shift: Tensor, _module: Any, _args: Any, output: Any) -> Any:
    return None if forward[0] else shifted_by(place, shift, output)
