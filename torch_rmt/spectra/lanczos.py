"""The Lanczos recurrence, for several probes in lockstep: one `matmat` a step serves them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from torch_rmt.guard import full_precision
from torch_rmt.operators.base import LinearOperator
from torch_rmt.spectra.orthogonality import OrthogonalityForecast
from torch_rmt.spectra.probes import column_norms, require_finite, require_symmetric

Reorthogonalise = Literal["none", "selective", "full"]

_COLUMNS_FOR_GEMM = 16  # found by tuning: beyond, the products of unlike columns cost more than they save


@dataclass(frozen=True)
class Tridiagonal:
    """A Q_m = Q_m T + beta_m q_{m+1} e_m^T for each probe.

    Fields:
        diagonal: alpha_1..alpha_m of each probe.
        offdiagonal: beta_1..beta_m of each probe; the last is the length of the residual. A zero marks an
            invariant subspace: the recurrence of that probe ended there.
        basis: q_1..q_m of each probe if they were kept (they are when reorthogonalised), else None.
        residual: the unit vector q_{m+1} of each probe (zero where the recurrence ended).
    """

    diagonal: Float[np.ndarray, "probes steps"]
    offdiagonal: Float[np.ndarray, "probes steps"]
    basis: Float[Tensor, "probes steps dim"] | None
    residual: Float[Tensor, "dim probes"]


@full_precision()
def lanczos(
    operator: LinearOperator,
    start: Float[Tensor, "dim probes"],
    steps: int,
    *,
    reorthogonalise: Reorthogonalise,
) -> Tridiagonal:
    """Run the three-term recurrence from each column of `start`.

    w = A q_j - beta_{j-1} q_{j-1};  alpha_j = q_j . w;  w -= alpha_j q_j;
    beta_j = |w|;  q_{j+1} = w / beta_j.

    With "full" reorthogonalisation every new vector is made orthogonal to all earlier ones, twice (Kahan and
    Parlett: twice is enough), which costs memory for the basis and lets no ghost arise. "selective" does so
    only when the coefficients foretell that orthogonality is being lost (see `OrthogonalityForecast`) and is
    as free of ghosts for a fraction of the work; on an accelerator, where that decision would hold up the queue
    at every step and passes over the basis are cheap, it is taken as "full". With "none" the Gauss rule is as good
    for a density (Greenbaum 1989) but Ritz values come back in several copies.
    The scalars are kept in float64. After the first step nothing is read from an accelerator until the last.

    Raises ValueError for an operator that is not symmetric, a zero start vector or non-finite products.
    """
    dim = require_symmetric(operator, "lanczos")
    steps = min(steps, dim)
    probes = start.shape[1]
    eps = torch.finfo(operator.dtype).eps
    basis = None
    if reorthogonalise != "none":
        basis = torch.zeros(probes, steps, dim, device=operator.device, dtype=operator.dtype)
    floor = torch.zeros(probes, device=operator.device, dtype=torch.float64)
    q, lengths = unit(start, floor)
    previous = torch.zeros_like(q)
    beta = torch.zeros_like(lengths)
    scale = torch.zeros_like(lengths)
    chosen = reorthogonalise == "selective" and _decides_at_once(operator.device)
    forecast = OrthogonalityForecast(probes, steps, dim, eps) if chosen else None
    wide = True
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for step in range(steps):
        if basis is not None:
            basis[:, step] = q.T
        w = torch.addcmul(operator.matmat(q).detach(), previous, beta.to(q.dtype), value=-1.0)
        if step == 0:
            wide = extreme(column_norms(w))
        alpha = dots(q, w)
        w = w.addcmul_(q, alpha.to(w.dtype), value=-1.0)
        if basis is not None and forecast is None:
            w = orthogonal_to(basis[:, : step + 1], w)
        scale = torch.maximum(scale, alpha.abs() + beta)
        if basis is not None and forecast is not None:
            length = unit(w, 10.0 * eps * scale, wide=wide)[1]
            if forecast.must_reorthogonalise(alpha.numpy(), length.numpy()):
                w = orthogonal_to(basis[:, : step + 1], w)
        previous = q
        q, beta = unit(w, 10.0 * eps * scale, wide=wide)
        alphas.append(alpha)
        betas.append(beta)
    table = torch.stack([torch.stack(alphas), torch.stack(betas)]).transpose(1, 2)
    require_finite(table, operator)
    if not bool((lengths > 0).all()):
        raise ValueError("a start vector of the Lanczos recurrence is zero")
    host = table.cpu().numpy()
    return Tridiagonal(host[0], host[1], basis, q)


def _decides_at_once(device: torch.device) -> bool:
    """Whether the host has a number as soon as it is computed."""
    return device.type == "cpu"


def gauss_rule(
    tridiagonal: Tridiagonal, *, tail: int = 0
) -> tuple[Float[np.ndarray, "probes nodes"], Float[np.ndarray, "probes nodes"]]:
    """Nodes and weights (squared first components) of each probe's Gauss rule.

    The rule of m steps integrates polynomials to degree 2m - 1 exactly against the probe's spectral measure
    (Golub and Welsch 1969); its nodes are the Ritz values. A `tail` of so many more rows, with the mean of
    the last four coefficients in each, keeps that and puts many nodes where the spectrum is dense.
    """
    diagonal = continued(tridiagonal.diagonal, tail)
    offdiagonal = continued(tridiagonal.offdiagonal, tail)[:, :-1]
    probes, rows = diagonal.shape
    matrices = np.zeros((probes, rows, rows))
    along = np.arange(rows)
    matrices[:, along, along] = diagonal
    matrices[:, along[1:], along[:-1]] = offdiagonal  # eigh reads the lower triangle alone
    nodes, vectors = np.linalg.eigh(matrices)
    weights = vectors[:, 0, :] ** 2
    return nodes, weights / weights.sum(axis=1, keepdims=True)


def continued(coefficients: Float[np.ndarray, "probes steps"], tail: int) -> Float[np.ndarray, "probes rows"]:
    """Rows of coefficients, each with `tail` more entries that are the mean of its last four."""
    last = coefficients[:, -4:].mean(axis=1, keepdims=True)
    return np.concatenate([coefficients, np.repeat(last, tail, axis=1)], axis=1)


def dots(left: Float[Tensor, "dim probes"], right: Float[Tensor, "dim probes"]) -> Float[Tensor, " probes"]:
    """Inner product of each pair of columns."""
    if left.shape[1] <= _COLUMNS_FOR_GEMM:  # one pass over memory, where an elementwise product takes three
        return (left.T @ right).diagonal().double()
    return (left * right).sum(dim=0, dtype=torch.float64)


def unit(
    vectors: Float[Tensor, "dim probes"], floor: Float[Tensor, " probes"], *, wide: bool = True
) -> tuple[Float[Tensor, "dim probes"], Float[Tensor, " probes"]]:
    """Columns divided by their lengths; a column not longer than its floor becomes zero, its length too.

    `wide` accumulates the lengths in float64, for vectors so short or long that their squares would not do.
    """
    lengths = column_norms(vectors) if wide else torch.linalg.vector_norm(vectors, dim=0).double()
    alive = ~(lengths <= floor)  # NaN counts as alive, so that it is seen at the end
    lengths = torch.where(alive, lengths, 0.0)
    factor = torch.where(alive, 1.0 / torch.where(alive, lengths, 1.0), 0.0)
    return vectors * factor.to(vectors.dtype), lengths


def extreme(scale: Float[Tensor, " probes"]) -> bool:
    """Whether products are so short or long that their lengths need float64; one look at the device."""
    low, high = torch.stack([scale.min(), scale.max()]).tolist()
    return not 1e-12 < low <= high < 1e12


def orthogonal_to(
    basis: Float[Tensor, "probes steps dim"], vectors: Float[Tensor, "dim probes"]
) -> Float[Tensor, "dim probes"]:
    """Take out of each probe's column its components along that probe's basis, twice."""
    columns = vectors.T.unsqueeze(2)
    for _ in range(2):
        columns = columns - basis.transpose(1, 2) @ (basis @ columns)
    return columns.squeeze(2).T
