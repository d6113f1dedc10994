"""What models take and return that is no tensor: tuples, mappings, dataclasses, what `torch.utils._pytree` knows."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def tree_map(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply a function to every tensor of tuples, lists, mappings, dataclasses and pytree nodes; leave the rest."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(tree_map(function, t) for t in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(tree_map(function, t) for t in tree)
    if type(tree) is dict:
        return {key: tree_map(function, value) for key, value in tree.items()}
    if type(tree) in pytree.SUPPORTED_NODES:
        return pytree.tree_map(lambda leaf: tree_map(function, leaf), tree)
    if isinstance(tree, Mapping):
        entries = {key: tree_map(function, value) for key, value in tree.items()}
        if not isinstance(tree, MutableMapping):
            return entries
        tree = copy.copy(tree)
        for key, value in entries.items():
            tree[key] = value
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        original, tree = tree, copy.copy(tree)
        for field in dataclasses.fields(original):
            object.__setattr__(tree, field.name, tree_map(function, getattr(original, field.name)))
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors of a tree, in the order of `tree_map`."""
    found: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        found.append(t)
        return t

    tree_map(keep, tree)
    return found


def part_of(tree: Any, samples: int, part: slice, times: int = 1) -> Any:
    """A tree for some of so many samples, so many times over.

    Tensors whose first dimension is a multiple of the samples (tokens, say) are cut along it, others (a mask, say)
    stay whole; whether that is right, the caller must check.
    """

    def piece(t: Tensor) -> Tensor:
        if t.ndim == 0 or t.shape[0] % samples:
            return t
        each = t.shape[0] // samples
        some = t[part.start * each : part.stop * each]
        return some if times == 1 else torch.cat([some] * times)

    return tree_map(piece, tree)


def first_tensor(tree: Any) -> Tensor | None:
    """The first tensor in nested tuples, lists and dicts."""
    found = tensors_of(tree)
    return found[0] if found else None


def entries_of(output: Any) -> str:
    """What an output holds, for a message."""
    if dataclasses.is_dataclass(output):
        names = [f.name for f in dataclasses.fields(output)]
    elif isinstance(output, Mapping):
        names = [str(key) for key in output]
    elif isinstance(output, (tuple, list)):
        return f" of {len(output)}"
    else:
        return ""
    return " with " + ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def picked(whole: str, output: Any) -> str:
    """Code that takes the logits, or the first floating tensor with rows, out of an output."""
    if dataclasses.is_dataclass(output):
        pairs = [(f".{f.name}", getattr(output, f.name)) for f in dataclasses.fields(output)]
    elif isinstance(output, Mapping):
        pairs = [(f"[{key!r}]", value) for key, value in output.items()]
    elif isinstance(output, (tuple, list)):
        pairs = [(f"[{i}]", value) for i, value in enumerate(output)]
    else:
        pairs = []
    tensors = [how for how, t in pairs if isinstance(t, Tensor) and t.is_floating_point() and t.ndim > 0]
    named = [how for how in tensors if "logits" in how]
    return f"{whole}{(*named, *tensors, '.logits')[0]}"
