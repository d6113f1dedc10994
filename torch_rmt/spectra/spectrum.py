"""`Spectrum`: what was measured, with its cost and its error."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from torch_rmt.measures import Discrete


@dataclass(frozen=True)
class Spectrum:
    """A measured spectral distribution: `probes` weighted point measures, averaged.

    Row i of `nodes` and `weights` is the quadrature of probe i; an exact spectrum has one row whose nodes are
    the eigenvalues (of A for symmetric A, of A^T A otherwise) and whose weights are 1/dim.

    Standard errors rest on one identity, for a probe v uniform on the unit sphere of R^d and any
    function f, Var(v^T f(A) v) = 2 / (d + 2) * (mean f^2 - (mean f)^2), both means over the d
    eigenvalues. They are read off the measured quadrature itself, so that they hold for one probe as for
    many. The variance so read has noise of its own, by the same identity; it is inflated by
    nu / (nu - 2), nu its degrees of freedom, as Student's law asks, so that z-scores have root mean
    square one also where a single eigenvalue outweighs the rest.

    Fields:
        nodes: Ritz values or eigenvalues, `(probes, steps)`; unused places carry weight zero.
        weights: non-negative, each row sums to one.
        dim: number of eigenvalues of the measured operator.
        matvecs: products with the operator that were spent.
        method: "exact", "slq", ...; with the choices made on the way.
        seed: of the probe generator; None when nothing was drawn.
        symmetric: False when the nodes are squared singular values.
        notes: what was given up or replaced on the way, in words.
        known: the last `known` columns are not sampled: eigenvalues found one by one (or counted, as the
            zeros of a wide matrix are), the same in every row.
        known_count: how many of the `dim` eigenvalues these columns stand for.
        sampled: the part of each weight that a probe was drawn for; None where that is all but the known columns.

    >>> import numpy as np
    >>> spectrum = Spectrum(np.array([[1.0, 3.0]]), np.array([[0.5, 0.5]]), dim=2, matvecs=2, method="exact")
    >>> spectrum.moment(1), spectrum.moment(2)
    ((2.0, 0.0), (5.0, 0.0))
    """

    nodes: Float[np.ndarray, "probes steps"]
    weights: Float[np.ndarray, "probes steps"]
    dim: int
    matvecs: int
    method: str
    seed: int | None = None
    symmetric: bool = True
    notes: tuple[str, ...] = field(default=())
    known: int = 0
    known_count: int = 0
    sampled: Float[np.ndarray, "probes steps"] | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.nodes).all() and np.isfinite(self.weights).all()):
            raise ValueError("a spectrum needs finite nodes and weights: the operator's products were not finite")
        if (self.weights < 0).any() or np.abs(self.weights.sum(axis=1) - 1.0).max() > 1e-6:
            raise ValueError("the weights of a spectrum are non-negative and each row sums to one")

    @property
    def probes(self) -> int:
        """Number of probes that were drawn; zero when the spectrum is exact."""
        return 0 if self.seed is None else int(self.nodes.shape[0])

    @property
    def eigenvalues(self) -> Float[np.ndarray, " dim"] | None:
        """All eigenvalues in ascending order if the spectrum is exact, else None."""
        return np.sort(self.nodes[0]) if self.seed is None else None

    def measure(self) -> Discrete:
        """Average over the probes as a probability measure."""
        used = self.weights > 0
        weights = (self.weights / self.nodes.shape[0])[used]
        return Discrete(self.nodes[used], weights / weights.sum())

    def moment(self, k: int) -> tuple[float, float]:
        """Moment of order k and its standard error (zero when exact)."""
        value, error = self._expectation(self.nodes.astype(np.float64) ** k)
        return float(value), float(error)

    def trace(self) -> tuple[float, float]:
        """Trace of the measured operator (A, or A^T A where A is not symmetric) and its standard error."""
        value, error = self.moment(1)
        return self.dim * value, self.dim * error

    def cdf_standard_error(self, x: ArrayLike) -> Float[np.ndarray, ...]:
        """Error of the distribution function from having few probes: sqrt(2 F (1 - F) / ((dim + 2) probes)).

        F is taken over the sampled part of the spectrum. Zero when exact.
        """
        points = np.asarray(x, dtype=np.float64)
        if self.probes == 0:
            return np.zeros(points.shape)
        weights, share, dim = self._sampled()
        below = _cdf(self.nodes.ravel(), weights.ravel(), points)
        variance = 2.0 * below * (1.0 - below) / ((dim + 2) * self.probes)
        error: Float[np.ndarray, ...] = share * np.sqrt(np.maximum(variance, 0.0))
        return error

    @property
    def reach(self) -> float:
        """Size up to which a node may stand for eigenvalues that are zero, as most of a curvature matrix's are.

        Half the range over the number of steps: a Gauss rule has its nodes that far apart in the mean, so one that
        stands for a crowd may lie off by that. Zero when exact.
        """
        if self.probes == 0:
            return 0.0
        nodes = self.nodes[self.weights > 0]
        return float(nodes.max() - nodes.min()) / (2.0 * max(self.matvecs / self.probes, 1.0))

    def cdf_resolution(self, x: ArrayLike, zero: float = 0.0) -> Float[np.ndarray, ...]:
        """Typical error of the distribution function at each x that comes from having few nodes.

        Between two nodes of a Gauss rule the true distribution function differs from the step function by at
        most one weight (Chebyshev, Markov, Stieltjes) and by w / sqrt(12) in the root mean square where the
        density is smooth; w is the mean weight of the two neighbours, averaged over probes. Zero when exact.
        Its root sum of squares with the sampling error came within a factor of two of the truth on Hessians
        and random matrices, at 1 x 30 to 8 x 64. Nodes within `zero` of 0 are taken to be zeros and cost nothing.
        """
        points = np.asarray(x, dtype=np.float64)
        flat = points.ravel()
        total = np.zeros(flat.shape)
        if self.probes == 0:
            return total.reshape(points.shape)
        columns = self.nodes.shape[1] - self.known
        for nodes, weights in zip(self.nodes[:, :columns], self.weights[:, :columns], strict=True):
            order = np.argsort(nodes)
            unsure = np.where(np.abs(nodes) <= zero, 0.0, weights) if zero > 0 else weights
            padded = np.concatenate(([0.0], unsure[order], [0.0]))
            place = np.searchsorted(nodes[order], flat, side="right")
            outside = (place == 0) | (place == len(nodes))
            total += np.where(outside, 0.0, 0.5 * (padded[place] + padded[place + 1]))
        resolution: Float[np.ndarray, ...] = total / (self.probes * np.sqrt(12.0))
        return resolution.reshape(points.shape)

    def _sampled(self) -> tuple[Float[np.ndarray, "probes steps"], float, float]:
        """What was sampled: weights that add up to one, their share of the mass, eigenvalues they stand for."""
        weights = self.sampled
        if weights is None:
            weights = self.weights.copy()
            weights[:, weights.shape[1] - self.known :] = 0.0
        total = float(weights.sum())
        share = total / len(weights)
        return weights / total, share, share * self.dim

    def _expectation(self, values: Float[np.ndarray, "probes steps"]) -> tuple[float, float]:
        """Mean of f over the spectrum, given f at the nodes, and its standard error."""
        mean = float((self.weights * values).sum(axis=1).mean())
        if self.probes == 0:
            return mean, 0.0
        weights, share, dim = self._sampled()
        away = values - (weights * values).sum()
        size = float(np.abs(away).max(initial=0.0)) or 1.0  # squares of small numbers would vanish
        squares = (away / size) ** 2
        variance = float((weights * squares).sum())
        if variance == 0.0:
            return mean, 0.0
        relative = (weights * (squares / variance - 1.0) ** 2).sum()
        freedom = (dim + 2) * self.probes / max(float(relative), 1e-300)
        inflation = 1.0 + 2.0 / max(freedom - 2.0, 1.0)
        return mean, float(size * share * np.sqrt(inflation * 2.0 * variance / ((dim + 2) * self.probes)))


def _cdf(
    nodes: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], x: Float[np.ndarray, ...]
) -> Float[np.ndarray, ...]:
    order = np.argsort(nodes)
    cumulative = np.concatenate(([0.0], np.cumsum(weights[order])))
    places = np.searchsorted(nodes[order], x, side="right")
    return np.asarray(np.minimum(cumulative, 1.0)[places], dtype=np.float64)
