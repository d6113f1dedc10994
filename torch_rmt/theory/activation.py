"""What theory knows of an activation: value, derivative and kinks, on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

ArrayFunction = Callable[[Float[np.ndarray, "..."]], Float[np.ndarray, "..."]]


@dataclass(frozen=True)
class Activation:
    """A scalar function with its derivative and the points where either jumps.

    Fields:
        name: "tanh", "relu", ...; for a user's callable its `__name__`.
        value, derivative: act elementwise on float64 arrays of any shape.
        kinks: points where the derivative (or the value) is not smooth; quadrature is split there.
    """

    name: str
    value: ArrayFunction
    derivative: ArrayFunction
    kinks: tuple[float, ...] = ()
