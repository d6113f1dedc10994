"""Points of the closed upper half-plane: every formula is written there, the lower half follows by conjugation."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Complex
from numpy.typing import ArrayLike

# NumPy writes "complex" where it means any number, which run-time checkers take literally
Numbers = np.ndarray | complex | float | int | ArrayLike


def fold(z: Numbers) -> tuple[Complex[np.ndarray, "..."], Bool[np.ndarray, "..."]]:
    """Reflect z into the closed upper half-plane (imaginary part +0.0 on the axis) and say what was reflected."""
    points = np.asarray(z, dtype=complex)
    below = np.asarray(points.imag < 0)
    folded = np.empty_like(points)
    folded.real = points.real
    folded.imag = np.abs(points.imag)
    return folded, below


def unfold(values: Numbers, below: Bool[np.ndarray, "..."]) -> Complex[np.ndarray, "..."]:
    """Undo `fold` on the values of a function with f(conj z) = conj f(z)."""
    return np.asarray(np.where(below, np.conj(values), values))


def two_cut_root(z: np.ndarray, low: float | int, high: float | int) -> np.ndarray:
    """sqrt((z - low)(z - high)) cut along [low, high], of order z at infinity; z in the closed upper half-plane."""
    return np.asarray(np.sqrt(z - low) * np.sqrt(z - high))
