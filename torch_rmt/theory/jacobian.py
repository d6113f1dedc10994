"""`jacobian_spectrum`: the law of J^T J of a deep network at initialisation."""

from __future__ import annotations

import numpy as np

from torch_rmt.measures import Discrete, PointMass
from torch_rmt.measures.base import SpectralMeasure
from torch_rmt.theory.architecture import Architecture, Layer, Residual
from torch_rmt.theory.atomic_chain import AtomicChain
from torch_rmt.theory.block_size import expected_block_distance
from torch_rmt.theory.factors import Factors, collect
from torch_rmt.theory.finite_size import expected_distance
from torch_rmt.theory.jacobian_law import JacobianLaw
from torch_rmt.theory.prediction import Prediction
from torch_rmt.theory.propagation import BlockSignal, Signal, branch_gain, gradient_gain, propagate
from torch_rmt.theory.residual import block_assumptions, checked_blocks, every_layer, has_blocks

_REFERENCE = "Pennington, Schoenholz and Ganguli 2017, eq. (14); 2018 for the universality of its limits"


def jacobian_spectrum(architecture: Architecture) -> Prediction:
    """Predict the law of J^T J, J = D_L W_L ... D_1 W_1 the Jacobian from the input to the last layer's output.

    A residual block multiplies J by D (1 + A), A the Jacobian of its branch: the symmetrised singular laws of 1 and A
    add freely, and the squared singular laws of blocks and layers multiply freely, at any depth and size of branch. A
    projection B in the place of 1 may change the width: the rectangular R-transforms of A and B add.

    log z = log((1 + M) / M) + sum_l [log 1/S_{W_l} + log 1/S_{D_l^2}(n_0 M / n_l)], M = z G - 1, normalised on the n_0
    dimensions of the input; D_l^2 has the law of phi'(sqrt(q_l) Z)^2.

    Returns:
        A `Prediction` whose measure solves the equation on the real axis, with scalars
        "mean", "variance", "chi" (geometric mean over layers and blocks), "chi/<layer>", "q/<layer>",
        "branch/<block>" (E|A|^2), "largest_eigenvalue", "condition" (of J; only if finite).

    Raises:
        ValueError: a layer without slope, a signal that diverges, or a block that `checked_blocks` refuses.

    Source: Pennington, Schoenholz and Ganguli 2017, eq. (14); unlike widths and residual blocks derived and simulated
    here.

    Example:
        >>> prediction = jacobian_spectrum(Architecture.mlp(depth=4, width=200, activation="relu", sigma_w=2**0.5))
        >>> round(prediction.scalars["mean"], 10), round(prediction.measure.atoms()[0][1], 10)
        (1.0, 0.5)
    """
    checked_blocks(architecture.layers)
    signals = propagate(architecture)
    measure = law_of(collect(architecture, signals))
    return Prediction(
        measure=measure,
        scalars=_scalars(architecture, signals, measure),
        assumptions=_assumptions(architecture),
        reference=_REFERENCE,
        finite_size_error=_finite_size_error(architecture, signals, measure),
    )


def law_of(factors: Factors) -> SpectralMeasure:
    """The measure of collected factors, by whichever solver fits them."""
    single = factors.single_law()
    if single is not None:
        locations, masses = single
        with np.errstate(over="ignore", under="ignore"):
            places = [float(np.exp(location)) for location in locations]
        return PointMass(places[0]) if len(places) == 1 else Discrete(places, masses)
    solver = factors.solver()
    atoms = solver.atoms() if isinstance(solver, AtomicChain) else factors.log_atoms()
    return JacobianLaw(solver, factors.log_scale, atoms, factors.moments())


def _finite_size_error(
    architecture: Architecture, signals: tuple[Signal, ...], measure: SpectralMeasure
) -> float | None:
    """None where a mask adds its own scatter, or a norm takes that of q away: `expected_distance` knows neither."""
    if any(layer.dropout > 0 for layer in every_layer(architecture.layers)):
        return None
    if has_blocks(architecture):
        return expected_block_distance(architecture, signals, measure) if isinstance(measure, JacobianLaw) else None
    if any(layer.normalisation is not None for layer in architecture.layers):
        return None
    return expected_distance(architecture, tuple(signal.q for signal in signals), measure)


def _scalars(architecture: Architecture, signals: tuple[Signal, ...], measure: SpectralMeasure) -> dict[str, float]:
    scalars: dict[str, float] = {}
    logs = []
    for index, (layer, signal) in enumerate(zip(architecture.layers, signals, strict=True)):
        name = layer.name or str(index)
        chi = gradient_gain(layer, signal)
        scalars[f"chi/{name}"], scalars[f"q/{name}"] = chi, signal.q
        if isinstance(signal, BlockSignal) and isinstance(layer, Residual):
            scalars[f"branch/{name}"] = branch_gain(layer, signal)
        logs.append(np.log(chi) if chi > 0 else -np.inf)
    scalars["chi"] = float(np.exp(np.mean(logs)))
    scalars["mean"], scalars["variance"] = measure.mean, measure.variance
    low, high = measure.bounds()
    if np.isfinite(high):
        scalars["largest_eigenvalue"] = high
        if low > 0:
            scalars["condition"] = float(np.sqrt(high / low))
    return scalars


def _assumptions(architecture: Architecture) -> tuple[str, ...]:
    layers = tuple(every_layer(architecture.layers))
    plain = [layer for layer in layers if isinstance(layer, Layer)]
    lines = [
        "weights independent of each other and of the signal, at initialisation",
        "wide layers: eigenvalues of one drawn network scatter about the law, more so with depth / width",
    ]
    smooth = any(layer.activation is not None and layer.activation.slopes() is None for layer in layers)
    if smooth:
        lines.append(
            "q of each layer at its mean-field value: in one drawn network the common fluctuation of q, of order "
            "1 / sqrt(width), shifts the whole spectrum; compare in log lambda"
        )
    if architecture.input_second_moment is None and any(layer.q is None for layer in layers):
        lines.append("every pre-activation at the fixed point q* of its layer")
    if any(layer.dropout > 0 for layer in layers):
        lines.append("one dropout mask a forward pass, drawn independently of the weights")
    if any(layer.normalisation in ("layer", "rms") for layer in layers):
        lines.append("a normalisation over units divides by their root mean square; the direction it removes is one")
    if any(layer.normalisation == "batch" for layer in layers):
        lines.append("batch statistics of many inputs that are independent of each other, held fixed for one of them")
    if any(not isinstance(layer.ensemble, str | PointMass) for layer in plain):
        lines.append("measured weight spectra taken as free from what follows and precedes them")
    lines += block_assumptions(architecture.layers)
    lines += [f"not understood and left out: {name}" for name in architecture.unknown]
    return tuple(lines)
