"""From a Lightning module and its batch to what is measured: a model, its inputs and targets, and a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from torch_rmt.operators.batches import labelled

LossFunction = Callable[[Any, Any], Tensor]
BatchFunction = Callable[[Any], tuple[Any, Any]]

_LOSS_NAMES = ("loss_fn", "criterion", "loss_func", "loss_function", "loss")  # as Lightning's users name it


def split_pair(batch: Any, model: nn.Module) -> tuple[Any, Any]:
    """Return `(inputs, targets)` of a batch that is such a pair, or a mapping with "labels".

    A mapping's other entries are keywords for the model; "labels" is one too if its forward has that argument.

    Raises:
        TypeError: the batch is anything else; the message says how to pass one's own function.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        if "labels" in batch:
            return labelled(batch, model)
        shape = f"a {type(batch).__name__} with keys {sorted(map(str, batch))}, without 'labels'"
    elif isinstance(batch, (tuple, list)):
        shape = f"a {type(batch).__name__} of {len(batch)}, not a pair (inputs, targets)"
    else:
        shape = f"a {type(batch).__name__}, not a pair (inputs, targets)"
    raise TypeError(f"the batch is {shape}; say which is which with batch=lambda batch: (inputs, targets).")


def find_loss(module: nn.Module) -> LossFunction | None:
    """Return the attribute of `module` that is called loss_fn, criterion, loss_func, loss_function or loss.

    Where several are there, the first of that order. None if none is there.
    """
    for name in _LOSS_NAMES:
        candidate = getattr(module, name, None)
        if callable(candidate):
            found: LossFunction = candidate
            return found
    return None


def find_model(module: nn.Module, name: str | None, *, has_forward: bool) -> nn.Module:
    """Return the network to measure: the submodule `name`, else `module`, else its only child with weights.

    Args:
        module: the LightningModule.
        name: a dotted module name, or None.
        has_forward: whether `module` defines `forward` itself.

    Raises:
        ValueError: no such submodule, or no choice is the only one; the message lists the candidates.
    """
    if name is not None:
        modules = dict(module.named_modules())
        if name in modules:
            found: nn.Module = modules[name]
            return found
        raise ValueError(f"there is no module {name!r}; model= takes one of {_listed([n for n in modules if n])}.")
    if has_forward:
        return module
    children = [(n, c) for n, c in module.named_children() if any(True for _ in c.parameters())]
    if len(children) == 1:
        return children[0][1]
    raise ValueError(
        f"{type(module).__name__} has no forward() and {len(children)} children with parameters; say which "
        f"one to measure with model=, one of {_listed([n for n, _ in children])}."
    )


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(repr(n) for n in names[:most]) + (", ..." if len(names) > most else "")
