"""The parts of a chain of unlike layers, and a solution at many points."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Complex, Float

Points = Complex[np.ndarray, " points"]
Inner = Complex[np.ndarray, "unknowns points"]
Reals = Float[np.ndarray, " points"]
Flags = Bool[np.ndarray, " points"]
Bounds = Float[np.ndarray, " unknowns"]

_HAIR = 1e-8  # of a number: what iterations leave of an imaginary part that is none
_NAMES = ("y", "v", "t", "rate", "follow", "correction", "lag")  # the fields of a State


@dataclass(frozen=True)
class Term:
    """A factor in closed form: adds count * log(a + b M) to log z."""

    a: float
    b: float
    count: float


@dataclass(frozen=True, eq=False)
class State:
    """A solution at one or many points: y = log M and the inner unknowns v, with the slopes that Newton needs.

    Fields:
        y, v: the unknowns.
        t: log z that they give, exact once `correction` is zero.
        rate: dt / dy with the v following.
        follow: dv / dy.
        correction: the Newton step of v at fixed y.
        lag: what that step adds to t, to first order.
    """

    y: Points
    v: Inner
    t: Points
    rate: Points
    follow: Inner
    correction: Inner
    lag: Points


@dataclass(frozen=True, eq=False)
class Share:
    """What one part of a chain adds to a `State`: to t, rate and lag, and the rows of its own unknowns."""

    t: Points
    rate: Points
    lag: Points
    follow: Inner
    correction: Inner


class Part(ABC):
    """A factor of the master equation with unknowns of its own, each the logarithm of a number off the real axis.

    Their imaginary parts lie between `low` and `high` where z is in the open upper half-plane.

    Fields:
        count: how often the factor is taken.
    """

    count: float

    @property
    @abstractmethod
    def size(self) -> int:
        """How many unknowns it has."""

    @property
    @abstractmethod
    def low(self) -> Bounds:
        """Below the imaginary parts of the unknowns."""

    @property
    @abstractmethod
    def high(self) -> Bounds:
        """Above them."""

    @property
    @abstractmethod
    def turn(self) -> Bounds:
        """Their values where z is negative."""

    @property
    @abstractmethod
    def has_gaps(self) -> bool:
        """Whether its own spectrum may be in several pieces."""

    @abstractmethod
    def evaluate(self, y: Points, v: Inner) -> Share:
        """Its share at log M = y."""

    @abstractmethod
    def start(self, m: Reals) -> Inner:
        """The unknowns at real M > -1, from scratch; NaN where the factor does not reach."""

    @abstractmethod
    def primitive(self, m: Points, v: Inner) -> Points:
        """Integral of its share of t over M, from 0."""

    @abstractmethod
    def order_at(self, lowest: float) -> float:
        """With which power of M + lowest its factor of z vanishes as M falls to -lowest."""

    @abstractmethod
    def gapped_below(self, lowest: float) -> bool:
        """Whether its unknowns are analytic where M passes -lowest, so that it lets the spectrum end above zero."""

    def contained(self, y: Points, v: Inner) -> Flags:
        """Whether what `low` and `high` do not say of the half-planes holds too."""
        return np.ones(y.shape, dtype=bool)


def log_one_plus(x: Points) -> Points:
    """log(1 + x), where rounding carries a real x < -1 to neither side of the cut: it is seen from below."""
    value = np.log(1.0 + x)
    on_cut = (x.real < -1.0) & (np.abs(x.imag) < _HAIR * np.abs(x.real))
    return np.asarray(np.where(on_cut, value.real - 1j * np.pi, value))


def take(state: State, where: np.ndarray, *, lost: bool = False) -> State:
    """The state at some of its points; all NaN if lost."""
    part = State(*(getattr(state, name)[..., where] for name in _NAMES))
    return State(*(getattr(part, name) * np.nan for name in _NAMES)) if lost else part


def joined(first: State, second: State, order: np.ndarray) -> State:
    """The points of both states, in an order."""
    both = (np.concatenate([getattr(first, name), getattr(second, name)], axis=-1)[..., order] for name in _NAMES)
    return State(*both)


def put(state: State, where: np.ndarray, part: State) -> State:
    """The state with some of its points replaced."""

    def merge(whole: np.ndarray, piece: np.ndarray) -> np.ndarray:
        whole = whole.copy()
        whole[..., where] = piece
        return whole

    return State(*(merge(getattr(state, name), getattr(part, name)) for name in _NAMES))
