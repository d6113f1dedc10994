"""The law of phi'(h)^2, h ~ N(0, q): the diagonal factor that an activation adds to a layer's Jacobian."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Complex, Float, Inexact

from torch_rmt.theory.activation import Activation
from torch_rmt.theory.contour import contour, corners
from torch_rmt.theory.gaussian import gaussian_rule

Points = Complex[np.ndarray, " points"]

_FEW = 4  # nodes up to which complex division costs less than its parts


@dataclass(frozen=True, eq=False)
class NodeLaw:
    """A law on [0, inf) as nodes and weights, with what quadrature nodes cannot tell: its true atoms and ranges.

    Fields:
        nodes, weights: E f(s) = sum p_k f(s_k) for f analytic in the closed upper half-plane less the support's
            neighbourhood, and for polynomials. Real for atoms; for a continuous part the s_k lie in the lower
            half-plane, so that E[s / (w - s)] keeps its accuracy as w comes down to the real axis.
        atoms: (s, mass) of the point masses, ascending.
        ranges: the intervals (low, high) that carry the continuous part.
        floor: below this s the nodes do not resolve the continuous part, for want of mass.
    """

    nodes: Inexact[np.ndarray, " nodes"]
    weights: Inexact[np.ndarray, " nodes"]
    atoms: tuple[tuple[float, float], ...]
    ranges: tuple[tuple[float, float], ...]
    floor: float = 0.0

    def moment(self, k: int) -> float:
        """E s^k."""
        return float((self.weights @ self.nodes**k).real)

    def mass_at(self, location: float) -> float:
        """Point mass at a location."""
        return float(sum(mass for s, mass in self.atoms if s == location))

    def scaled(self, factor: float) -> NodeLaw:
        """The law of factor * s."""
        return NodeLaw(
            self.nodes * factor,
            self.weights,
            tuple((s * factor, mass) for s, mass in self.atoms),
            tuple((low * factor, high * factor) for low, high in self.ranges),
            self.floor * factor,
        )

    def thinned(self, drop: float) -> NodeLaw:
        """The law of s m / (1 - drop)^2, m zero with probability `drop`, else one: slopes behind a dropout mask."""
        if drop == 0.0:
            return self
        kept = self.scaled((1.0 - drop) ** -2)
        atoms = dict(kept.atoms)
        masses = {s: mass * (1.0 - drop) for s, mass in atoms.items()}
        masses[0.0] = masses.get(0.0, 0.0) + drop
        return NodeLaw(
            np.concatenate([np.zeros(1, dtype=kept.nodes.dtype), kept.nodes]),
            np.concatenate([np.full(1, drop, dtype=kept.weights.dtype), (1.0 - drop) * kept.weights]),
            tuple(sorted(masses.items())), kept.ranges, kept.floor,
        )  # fmt: skip

    def holes(self) -> tuple[tuple[float, float], ...]:
        """The open intervals of (0, inf) without mass, the last one unbounded."""
        taken = sorted([(s, s) for s, _ in self.atoms] + list(self.ranges))
        holes, end = [], 0.0
        for low, high in taken:
            if low > end:
                holes.append((end, low))
            end = max(end, high)
        return (*holes, (end, float("inf")))

    def transform(self, w: Points) -> tuple[Points, Points, Points]:
        """M(w) = E[s / (w - s)], 1 + M(w) without cancellation, and M'(w), for Im w >= 0."""
        return cauchy_sums(self.nodes, self.weights, w)

    def mean_log(self, w: Points) -> Points:
        """E log(1 - s / w), Im w >= 0; the branch that vanishes at infinity."""
        return log_sums(self.nodes, self.weights, w)


@np.errstate(all="ignore")  # a trial point may hit a node
def cauchy_sums(
    nodes: Inexact[np.ndarray, " nodes"], weights: Inexact[np.ndarray, " nodes"], w: Points
) -> tuple[Points, Points, Points]:
    """sum p s / (w - s), sum p w / (w - s), and the derivative of the first."""
    mass = weights * nodes
    if len(nodes) <= _FEW:
        part = np.reciprocal(w - nodes[:, None])
        value, inverse = np.stack([mass, weights]).astype(complex) @ part
        part *= part
        return value, w * inverse, mass.astype(complex) @ -part
    # 1 / (w - s) = (x - i y) / (x^2 + y^2) by parts: numpy's complex division is four times slower.
    x = np.subtract.outer(w.real, nodes.real)
    y = np.subtract.outer(w.imag, nodes.imag)
    square = x * x
    square += y * y
    np.reciprocal(square, out=square)
    x *= square
    y *= square
    table = np.stack([mass.real, mass.imag, weights.real, weights.imag], axis=1)
    by_x, by_y = x @ table, y @ table
    value = (by_x[:, 0] + by_y[:, 1]) + 1j * (by_x[:, 1] - by_y[:, 0])
    inverse = (by_x[:, 2] + by_y[:, 3]) + 1j * (by_x[:, 3] - by_y[:, 2])
    np.multiply(x, y, out=square)
    x *= x
    y *= y
    x -= y
    by_x, by_y = x @ table[:, :2], (-2.0 * square) @ table[:, :2]
    slope = (by_x[:, 0] - by_y[:, 1]) + 1j * (by_x[:, 1] + by_y[:, 0])
    return value, w * inverse, -slope


def log_sums(nodes: Inexact[np.ndarray, " nodes"], weights: Inexact[np.ndarray, " nodes"], w: Points) -> Points:
    """sum p log(1 - s / w)."""
    # w - s stays in the upper half-plane, so that the principal branch is right whatever arg s is.
    x = np.subtract.outer(w.real, nodes.real)
    y = np.subtract.outer(w.imag, nodes.imag)
    angle = np.arctan2(y, x)
    np.multiply(x, x, out=x)
    np.multiply(y, y, out=y)
    x += y
    logs = 0.5 * np.log(x) @ weights + 1j * (angle @ weights)
    return np.asarray(logs - np.log(w))


def x_log_x(x: Points) -> Points:
    """x log x, zero at zero."""
    return np.asarray(x * np.log(np.where(x == 0, 1.0, x)))


def slope_law(activation: Activation | None, q: float, *, order: int = 14) -> NodeLaw:
    """The law of phi'(h)^2 for h ~ N(0, q); a point mass at one for a layer without activation.

    Piecewise-linear functions give exact atoms. Others give quadrature nodes on a path in the complex h-plane that
    leaves the real axis to the side where s = phi'^2 has a negative imaginary part: h + i t(h), t of the sign of
    -ds/dh, zero at kinks and at the extrema of s. An activation whose derivative does not take complex arrays gets
    four times as many nodes on the real axis instead, and about 1e-5 of accuracy where the law is thin.

    Raises:
        ValueError: the slope is zero or not finite everywhere that h reaches.
    """
    if activation is None:
        return NodeLaw(np.ones(1), np.ones(1), ((1.0, 1.0),), ())
    slopes = activation.slopes()
    h, weights = gaussian_rule(q, activation.kinks, order=order)
    if slopes is not None:
        return _from_atoms(_masses(h, weights, activation.kinks), [s * s for s in slopes])
    s = np.asarray(activation.derivative(h), dtype=np.float64) ** 2
    if not np.isfinite(s).all() or s.max() == 0.0:
        raise ValueError(f"the slope of activation {activation.name!r} is zero or not finite at q = {q:g}.")
    turns = corners(activation, float(np.sqrt(q)))
    constants, ranges = _ranges(activation, q, turns, h, s)
    path = contour(activation, q, order=order, turns=turns)
    if path is None:
        h, weights = gaussian_rule(q, activation.kinks, order=4 * order)
        s = np.asarray(activation.derivative(h), dtype=np.float64) ** 2
        nodes: Inexact[np.ndarray, " nodes"] = s
        masses: Inexact[np.ndarray, " nodes"] = weights
    else:
        h, nodes, masses = path
        if np.allclose(nodes, nodes[::-1], rtol=1e-12, atol=0) and np.allclose(masses, masses[::-1], rtol=1e-9, atol=0):
            # An even s: the path is point symmetric, and half of it will do.
            half = len(nodes) // 2
            h, nodes, masses = h[:half], nodes[:half], 2 * masses[:half]
    # Pieces of constant slope, such as the right half of ELU, are atoms.
    piece = np.searchsorted(np.array(activation.kinks), h)
    atoms: dict[float, float] = {}
    keep = np.ones(len(h), dtype=bool)
    for index, value in constants.items():
        here = piece == index
        atoms[value] = atoms.get(value, 0.0) + float(masses[here].sum().real)
        keep &= ~here
    listed = tuple(sorted(atoms.items()))
    nodes = np.concatenate([np.array([a for a, _ in listed]), nodes[keep]])
    masses = np.concatenate([np.array([m for _, m in listed]), masses[keep]])
    # The lowest 1e-9 of the mass, or the finest panel at a zero of phi'.
    order_of = np.argsort(np.abs(nodes))
    reached = np.cumsum(np.abs(masses[order_of])) > 1e-9
    floor = float(np.abs(nodes[order_of][np.argmax(reached)])) if ranges and min(ranges)[0] == 0.0 else 0.0
    return NodeLaw(nodes, masses / masses.sum().real, listed, tuple(_merged(ranges)), floor)


def _ranges(
    activation: Activation,
    q: float,
    turns: list[float],
    h: Float[np.ndarray, " nodes"],
    s: Float[np.ndarray, " nodes"],
) -> tuple[dict[int, float], list[tuple[float, float]]]:
    """Pieces of constant s, by their number, and the range of s on each other piece."""
    extrema = np.array([c for c in turns if c not in activation.kinks])
    # At a kink s has two limits, which no node reaches.
    beside = 1e-12 * max(1.0, float(np.sqrt(q)))
    extrema = np.concatenate([extrema] + [[k - beside, k + beside] for k in activation.kinks])
    h = np.concatenate([h, extrema])
    s = np.concatenate([s, np.asarray(activation.derivative(extrema), dtype=np.float64) ** 2])
    piece = np.searchsorted(np.array(activation.kinks), h)
    # s goes on beyond the nodes: far out it may fall to zero, which nodes within 9 deviations do not show.
    far = np.concatenate([-np.logspace(-3, 3, 200)[::-1], np.logspace(-3, 3, 200)])
    far_s = np.asarray(activation.derivative(far), dtype=np.float64) ** 2
    far_piece = np.searchsorted(np.array(activation.kinks), far)
    constants: dict[int, float] = {}
    ranges = []
    for index in np.unique(piece):
        part = s[piece == index]
        if np.ptp(part) <= 1e-13 * s.max():
            constants[int(index)] = float(np.median(part))
            continue
        low = float(min(part.min(), far_s[far_piece == index].min(initial=np.inf)))
        ranges.append((low if low > 1e-12 * part.max() else 0.0, float(part.max())))
    return constants, ranges


def _masses(
    h: Float[np.ndarray, " nodes"], weights: Float[np.ndarray, " nodes"], kinks: Sequence[float]
) -> Float[np.ndarray, " pieces"]:
    piece = np.searchsorted(np.array(kinks), h)
    return np.bincount(piece, weights, minlength=len(kinks) + 1)


def _from_atoms(masses: Float[np.ndarray, " pieces"], locations: Sequence[float]) -> NodeLaw:
    atoms: list[tuple[float, float]] = []
    for location, mass in sorted(zip(locations, (float(m) for m in masses), strict=True)):
        if atoms and location - atoms[-1][0] <= 1e-11 * location:
            atoms[-1] = (atoms[-1][0], atoms[-1][1] + mass)
        elif mass > 0:
            atoms.append((location, mass))
    total = sum(m for _, m in atoms)
    atoms = [(s, m / total) for s, m in atoms]
    return NodeLaw(np.array([s for s, _ in atoms]), np.array([m for _, m in atoms]), tuple(atoms), ())


def _merged(ranges: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged
