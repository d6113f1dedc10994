"""Extreme eigenpairs with checked residuals, by thick-restart block Lanczos."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from torch_rmt.guard import full_precision
from torch_rmt.operators import column_bytes, keeping_to, room_beside
from torch_rmt.operators.base import LinearOperator
from torch_rmt.spectra.gram import Gram, widened
from torch_rmt.spectra.probes import column_dots, column_norms, require_finite, require_size
from torch_rmt.spectra.thick_restart import End, RitzPairs, Search, best_of

_BASIS = 64  # vectors kept at most, found by tuning: more cost more in orthogonalisation than they save
_BASIS_BYTES = 2**31
_CONTRADICTION = 0.1  # of the residual allowed: where search and check differ by more, each pair gets a product


@dataclass(frozen=True)
class ExtremeEigenvalues:
    """Eigenpairs at the ends of a spectrum, each with a residual that a fresh product has confirmed.

    Fields:
        values: Rayleigh quotients, in the order asked for.
        residuals: |A x - value x|, or a little above; value +- residual holds an eigenvalue of a symmetric A.
        vectors: unit eigenvectors, as columns (right singular vectors where A is not symmetric).
        matvecs: products spent, those of the final check among them; one with A^T A counts as two.
        converged: whether every residual is within the tolerance.
        advice: what to do if not; empty otherwise.
    """

    values: Float[np.ndarray, " k"]
    residuals: Float[np.ndarray, " k"]
    vectors: Float[Tensor, "dim k"]
    matvecs: int
    converged: bool
    advice: str = ""


@full_precision()
def top_eigenvalues(
    operator: LinearOperator,
    k: int,
    generator: torch.Generator,
    *,
    tolerance: float = 1e-3,
    end: End = "magnitude",
    block: int = 1,
    max_matvecs: int | None = None,
    max_memory: int | None = None,
) -> ExtremeEigenvalues:
    """Find the k eigenvalues largest in magnitude (or at an end), to |A x - value x| <= tolerance |value|.

    Block Lanczos with full reorthogonalisation, restarted with the best Ritz vectors (Wu and Simon 2000), so
    that no eigenvalue is reported twice and pairs +-value are told apart. A multiple eigenvalue is found as
    often as `block` has columns; more cost more products. For A that is not symmetric the values are those
    of A^T A, the squared singular values. Rounding bounds the tolerance from below.

    The search knows the residual r_i of each pair, from the relation A X = X Theta + R. That relation is put to
    the test by one more product, of the sum with random signs: e = |(A X - X Theta - R) s|, whose square is on
    average the sum of what the columns are wrong by squared. r_i + e is reported. Where e is above a tenth of what
    is allowed (tolerances near rounding, products that do not repeat), each pair gets a product of its own.

    Args:
        operator: what to measure.
        k: how many.
        generator: for the start vectors.
        tolerance: relative, on the residual.
        end: "magnitude"; "largest" or "smallest" algebraically; "both": the k largest, then the k smallest.
        block: columns a product; at least the multiplicity looked for.
        max_matvecs: give up beyond; the result then says converged=False. Default 40 times the basis.
        max_memory: bytes for graphs, basis and vectors; a smaller basis costs more products.

    Raises ValueError for k or `block` below one or above the dimension, products that are not finite, or a smallest
    basis that does not fit `max_memory`.

    >>> from torch_rmt.spectra import DenseOperator
    >>> operator = DenseOperator(torch.diag(torch.tensor([-3.0, 1.0, 2.0, 0.5])), symmetric=True)
    >>> top_eigenvalues(operator, 2, torch.Generator().manual_seed(0)).values.round(3).tolist()
    [-3.0, 2.0]
    """
    operator = widened(operator)
    target = operator if operator.symmetric else Gram(operator)
    price = 1 if operator.symmetric else 2
    dim = require_size(operator)
    wanted = 2 * k if end == "both" else k
    if k < 1 or wanted > dim or not 1 <= block <= dim:
        raise ValueError(f"cannot find {wanted} eigenvalues in blocks of {block} of an operator of dimension {dim}")
    room = max(2 * wanted + 2 * block, min(_BASIS, _BASIS_BYTES // (dim * operator.dtype.itemsize)))
    room = min(dim, room)
    if max_memory is not None:
        room = _room(operator, room, min(dim, 2 * wanted + 2 * block), wanted, block, max_memory)
    limit = (40 * room if max_matvecs is None else max_matvecs) // price - wanted - 1  # the last for the check
    with keeping_to(
        operator, None if max_memory is None else max_memory - _held(operator, room, block), max(wanted, block)
    ):
        search = Search(target, room, block, generator)
        found = search.run(wanted, limit, tolerance, end)
        return _checked(search, found, tolerance, price, end, generator)


def _held(operator: LinearOperator, room: int, block: int) -> int:
    """Bytes of a basis with room for so many vectors, of its restart, and of the block at work."""
    return (3 * room // 2 + 10 * block) * operator.shape[1] * operator.dtype.itemsize


def _room(operator: LinearOperator, wish: int, least: int, wanted: int, block: int, max_memory: int) -> int:
    """Vectors of the basis that fit."""
    vectors = max(wanted, block) * column_bytes(operator) + 3 * wanted * operator.shape[1] * operator.dtype.itemsize
    product = max_memory - room_beside(operator, max_memory) + vectors
    need = product + _held(operator, least, block)
    if need > max_memory:
        raise ValueError(
            f"{wanted} eigenvalues take at least {need} bytes and max_memory={max_memory} are allowed; ask for fewer, "
            "or use smaller batches or fewer parameters (params=...)"
        )
    while product + _held(operator, wish, block) > max_memory:
        wish -= 1
    return wish


def _checked(
    search: Search, found: RitzPairs, tolerance: float, price: int, end: End, generator: torch.Generator
) -> ExtremeEigenvalues:
    """Turn Ritz pairs into a result whose values and residuals have been put to the test by a product."""
    turn = torch.from_numpy(found.coordinates.T.copy()).to(search.basis)
    vectors = (turn @ search.basis[: search.filled]).T
    vectors = vectors / column_norms(vectors).to(vectors.dtype)
    values, residuals = _confirmed(search, found, vectors, tolerance, generator) or _measured(search, vectors)
    scale = float(search.scale)
    slack = search.slack(values / scale, tolerance) * scale
    order = best_of(values, len(values), end)
    converged = bool((residuals <= 1.1 * slack).all())
    advice = (
        ""
        if converged
        else (
            f"{int((residuals > 1.1 * slack).sum())} of {len(values)} residuals are above {tolerance:g} of "
            "their value: allow more max_matvecs, a wider tolerance, fewer eigenvalues, or float64"
        )
    )
    return ExtremeEigenvalues(
        values=values[order],
        residuals=residuals[order],
        vectors=vectors[:, torch.from_numpy(order.copy()).to(vectors.device)],
        matvecs=search.products * price,
        converged=converged,
        advice=advice,
    )


Pairs = tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]  # values and residuals


def _confirmed(
    search: Search, found: RitzPairs, vectors: Float[Tensor, "dim k"], tolerance: float, generator: torch.Generator
) -> Pairs | None:
    """What the search found, if a product with a random combination of the vectors agrees with it."""
    count, unit = vectors.shape[1], float(search.scale)
    if count == 1:
        return None
    allowed = _CONTRADICTION * search.slack(found.values, tolerance).min()
    signs = 1.0 - 2.0 * torch.randint(2, (count,), generator=generator, device=generator.device).double().cpu().numpy()
    tails = search.tails(found.coordinates)
    inside, outside = (torch.from_numpy(c).to(vectors) for c in (found.values * signs, tails @ signs))
    image = search.multiply((vectors @ torch.from_numpy(signs).to(vectors))[:, None])[:, 0]
    expected = vectors @ inside + search.following.T @ outside
    gap = torch.linalg.vector_norm(image / unit - expected, dtype=torch.float64)
    require_finite(torch.stack([gap, search.scale]), search.operator)  # squares of finite products may overflow
    wrong = float(gap)
    return (found.values * unit, (found.residuals + wrong) * unit) if wrong <= allowed else None


def _measured(search: Search, vectors: Float[Tensor, "dim k"]) -> Pairs:
    """Rayleigh quotients and residuals from a product with every vector."""
    images = search.multiply(vectors)
    require_finite(images, search.operator)
    quotients = column_dots(vectors, images)
    left = torch.cat(
        [column_norms(images[:, j : j + 1].double() - vectors[:, j : j + 1] * q) for j, q in enumerate(quotients)]
    )
    pairs = torch.stack([quotients, left])
    require_finite(pairs, search.operator)
    values, residuals = pairs.cpu().numpy()
    return values, residuals
