"""`Spectrum`: what was measured, with its cost and its error."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from torch_rmt.measures import Discrete


@dataclass(frozen=True)
class Spectrum:
    """A measured spectral distribution: `probes` weighted point measures, averaged.

    Row i of `nodes` and `weights` is the quadrature of probe i; an exact spectrum has one row whose nodes are
    the eigenvalues (of A for symmetric A, of A^T A otherwise) and whose weights are 1/dim.

    Fields:
        nodes: Ritz values or eigenvalues, `(probes, steps)`; unused places carry weight zero.
        weights: non-negative, each row sums to one.
        dim: number of eigenvalues of the measured operator.
        matvecs: products with the operator that were spent.
        method: "exact", "slq", ...; with the choices made on the way.
        seed: of the probe generator; None when nothing was drawn.
        symmetric: False when the nodes are squared singular values.
        notes: what was given up or replaced on the way, in words.
    """

    nodes: Float[np.ndarray, "probes steps"]
    weights: Float[np.ndarray, "probes steps"]
    dim: int
    matvecs: int
    method: str
    seed: int | None = None
    symmetric: bool = True
    notes: tuple[str, ...] = field(default=())

    def measure(self) -> Discrete:
        """Average over the probes as a probability measure."""
        raise NotImplementedError

    def moment(self, k: int) -> tuple[float, float]:
        """Moment of order k and its standard error over the probes (zero when exact)."""
        raise NotImplementedError
