"""Outputs that are no tensor: which of their tensors a loss depends on, as one tensor with a row for each sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_rmt.operators.losses import Loss, are_classes, checked_loss, ignored_class
from torch_rmt.operators.trees import entries_of, picked, tensors_of, tree_map


def as_rows(tensors: Sequence[Tensor]) -> Tensor:
    """The floating tensors side by side, with as many rows as all of them can be cut into."""
    floating = [t for t in tensors if t.is_floating_point()]
    rows = math.gcd(*(t.shape[0] if t.ndim else 1 for t in floating))
    return torch.cat([t.reshape(max(1, rows), -1) for t in floating], dim=1)


def check_taken(loss: Loss, output: Any, targets: Any) -> None:
    """TypeError, with the remedy, where a loss does not take what the model returns."""
    try:
        loss(output, targets)
    except (TypeError, AttributeError) as problem:
        raise TypeError(
            f"the loss does not take the model's output, a {type(output).__name__}{entries_of(output)} ({problem}): "
            f"pass loss=lambda output, target: your_loss({picked('output', output)}, target)"
        ) from problem


def loss_gradients(loss: Loss, output: Any, targets: Any) -> dict[int, Tensor]:
    """Gradient of the loss by each tensor of the output that it depends on, by their places among all tensors."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors_of(output)]
    with torch.enable_grad():
        rest = iter(leaves)
        value = checked_loss(loss(tree_map(lambda _: next(rest), output), targets))
        places = [i for i, t in enumerate(leaves) if t.requires_grad]
        if not (places and value.requires_grad):
            return {}
        found = torch.autograd.grad(value, [leaves[i] for i in places], allow_unused=True)
    return {i: g for i, g in zip(places, found, strict=True) if g is not None}


def unread_targets(loss: Loss, output: Any, targets: Any) -> int | None:
    """How many of each row's first targets a loss of classes does not read, as one of shifted tokens; None if unknown.

    `cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())` has no slope at the last logits: where it has
    one, at small logits, is compared with the targets that are not ignored, one place further on.
    """
    if not are_classes(targets) or targets.ndim < 2:
        return None
    small = tree_map(lambda t: t / t.abs().amax().clamp_min(1.0) if t.is_floating_point() else t, output)
    try:
        slopes = loss_gradients(loss, small, targets)
    except (RuntimeError, ValueError, TypeError):
        return None
    counted = targets != ignored_class(loss)
    for slope in slopes.values():
        for classes in range(1, slope.ndim):
            if (*slope.shape[:classes], *slope.shape[classes + 1 :]) != targets.shape:
                continue
            read = (slope != 0).any(classes)
            for unread in range(targets.shape[1] if bool(read.any()) else 0):
                width = targets.shape[1] - unread
                if torch.equal(read[:, :width], counted[:, unread:]) and not bool(read[:, width:].any()):
                    return unread
    return None


def places_by_sample(loss: Loss, output: Any, targets: Any, samples: int) -> tuple[int, ...]:
    """Which tensors of an output the loss depends on.

    Raises:
        ValueError: it depends on none.
        TypeError: one of them has no rows for the samples, as the mean loss that a model has computed itself.
    """
    found = loss_gradients(loss, output, targets)
    if not found:
        raise ValueError(
            "the loss does not depend on what the model returns; look for detach() or a loss of targets only"
        )
    for g in found.values():
        if (g.ndim == 0 and samples > 1) or (g.ndim > 0 and g.shape[0] % samples):
            raise TypeError(
                f"the loss takes a tensor of shape {tuple(g.shape)} from the output, which has no row for each of "
                f"{samples} samples, so there are no gradients sample by sample; let the loss compute the mean itself, "
                "for example loss=lambda output, target: F.cross_entropy(output.logits, target)"
            )
    return tuple(found)
