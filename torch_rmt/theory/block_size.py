"""How far one drawn residual network of finite width lies from its law: the expected Kolmogorov distance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Complex

from torch_rmt.theory.activation import Activation
from torch_rmt.theory.architecture import Architecture, Layer, Residual
from torch_rmt.theory.block import Block
from torch_rmt.theory.chain import Chain
from torch_rmt.theory.finite_size import RIGID, SUPREMUM, units_of
from torch_rmt.theory.gaussian import gaussian_expectation
from torch_rmt.theory.jacobian_law import JacobianLaw
from torch_rmt.theory.propagation import BlockSignal, Signal, branch_gain, propagate
from torch_rmt.theory.residual import every_layer, slopes_persist

Points = Complex[np.ndarray, " points"]

_POINTS = 16
_STEP = 1e-3  # relative change of the signal, for the response to it
# What slopes that persist from block to block move the distribution function, whatever the width: 0.02 (tanh) to 0.055
# (ReLU) in drawn networks of 4 to 12 blocks, x + W phi(norm x) and x + W_2 phi(W_1 phi(norm x)).
_PERSISTING = 0.04


def expected_block_distance(architecture: Architecture, signals: tuple[Signal, ...], measure: JacobianLaw) -> float:
    """Expected Kolmogorov distance between the law of a chain with blocks and one network of these widths.

    Linear response, as in `expected_distance`: with w_l the subordinate points of the n_l units of a layer, inside a
    branch at its own M = a, F(t) moves by (n_l / n_0) Im log(1 - s / w_l) / pi of what is drawn. The signal in front of
    block l, v_l, moves by the sum of what earlier branches drew, each of variance (4 v b + 2 b^2 + b^2 Var phi^2 /
    (E phi^2)^2) / n, b the branch's mean square; and F by Im a_l / pi times the change of log E|A_l|^2. Derived here;
    simulated in tests/theory/test_residual.py within a factor of two.
    """
    n = min(min(layer.n_in, layer.n_out) for layer in every_layer(architecture.layers))
    # Of the distribution function a narrow place leaves but its share to values that are not zero.
    kept = min(1.0, min(layer.n_out for layer in architecture.layers) / architecture.layers[0].n_in)
    rigid = RIGID * kept / n
    solver = measure.solver
    if not isinstance(solver, Chain):
        return rigid
    zero = sum(mass for location, mass in measure.log_atoms if location == -np.inf)
    levels = zero + (1 - zero) * (np.arange(_POINTS) + 0.5) / _POINTS
    w, m = solver.solve(measure.rough_log_quantile(levels) - measure.log_scale)
    found = np.isfinite(m) & (np.abs(m.imag) > 1e-9)
    if not found.any():
        return rigid
    w, m = w[:, found], m[found]
    places = [
        (kind, w[rows][0]) for kind, rows in zip(solver.kinds, solver.rows, strict=True) if isinstance(kind, Block)
    ]
    inside = [_nearest(places, layer, signal) for layer, signal in zip(architecture.layers, signals, strict=True)]
    variance = _drawn_units(architecture, signals, m, inside) + _drawn_signal(architecture, signals, m, inside)
    spread = float(np.sqrt(2 / np.pi) * SUPREMUM * np.sqrt(variance.max()))
    return min(1.0, float(np.hypot(np.hypot(spread, rigid), _PERSISTING * slopes_persist(architecture.layers))))


def _nearest(places: list[tuple[Block, Points]], layer: Layer | Residual, signal: Signal) -> Points | None:
    """a of the solved block that is most like this one; None for a layer."""
    if not isinstance(layer, Residual):
        return None
    gain = np.log(branch_gain(layer, signal))
    return min(places, key=lambda place: float(abs(place[0].log_scale - gain)))[1]


def _drawn_units(
    architecture: Architecture, signals: tuple[Signal, ...], m: Points, inside: list[Points | None]
) -> np.ndarray:
    """Variance of F from the slopes of the drawn units."""
    variance, known = np.zeros(m.shape), dict[tuple[int, int, int, int], np.ndarray]()

    def add(layer: Layer | Residual, signal: Signal, u: Points, width: int) -> None:
        nonlocal variance
        if layer.activation is None or signal.q <= 0:
            return
        key = id(layer.activation), layer.n_out, round(20 * float(np.log(signal.q))), id(u)
        if key not in known:
            # Beyond the negative axis by reflection: the share there is the mirror image.
            lower = u.real - 1j * np.abs(u.imag)
            starts = np.zeros((0, len(u)), dtype=complex)
            known[key] = units_of(layer.activation, signal.q, layer.n_out / width, lower, starts).share_share
        variance = variance + known[key] / layer.n_out

    first = architecture.layers[0].n_in
    for layer, signal, a in zip(architecture.layers, signals, inside, strict=True):
        if a is not None and isinstance(layer, Residual) and isinstance(signal, BlockSignal):
            for part, one in zip(layer.branch, signal.branch, strict=True):
                add(part, one, a, layer.n_in)
        add(layer, signal, m, first)
    return variance


def _drawn_signal(
    architecture: Architecture, signals: tuple[Signal, ...], m: Points, inside: list[Points | None]
) -> np.ndarray:
    """Variance of F from the mean square of the signal, which each branch moves by what it draws."""
    moved = replace(architecture, input_second_moment=(architecture.input_second_moment or 1.0) * (1.0 + _STEP))
    effects: list[np.ndarray] = []
    noise: list[float] = []
    ends: list[np.ndarray | None] = []
    for layer, signal, other, a in zip(architecture.layers, signals, propagate(moved), inside, strict=True):
        if a is None or not isinstance(layer, Residual) or not isinstance(signal, BlockSignal):
            continue
        change = np.log(branch_gain(layer, other) / branch_gain(layer, signal))
        v = signal.incoming
        shift = np.log(other.incoming / v) if isinstance(other, BlockSignal) else _STEP
        effects.append(a.imag / np.pi * (change / shift if shift else 0.0) / v)
        b = max(signal.q * signal.divisor - v, 0.0) if not layer.shortcut else signal.q * signal.divisor
        last = next((part for part in reversed(layer.branch) if part.activation is not None), None)
        tail = _kurtosis(last.activation) if last is not None and last.activation is not None else 2.0
        noise.append((4.0 * v * b + (2.0 + tail) * b**2) / layer.n_out)
        # A norm of the sum takes the change off the signal, and puts it on the scale of the Jacobian.
        ends.append(-m.imag / np.pi / signal.divisor if layer.normalisation is not None else None)
    total = np.zeros(m.shape)
    for index, one in enumerate(noise):
        stop = next((k for k in range(index, len(ends)) if ends[k] is not None), len(ends))
        later = sum(effects[index + 1 : stop + 1], np.zeros(m.shape))
        scale = ends[stop] if stop < len(ends) else None
        total = total + one * (later if scale is None else later + scale) ** 2
    return total


def _kurtosis(activation: Activation) -> float:
    """Var phi^2 / (E phi^2)^2 at q = 1."""
    second = gaussian_expectation(lambda h: np.asarray(activation.value(h)) ** 2, 1.0, activation.kinks)
    fourth = gaussian_expectation(lambda h: np.asarray(activation.value(h)) ** 4, 1.0, activation.kinks)
    return fourth / second**2 - 1.0
