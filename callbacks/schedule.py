"""When to measure: a schedule is a plain function `step -> bool`."""

from __future__ import annotations

from collections.abc import Callable

Schedule = Callable[[int], bool]


def logarithmic_then_regular(step: int, *, first: int = 10, every: int = 500) -> bool:
    """Return True at 0, then at `first` times 1, 2, 4, 8, ..., and from `every` on at its multiples.

    The spectra of a network move fast at the beginning and slowly later, and so do the points.

    Args:
        step: number of optimiser steps done, at least 0.
        first: the first step after 0.
        every: the spacing once the doublings have reached it.

    Example:
        >>> [step for step in range(2100) if logarithmic_then_regular(step)]
        [0, 10, 20, 40, 80, 160, 320, 500, 1000, 1500, 2000]
    """
    if step == 0:
        return True
    if step >= every:
        return step % every == 0
    doublings, rest = divmod(step, first)
    return rest == 0 and doublings & (doublings - 1) == 0


def regular(every: int) -> Schedule:
    """Return the schedule that is True at every multiple of `every`.

    Raises:
        ValueError: `every` is below 1.

    Example:
        >>> [step for step in range(10) if regular(4)(step)]
        [0, 4, 8]
    """
    if every < 1:
        raise ValueError(f"every = {every}: measure every 1 or more steps.")

    def due(step: int) -> bool:
        return step % every == 0

    return due
