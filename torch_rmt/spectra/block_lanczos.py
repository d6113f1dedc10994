"""The block Lanczos recurrence: all probes share one Krylov space, which resolves far more than each alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from torch_rmt.guard import full_precision
from torch_rmt.operators.base import LinearOperator
from torch_rmt.spectra.probes import column_norms, require_finite, require_symmetric

_ENTRIES_FOR_TWO_PASSES = 2**22  # of a basis so small that orthogonalising twice costs nothing


@dataclass(frozen=True)
class BlockTridiagonal:
    """A Q = Q T + Q_{m+1} B_m E_m^T for orthonormal Q = (Q_1 .. Q_m), blocks of `width` columns each.

    Fields:
        matrix: T, symmetric block tridiagonal, `steps` blocks of order `width`.
        coupling: B_m, upper triangular; the residual of the Ritz pair (theta, Q s) has length |B_m s_last|.
        start: R of the start vectors, V = Q_1 R.
        basis: rows q_1, q_2, ...; `steps * width` of them.
    """

    matrix: Float[np.ndarray, "rows rows"]
    coupling: Float[np.ndarray, "width width"]
    start: Float[np.ndarray, "width probes"]
    basis: Float[Tensor, "rows dim"]


@full_precision()
def block_lanczos(operator: LinearOperator, start: Float[Tensor, "dim width"], steps: int) -> BlockTridiagonal:
    """Run the block recurrence from all columns of `start` together, with full reorthogonalisation.

    W = A Q_j - Q_{j-1} B_{j-1}^T;  A_j = Q_j^T W;  Q_{j+1} B_j = W - Q_j A_j (QR).  (Golub and Underwood 1977.)

    An eigenvalue of multiplicity up to the width is found as often as it is there, and no ghost arises. Where
    the space closes under the operator the couplings fall to rounding and what follows carries no weight.
    Nothing is read from the device before the end.

    Raises ValueError for an operator that is not symmetric, more columns than dimensions or products that are
    not finite.

    >>> from torch_rmt.spectra import DenseOperator
    >>> operator = DenseOperator(torch.diag(torch.tensor([3.0, 3.0, 1.0, -1.0])), symmetric=True)
    >>> run = block_lanczos(operator, torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), 2)
    >>> np.linalg.eigvalsh(run.matrix).round(4).tolist()
    [-1.0, 1.0, 3.0, 3.0]
    """
    dim = require_symmetric(operator, "block Lanczos")
    width = start.shape[1]
    if not 1 <= width <= dim:
        raise ValueError(f"a block of {width} columns does not fit into dimension {dim}")
    steps = min(steps, dim // width)
    basis = torch.zeros(steps * width, dim, device=operator.device, dtype=operator.dtype)
    passes = 2 if basis.numel() <= _ENTRIES_FOR_TWO_PASSES else 1
    # Vectors are rows, each in one piece of memory: with columns every sum would stride through it.
    q, first_factor = _orthonormal(start.to(operator.dtype).T)
    # Noise just above rounding, turned at every step: where the space closes it alone remains, and what follows is
    # random and orthogonal, where rounding errors may lie in the space itself.
    noise = start.to(operator.dtype).T * (30.0 * torch.finfo(operator.dtype).eps)
    diagonals: list[Tensor] = []
    couplings: list[Tensor] = []
    for first in range(0, steps * width, width):
        last = first + width
        basis[first:last] = q
        w = operator.matmat(q.T).detach()
        if first == 0:
            scale = column_norms(w).max()
            noise = noise * torch.where(scale > 0, scale, torch.finfo(noise.dtype).tiny ** 0.5).to(noise.dtype)
        near = basis[max(0, first - width) : last]
        local = near @ w
        rest_of_w = torch.addmm(w.T, local.T, near, alpha=-1)
        turn = last % dim
        rest_of_w[:, turn:] += noise[:, : dim - turn]
        rest_of_w[:, :turn] += noise[:, dim - turn :]
        q, factor = _orthonormal(rest_of_w)
        # What A couples the newest block to is out. Rounding along the older ones is next to nothing, save in columns
        # that QR blew up because the space closes: hence the pass over the whole basis comes after it.
        known = basis[:last]
        for _ in range(passes):
            rest = known @ q.T
            q, again = _orthonormal(q.addmm_(rest.T, known, alpha=-1))
            local = local + (rest @ factor)[last - len(near) :]
            factor = again @ factor
        diagonals.append(local[-width:].double())
        couplings.append(factor.double())
    table = torch.stack([torch.stack(diagonals), torch.stack(couplings)])
    require_finite(table, operator)
    blocks, links = table.cpu().numpy()
    matrix = np.zeros((steps * width, steps * width))
    for j in range(steps):
        here = slice(j * width, (j + 1) * width)
        matrix[here, here] = 0.5 * (blocks[j] + blocks[j].T)
        if j + 1 < steps:
            below = slice((j + 1) * width, (j + 2) * width)
            matrix[below, here], matrix[here, below] = links[j], links[j].T
    return BlockTridiagonal(matrix, links[-1], first_factor.double().cpu().numpy(), basis)


def block_gauss_rule(
    run: BlockTridiagonal, *, tail: int = 0
) -> tuple[Float[np.ndarray, " nodes"], Float[np.ndarray, "probes nodes"]]:
    """Nodes, ascending and common to all probes, and each probe's weights, for the start vectors as drawn.

    v_i^T f(A) v_i = sum_s f(theta_s) (R e_i . s_first)^2, exact for polynomials of degree 2 m - 1 in m steps
    (Golub and Meurant 1994, section 6). `tail` as in `ritz_pairs`.
    """
    nodes, vectors = ritz_pairs(run, tail=tail)
    weights = (run.start.T @ vectors[: len(run.coupling)]) ** 2
    return nodes, weights / weights.sum(axis=1, keepdims=True)


def ritz_pairs(
    run: BlockTridiagonal, *, tail: int = 0
) -> tuple[Float[np.ndarray, " nodes"], Float[np.ndarray, "rows nodes"]]:
    """Eigenvalues of T, ascending, and the coordinates of its eigenvectors in the basis.

    A `tail` of so many more blocks keeps what the rule is exact for and fills in where the spectrum is dense:
    multiples of the identity, the means of the last four blocks, as far as there are so many.
    """
    width = len(run.coupling)
    rows = len(run.matrix)
    matrix = np.zeros((rows + tail * width, rows + tail * width))
    matrix[:rows, :rows] = run.matrix
    if tail:
        first = max(0, rows - 4 * width)
        links = [np.abs(np.diag(run.matrix, -width)[first : rows - width]), np.abs(run.coupling.diagonal())]
        along = np.arange(rows, rows + tail * width)
        matrix[along, along] = run.matrix.diagonal()[first:].mean()
        matrix[rows : rows + width, rows - width : rows] = run.coupling
        matrix[along[width:], along[:-width]] = np.concatenate(links).mean()
    nodes, vectors = np.linalg.eigh(matrix)  # it reads the lower triangle alone
    return nodes, vectors[:rows]


def _orthonormal(rows: Float[Tensor, "width dim"]) -> tuple[Float[Tensor, "width dim"], Float[Tensor, "width width"]]:
    """Orthonormal rows q and triangular r, rows^T = q^T r, by QR with a non-negative diagonal of r.

    So the couplings tend to a multiple of the identity.
    """
    q, r = torch.linalg.qr(rows.T)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r.dtype)[:, None]
    return q.T * signs, r * signs
