"""An `Activation` from any callable on arrays: its kinks found, its derivative by differences that respect them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from torch_rmt.theory.activation import Activation, Array, ArrayFunction

_SPAN = 32.0
# Central difference of eighth order (Fornberg 1988, table 1).
_STENCIL = np.array([4 / 5, -1 / 5, 4 / 105, -1 / 280])
# Error h^8 f^(9) / 630 against rounding eps / h: both below 1e-12 on a function of scale one.
_STEP = 0.02


def from_callable(function: Callable[..., object], name: str | None = None) -> Activation:
    """Wrap a callable on float64 arrays; the derivative is numerical.

    Raises:
        TypeError: the callable does not map an array to a real array of the same shape.
        ValueError: it is not finite on [-32, 32], or its value jumps (chi would be infinite).
    """
    label = name or str(getattr(function, "__name__", type(function).__name__))

    def value(h: Array) -> Array:
        return np.asarray(function(h), dtype=np.float64)

    points = np.linspace(-_SPAN, _SPAN, 9).reshape(3, 3)
    try:
        result = value(points)
    except Exception as error:
        raise TypeError(
            f"activation {label!r} does not take a NumPy array ({error}). For a torch function or module pass it "
            "through torch_rmt.describe, or give an Activation(name, value, derivative, kinks)."
        ) from error
    if result.shape != points.shape:
        raise TypeError(f"activation {label!r} does not act elementwise: shape {points.shape} became {result.shape}.")
    if not np.isfinite(value(np.linspace(-_SPAN, _SPAN, 1025))).all():
        raise ValueError(f"activation {label!r} is not finite on [-{_SPAN:g}, {_SPAN:g}].")
    kinks = find_kinks(value)
    return Activation(label, value, numeric_derivative(value, kinks), kinks)


def numeric_derivative(value: ArrayFunction, kinks: tuple[float, ...] = ()) -> ArrayFunction:
    """Derivative by an eighth-order central difference whose stencil never crosses a kink."""
    at = np.array(kinks)

    def derivative(h: Array) -> Array:
        h = np.asarray(h, dtype=np.float64)
        # Powers of two keep the steps exact; far out the step grows with h, as the spacing of floats does.
        step = np.full(h.shape, _STEP) * np.maximum(1.0, np.abs(h) / 64)
        if at.size:
            gap = np.abs(h[..., None] - at).min(axis=-1)
            step = np.clip(gap / 4.001, 1e-7, step)
        total = np.zeros(h.shape)
        for k, weight in enumerate(_STENCIL, start=1):
            total += weight * (value(h + k * step) - value(h - k * step))
        return np.asarray(total / step)

    return derivative


def find_kinks(value: ArrayFunction) -> tuple[float, ...]:
    """Points of [-32, 32] where the slope or the curvature jumps; the former to about 1e-12, the latter to 1e-9.

    In a smooth stretch the change of slope across a cell halves with the cell; at a kink it stays. Cells that keep it
    through all halvings hold a kink, which is then placed where the quintics through the points on either side meet.

    Raises:
        ValueError: the value itself jumps.
    """

    def slope(h: Array) -> Array:
        return np.asarray((value(h + 1e-6) - value(h - 1e-6)) / 2e-6)

    _refuse_jumps(value)
    kinks = _jumps_of_slope(value, halvings=16, least=1e-7, known=[])
    return tuple(sorted(kinks + _jumps_of_slope(slope, halvings=9, least=1e-3, known=kinks)))


def _refuse_jumps(value: ArrayFunction) -> None:
    """In a continuous stretch the change of value across a cell halves with the cell; at a jump it stays."""
    width = 1 / 64
    low = np.arange(-_SPAN, _SPAN, width) + 0.3137 * width
    change = np.abs(value(low + width) - value(low))
    for _ in range(20):
        width /= 2
        low, parent = np.concatenate([low, low + width]), np.concatenate([change, change])
        change = np.abs(value(low + width) - value(low))
        keep = (change > 0.7 * parent) & (change > 1e-6)
        low, change = low[keep], change[keep]
        if low.size == 0:
            return
    raise ValueError(
        f"the activation jumps near {float(low[0]):.6g}: it has no derivative there and chi is infinite. Use a "
        "continuous one."
    )


def _jumps_of_slope(value: ArrayFunction, halvings: int, least: float, known: list[float]) -> list[float]:
    width = 1 / 64
    # The offset keeps kinks at round numbers off the cell boundaries.
    low = np.arange(-_SPAN, _SPAN, width) + 0.3137 * width
    change = _slope_change(value, low, width)
    low, change = low[np.abs(change) > least], change[np.abs(change) > least]
    for _ in range(halvings):
        width /= 2
        low, parent = np.concatenate([low, low + width]), np.concatenate([change, change])
        change = _slope_change(value, low, width)
        keep = np.abs(change) > 0.7 * np.abs(parent)
        low, change = low[keep], change[keep]
        if low.size == 0:
            return []
    if low.size > 2000:
        raise ValueError("the activation has kinks everywhere: give an Activation(name, value, derivative, kinks).")
    kinks: list[float] = []
    # Neighbours see part of a kink; the cell that holds it sees all of it.
    order = np.argsort(-np.abs(change), kind="stable")
    for start, slope in zip(low[order], change[order], strict=True):
        if any(abs(start - other) < 4e-4 for other in known):
            continue
        place = _meet(value, float(start), float(start + width), float(slope))
        place = float(round(place, 8)) if abs(place - round(place, 8)) < 2e-10 else place
        if not any(abs(place - other) < 4e-4 for other in kinks):
            kinks.append(place + 0.0)
    return kinks


def _slope_change(value: ArrayFunction, low: Float[np.ndarray, " cells"], width: float) -> Float[np.ndarray, " cells"]:
    right = value(low + 2 * width) - value(low + width)
    left = value(low) - value(low - width)
    return np.asarray((right - left) / width)


def _meet(value: ArrayFunction, low: float, high: float, slope_change: float) -> float:
    """Where the quintic through six points left of `low` meets that through six points right of `high`."""
    spacing = 2e-3  # found by tuning: smaller loses digits to rounding, larger to the curvature of either side
    steps = spacing * np.arange(6)
    left = np.polyfit(-steps / spacing, value(low - steps), 5)
    right = np.polyfit(steps / spacing, value(high + steps), 5)
    x = (low + high) / 2
    for _ in range(4):
        gap = np.polyval(right, (x - high) / spacing) - np.polyval(left, (x - low) / spacing)
        x -= float(gap) / slope_change
    return x if low - 1e-6 < x < high + 1e-6 else (low + high) / 2
