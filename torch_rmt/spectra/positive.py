"""Positive semi-definite operators: their estimated nodes do not fall below zero, their errors are not hidden."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float

from torch_rmt.operators.base import LinearOperator

_ROUNDINGS = 100.0  # times eps sqrt(dim) times the largest: what a Ritz value may fall below zero by rounding


def clipped(
    nodes: Float[np.ndarray, "probes nodes"], operator: LinearOperator, ritz: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "probes nodes"]:
    """Nodes of an operator that says it is positive, with those below zero moved to zero; others as they are.

    A node may lie there by rounding, or because a tail continues the density a little beyond its edge. `ritz` are
    the Ritz values without a tail: one further below zero than rounding allows is an eigenvalue below zero.

    Raises ValueError in that case.
    """
    if not operator.positive or not ritz.size:
        return nodes
    lowest, size = float(ritz.min()), float(np.abs(ritz).max())
    slack = _ROUNDINGS * float(torch.finfo(operator.dtype).eps) * operator.shape[1] ** 0.5 * size
    if lowest < -slack:
        raise ValueError(
            f"{type(operator).__name__} says that it is positive semi-definite and has an eigenvalue near "
            f"{lowest:.3g} (largest {size:.3g}): its products are wrong, or change from one to the next (dropout, "
            "batch normalisation in train mode)"
        )
    above: Float[np.ndarray, "probes nodes"] = np.maximum(nodes, 0.0)
    return above
