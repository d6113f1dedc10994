"""What theory knows of an activation: value, derivative and kinks, on NumPy arrays."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import numpy as np
from jaxtyping import Float

from torch_rmt.theory.closed_forms import GaussianMoments

Array = Float[np.ndarray, "..."]
Number = float | int  # what users pass where a float is meant; checked at run time in the tests
ArrayFunction = Callable[[Array], Array]


@dataclass(frozen=True)
class Activation:
    """A scalar function with its derivative and the points where either jumps.

    Fields:
        name: "tanh", "relu", ...; for a user's callable its `__name__`.
        value, derivative: act elementwise on float64 arrays of any shape.
        kinks: points where the derivative (or the value) is not smooth; quadrature is split there.
        closed: Gaussian moments in closed form where they are known; None leaves them to quadrature, except that
            piecewise-linear functions get theirs from their kinks and slopes.
    """

    name: str
    value: ArrayFunction
    derivative: ArrayFunction
    kinks: tuple[float, ...] = ()
    closed: GaussianMoments | None = None

    def slopes(self) -> tuple[float, ...] | None:
        """The slope of each piece, from left to right, if the function is piecewise linear; else None.

        Example:
            >>> as_activation("relu").slopes()
            (0.0, 1.0)
            >>> as_activation("tanh").slopes() is None
            True
        """
        ends = np.array([-60.0, *self.kinks, 60.0])
        # Irrational multiples, so that a periodic function is not met at its period.
        inside = np.modf(np.arange(1, 400) * (np.sqrt(5) - 1) / 2)[0]
        with np.errstate(over="ignore", invalid="ignore"):
            slopes = np.asarray(self.derivative(ends[:-1, None] + np.diff(ends)[:, None] * inside), dtype=np.float64)
        if not np.isfinite(slopes).all() or np.ptp(slopes, axis=1).max() > 1e-9 * max(1.0, float(np.abs(slopes).max())):
            return None
        return tuple(float(s) for s in np.median(slopes, axis=1))


@singledispatch
def as_activation(activation: object) -> Activation:
    """Return the `Activation` of a name, of an `Activation`, or of any callable on arrays.

    Names: see `activation_names()`; "erf" is erf(h) and "scaled_erf" is erf(sqrt(pi) h / 2), of slope one at 0.
    A callable is differentiated numerically (1e-12 on functions of scale one) and searched for kinks in [-32, 32].
    `torch_rmt.describe` registers modules and tensor functions here.

    Raises:
        ValueError: an unknown name (with the nearest ones), or a function that jumps or is not finite.
        TypeError: neither a name nor callable on arrays.

    Example:
        >>> as_activation("relu").kinks
        (0.0,)
        >>> as_activation(lambda h: np.maximum(h, -1.0)).kinks
        (-1.0,)
    """
    from torch_rmt.theory.numeric_activation import from_callable

    if not callable(activation):
        raise TypeError(
            "an activation is a name such as 'tanh', an Activation or a callable on arrays, "
            f"not {type(activation).__name__}."
        )
    return from_callable(activation)


@as_activation.register
def _(activation: Activation) -> Activation:
    return activation


@as_activation.register
def _(activation: str) -> Activation:
    from torch_rmt.theory.named_activations import ACTIVATIONS, canonical

    key = canonical(activation)
    if key not in ACTIVATIONS:
        near = difflib.get_close_matches(key, ACTIVATIONS, n=3, cutoff=0.4)
        hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"unknown activation {activation!r}.{hint} Known: {', '.join(ACTIVATIONS)}; "
            "any callable on arrays works too."
        )
    return ACTIVATIONS[key]


def activation_names() -> tuple[str, ...]:
    """Return the names that `as_activation` knows."""
    from torch_rmt.theory.named_activations import ACTIVATIONS

    return tuple(ACTIVATIONS)


def leaky_relu(slope: Number = 0.01) -> Activation:
    """h for h > 0, slope * h below; slope 0 is ReLU, 1 the identity.

    Example:
        >>> leaky_relu(0.2).value(np.array([-1.0, 3.0])).tolist()
        [-0.2, 3.0]
    """
    if not np.isfinite(slope):
        raise ValueError(f"the slope must be finite, got {slope}.")
    return Activation(
        name=f"leaky_relu({slope:g})",
        value=lambda h: np.where(h > 0, h, slope * h),
        derivative=lambda h: np.where(h > 0, 1.0, slope),
        kinks=(0.0,),
    )
