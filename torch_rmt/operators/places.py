"""Named places in a network: read what a module returned, put something else there, stop early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from torch_rmt.operators.pure import nearest
from torch_rmt.operators.trees import first_tensor, tree_map


@dataclass(frozen=True)
class Place:
    """The output of one call of one module; a module that is called several times is written `name#2`."""

    name: str
    module: nn.Module
    call: int

    def __str__(self) -> str:
        return self.name if self.call == 0 else f"{self.name}#{self.call + 1}"


class Reached(Exception):  # noqa: N818 - no error: the target is known, the rest of the pass is not needed
    """Carries the value at the target out of the forward pass."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def find_place(model: nn.Module, name: str) -> Place:
    """Look a place up by module name, `"net.3"`, or `"act#2"` for the second call.

    Raises:
        ValueError: no such module (with the nearest names), or a call number below 1.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    plain, _, number = name.partition("#")
    if plain not in modules or not plain:
        known = [n for n in modules if n]
        raise ValueError(f"{type(model).__name__} has no module {name!r}; {nearest(plain, known)}")
    if number and not (number.isdigit() and int(number) >= 1):
        raise ValueError(f"{name!r}: the call after # counts from 1, as in '{plain}#2'")
    return Place(plain, modules[plain], int(number) - 1 if number else 0)


def replace_first(tree: Any, value: Tensor) -> Any:
    """Put a tensor in the place of the first tensor of an output (an LSTM returns a tuple)."""
    done: list[bool] = []

    def swap(t: Tensor) -> Tensor:
        if done:
            return t
        done.append(True)
        return value

    return tree_map(swap, tree)


def tensor_at(place: Place, output: Any) -> Tensor:
    """Return the first tensor of a module's output; TypeError where there is none."""
    t = first_tensor(output)
    if t is None:
        raise TypeError(f"module {str(place)!r} returns a {type(output).__name__} without tensors; name another one")
    return t


def shifted_by(place: Place, shift: Tensor, output: Any) -> Any:
    """Add a shift to a module's output: the derivative by the shift is the derivative by the output."""
    return replace_first(output, tensor_at(place, output) + shift)


@contextmanager
def hooked(place: Place, action: Callable[[Any], Any]) -> Iterator[list[int]]:
    """Call `action(output)` at this place, whose result (if any) replaces it; yields the count of calls."""
    calls = [0]

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        here = calls[0] == place.call
        calls[0] += 1
        return action(output) if here else None

    handle = place.module.register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def check_called(place: Place, calls: int, asked: str) -> None:
    """ValueError unless the place was passed and its name is unambiguous."""
    if calls <= place.call:
        times = "not called" if calls == 0 else f"called only {calls} time{'s' if calls > 1 else ''}"
        raise ValueError(f"module {place.name!r} is {times} in this forward pass; name a module that is used")
    if calls > 1 and "#" not in asked:
        raise ValueError(
            f"module {place.name!r} is called {calls} times in one forward pass; say which call, as in "
            f"'{place.name}#1' to '{place.name}#{calls}'"
        )


def leaves(names: dict[nn.Module, str]) -> list[nn.Module]:
    """Modules without children; what parametrises a weight (`weight_norm`, `orthogonal`) is part of its module."""
    inner = {m for m in names if isinstance(m, ParametrizationList) for m in m.modules()}
    return [m for m in names if names[m] and m not in inner and not (set(m.children()) - _parametrisations(m))]


def _parametrisations(module: nn.Module) -> set[nn.Module]:
    held = getattr(module, "parametrizations", None)
    return {held} if isinstance(held, nn.ModuleDict) else set()
