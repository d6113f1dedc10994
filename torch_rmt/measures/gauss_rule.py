"""A law on few nodes that stands for one on many: the Gauss rule of a discrete measure."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

_Vector = Float[np.ndarray, " n"]


def gauss_rule(
    nodes: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], size: int
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Nodes and weights of at most `size` points with the same integrals of all polynomials up to degree 2 size - 1.

    sum_i w_i f(x_i) = sum_k W_k f(X_k); the X_k lie inside the range of the x_i and the W_k are positive. Outside the
    range the Stieltjes transform is met to an error that falls geometrically with `size`. By the Lanczos process on
    diag(x) from the vector of the roots of the weights, whose tridiagonal matrix is the rule's Jacobi matrix.

    Raises:
        ValueError: size below one.

    Source: Golub and Welsch 1969; Gautschi 2004, Orthogonal polynomials, section 2.2.

    >>> x, w = gauss_rule(np.linspace(-1.0, 1.0, 1001), np.full(1001, 1 / 1001), 2)
    >>> x.round(2), w.round(2)                             # nearly that of Legendre, +-1/sqrt(3)
    (array([-0.58,  0.58]), array([0.5, 0.5]))
    """
    if size < 1:
        raise ValueError(f"a rule needs at least one node, got size = {size}")
    used = weights > 0
    x, w = nodes[used], weights[used]
    total = w.sum()
    centre, half = 0.5 * (x.max() + x.min()), 0.5 * (x.max() - x.min())
    if half == 0.0:
        return np.array([centre]), np.array([total])
    y = (x - centre) / half
    steps = min(size, y.size)
    basis = np.empty((steps, y.size))
    basis[0] = np.sqrt(w / total)
    diagonal, off = np.empty(steps), np.empty(steps)
    for k in range(steps):
        vector = y * basis[k]
        diagonal[k] = vector @ basis[k]
        vector -= diagonal[k] * basis[k]
        if k:
            vector -= off[k - 1] * basis[k - 1]
        # full reorthogonalisation: after the recursion once is enough
        known = basis[: k + 1]
        vector -= (known @ vector) @ known
        off[k] = np.linalg.norm(vector)
        if off[k] < 1e-12:
            steps = k + 1
            break
        if k + 1 < steps:
            np.divide(vector, off[k], out=basis[k + 1])
    diagonal, off = diagonal[:steps], off[: steps - 1]
    places, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(off, -1))  # reads the lower triangle
    return centre + half * places, total * vectors[0] ** 2
