"""Golub-Kahan bidiagonalisation, for several probes in lockstep: Lanczos for A^T A without squaring A."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from torch_rmt.guard import full_precision
from torch_rmt.operators.base import LinearOperator
from torch_rmt.spectra.lanczos import continued, extreme, orthogonal_to, unit
from torch_rmt.spectra.probes import column_norms, require_finite, require_size


@dataclass(frozen=True)
class Bidiagonal:
    """A V_m = U_m B and A^T U_m = V_m B^T + beta_m v_{m+1} e_m^T for each probe, B upper bidiagonal.

    Fields:
        diagonal: alpha_1..alpha_m of each probe, non-negative.
        offdiagonal: beta_1..beta_m of each probe; the last is the length of the residual.
        right: v_1..v_m of each probe if they were kept (they are when reorthogonalised), else None.
        left: u_1..u_m of each probe, likewise.
    """

    diagonal: Float[np.ndarray, "probes steps"]
    offdiagonal: Float[np.ndarray, "probes steps"]
    right: Float[Tensor, "probes steps columns"] | None
    left: Float[Tensor, "probes steps rows"] | None


@full_precision()
def golub_kahan(
    operator: LinearOperator, start: Float[Tensor, "columns probes"], steps: int, *, reorthogonalise: bool
) -> Bidiagonal:
    """Run the two-term recurrence from each column of `start`; a step costs one product with A, one with A^T.

    u = A v_j - beta_{j-1} u_{j-1};  alpha_j = |u|;  u_j = u / alpha_j;
    v = A^T u_j - alpha_j v_j;  beta_j = |v|;  v_{j+1} = v / beta_j.  (Golub and Kahan 1965.)

    B^T B is the Lanczos matrix of A^T A from the same start, but small singular values keep their digits.
    `reorthogonalise` makes every u and v orthogonal to all earlier ones. Where a vector vanishes the
    recurrence of that probe has found an invariant subspace and goes on with zeros.

    Raises ValueError for an empty operator, a zero start vector or non-finite products.
    """
    rows, columns = operator.shape
    require_size(operator)
    adjoint = operator.adjoint()
    steps = min(steps, rows, columns)
    probes, dtype, device = start.shape[1], operator.dtype, operator.device
    floor = 10.0 * torch.finfo(dtype).eps
    right = left = None
    if reorthogonalise:
        right = torch.zeros(probes, steps, columns, device=device, dtype=dtype)
        left = torch.zeros(probes, steps, rows, device=device, dtype=dtype)
    v, lengths = unit(start, torch.zeros(probes, device=device, dtype=torch.float64))
    u = torch.zeros(rows, probes, device=device, dtype=dtype)
    beta = torch.zeros_like(lengths)
    scale = torch.zeros_like(lengths)
    alphas, betas, wide = [], [], True
    for step in range(steps):
        w = torch.addcmul(operator.matmat(v).detach(), u, beta.to(dtype), value=-1.0)
        if step == 0:
            wide = extreme(column_norms(w))
        if left is not None:
            w = orthogonal_to(left[:, :step], w)
        u, alpha = unit(w, floor * scale, wide=wide)
        if right is not None and left is not None:
            right[:, step], left[:, step] = v.T, u.T
        scale = torch.maximum(scale, alpha + beta)
        w = torch.addcmul(adjoint.matmat(u).detach(), v, alpha.to(dtype), value=-1.0)
        if right is not None:
            w = orthogonal_to(right[:, : step + 1], w)
        v, beta = unit(w, floor * scale, wide=wide)
        alphas.append(alpha)
        betas.append(beta)
    table = torch.stack([torch.stack(alphas), torch.stack(betas)]).transpose(1, 2)
    require_finite(table, operator)
    if not bool((lengths > 0).all()):
        raise ValueError("a start vector of the Golub-Kahan recurrence is zero")
    host = table.cpu().numpy()
    return Bidiagonal(host[0], host[1], right, left)


def squared_gauss_rule(
    bidiagonal: Bidiagonal, *, tail: int = 0
) -> tuple[Float[np.ndarray, "probes nodes"], Float[np.ndarray, "probes nodes"]]:
    """Nodes (squared singular values of B) and weights of each probe's Gauss rule for A^T A, ascending.

    `tail` as in `gauss_rule`; B stays a real matrix, so that no node falls below zero.
    """
    diagonal = continued(bidiagonal.diagonal, tail)
    offdiagonal = continued(bidiagonal.offdiagonal, tail)
    probes, steps = diagonal.shape
    matrices = np.zeros((probes, steps, steps))
    along = np.arange(steps)
    matrices[:, along, along] = diagonal
    matrices[:, along[:-1], along[1:]] = offdiagonal[:, :-1]
    _, singular, right = np.linalg.svd(matrices)
    weights = right[:, ::-1, 0] ** 2
    return singular[:, ::-1] ** 2, weights / weights.sum(axis=1, keepdims=True)
