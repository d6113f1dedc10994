"""The parts of a chain of unlike layers, and a solution at many points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Complex

from torch_rmt.theory.slope_law import NodeLaw

Points = Complex[np.ndarray, " points"]
Inner = Complex[np.ndarray, "kinds points"]


@dataclass(frozen=True, eq=False)
class Kind:
    """`count` factors with one law s of mean one, seen through u = scale * M: adds count * log(u w / (1 + u)) to log z.

    w solves E[s / (w - s)] = u.
    """

    law: NodeLaw
    scale: float
    count: float


@dataclass(frozen=True)
class Term:
    """A factor in closed form: adds count * log(a + b M) to log z."""

    a: float
    b: float
    count: float


@dataclass(frozen=True, eq=False)
class State:
    """A solution at one or many points: y = log M and v_k = log w_k, with the slopes that Newton needs.

    Fields:
        y, v: the unknowns.
        t: log z that they give, exact once `mismatch` is zero.
        rate: dt / dy with the w_k following.
        pull: d log M_k / d v_k.
        mismatch: log M_k(w_k) - log(scale_k M).
    """

    y: Points
    v: Inner
    t: Points
    rate: Points
    pull: Inner
    mismatch: Inner


def take(state: State, where: np.ndarray, *, lost: bool = False) -> State:
    """The state at some of its points; all NaN if lost."""
    part = State(
        state.y[where], state.v[:, where], state.t[where], state.rate[where], state.pull[:, where],
        state.mismatch[:, where],
    )  # fmt: skip
    if lost:
        nan = np.full_like(part.y, np.nan)
        part = State(nan, np.full_like(part.v, np.nan), nan, nan, part.v * np.nan, part.v * np.nan)
    return part


def put(state: State, where: np.ndarray, part: State) -> State:
    """The state with some of its points replaced."""

    def merge(whole: np.ndarray, piece: np.ndarray) -> np.ndarray:
        whole = whole.copy()
        whole[..., where] = piece
        return whole

    names: Sequence[str] = ("y", "v", "t", "rate", "pull", "mismatch")
    return State(*(merge(getattr(state, name), getattr(part, name)) for name in names))
