"""`phase_diagram`: the order-to-chaos picture of an activation over (sigma_w, sigma_b)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from torch_rmt.measures.half_plane import Numbers
from torch_rmt.theory.activation import as_activation
from torch_rmt.theory.critical import CriticalPoint, critical_point
from torch_rmt.theory.mean_field import checked_sigma, depth_scale, length_fixed_point
from torch_rmt.theory.moments import length_slope, moment_table, second_moment, slope_moment

Grid = Float[np.ndarray, "biases weights"]


@dataclass(frozen=True, eq=False)
class PhaseDiagram:
    """chi and q* over a grid, and the critical sigma_w of each row.

    Fields:
        sigma_w, sigma_b: the grid's axes.
        chi, q_star: over the grid, rows by sigma_b; q_star is inf where signals diverge.
        depth_scale_q: layers over which q settles.
        critical_sigma_w: for each sigma_b the sigma_w with chi = 1 at a stable q*; NaN where there is none.
        natural: the critical point of the activation that needs no choice.
    """

    sigma_w: Float[np.ndarray, " weights"]
    sigma_b: Float[np.ndarray, " biases"]
    chi: Grid
    q_star: Grid
    depth_scale_q: Grid
    critical_sigma_w: Float[np.ndarray, " biases"]
    natural: CriticalPoint

    def phase(self) -> np.ndarray:
        """ "ordered", "critical" or "chaotic" at each grid point; critical within 1e-6 of chi = 1."""
        names = np.where(self.chi < 1, "ordered", "chaotic")
        return np.where(np.abs(self.chi - 1) < 1e-6, "critical", names)


def phase_diagram(activation: object, sigma_w: Numbers | None = None, sigma_b: Numbers | None = None) -> PhaseDiagram:
    """chi(sigma_w, sigma_b) = sigma_w^2 E phi'(sqrt(q*) Z)^2 with q* of each point, and the critical line.

    Args:
        activation: a name, an `Activation` or a callable.
        sigma_w, sigma_b: axes of the grid; defaults cover the neighbourhood of criticality.

    Raises:
        ValueError: an axis that is empty, not one-dimensional, or below zero.

    Source: Poole et al. 2016, fig. 1; Schoenholz et al. 2017, fig. 1.

    Example:
        >>> diagram = phase_diagram("tanh", [0.9, 1.1, 2.0], [0.05])
        >>> diagram.phase().tolist(), round(float(diagram.critical_sigma_w[0]), 4)
        ([['ordered', 'ordered', 'chaotic']], 1.1225)
    """
    phi = as_activation(activation)
    natural = critical_point(phi)
    centre = natural.sigma_w if np.isfinite(natural.sigma_w) else 1.5
    weights = _axis("sigma_w", np.linspace(0.5, 2.0, 16) * centre if sigma_w is None else sigma_w)
    biases = _axis("sigma_b", np.linspace(0.0, 0.5, 6) if sigma_b is None else sigma_b)
    q_star, chi, scale = (np.empty((len(biases), len(weights))) for _ in range(3))
    for i, b in enumerate(biases):
        for j, w in enumerate(weights):
            q_star[i, j] = length_fixed_point(phi, float(w), float(b))
            seen = min(float(q_star[i, j]), 1e9)
            chi[i, j] = w**2 * slope_moment(phi, seen)
            scale[i, j] = depth_scale(w**2 * length_slope(phi, seen))
    line = [critical_point(phi, sigma_b=b) for b in biases]
    return PhaseDiagram(
        weights,
        biases,
        chi,
        q_star,
        scale,
        np.array([point.sigma_w if point.kind != "none" else np.nan for point in line]),
        natural,
    )


def _axis(name: str, values: Numbers) -> Float[np.ndarray, " points"]:
    axis = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if axis.ndim != 1 or axis.size == 0:
        raise ValueError(f"{name} is one axis of the grid: give one value or a list of them.")
    return np.array([checked_sigma(name, float(v)) for v in axis])


def critical_line(activation: object, q: Sequence[float] | None = None) -> Float[np.ndarray, "3 points"]:
    """(q, sigma_w, sigma_b) along the curve chi = 1, for q on a logarithmic grid or as given; only sigma_b >= 0.

    Example:
        >>> critical_line("tanh", [0.15369193]).round(4).ravel().tolist()
        [0.1537, 1.1225, 0.05]
    """
    phi = as_activation(activation)
    if q is None:
        table, V, D, _ = moment_table(phi)
        values = np.array([table, V, D])
    else:
        values = np.array([[x, second_moment(phi, x), slope_moment(phi, x)] for x in q]).T
    points, V, D = values
    with np.errstate(divide="ignore"):
        weight = 1.0 / D
        bias = points - weight * V
    real = (bias >= -1e-12 * points) & np.isfinite(weight)
    return np.array([points[real], np.sqrt(weight[real]), np.sqrt(np.maximum(bias[real], 0.0))])
