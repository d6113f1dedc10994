"""Sizes as the laws of networks take them: whole numbers, checked, with an error that names the argument."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def whole_number(name: str, value: object, least: int = 1) -> int:
    """`value` as an int, if it is a whole number of at least `least`; a float such as 100.0 will do.

    Raises:
        ValueError: anything else: NaN, infinity, 2.5, None, a string, a bool.

    >>> whole_number("n_in", 100.0)
    100
    """
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool) and np.isfinite(value):
        whole = int(value)
        if whole == value and whole >= least:
            return whole
    raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def checked_widths(widths: Iterable[object]) -> tuple[int, ...]:
    """Widths (n_0, ..., n_L) as a tuple of ints.

    Raises:
        ValueError: fewer than two, or one that is not a whole number of at least 1.
    """
    given = tuple(widths)
    if len(given) < 2:
        raise ValueError(f"widths are (n_0, ..., n_L), at least two, got {given}")
    return tuple(whole_number(f"every one of the widths {given}", n) for n in given)


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse what is not among the choices.

    Raises:
        ValueError: with the choices in it.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
