"""Extreme eigenpairs with checked residuals, by thick-restart block Lanczos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from torch_rmt.guard import full_precision
from torch_rmt.operators import column_bytes, keeping_to, room_beside
from torch_rmt.operators.base import LinearOperator
from torch_rmt.spectra.gram import Gram, widened
from torch_rmt.spectra.probes import column_dots, column_norms, require_finite, require_size, sphere

End = Literal["magnitude", "largest", "smallest", "both"]

_BASIS = 64  # vectors kept at most, found by tuning: more cost more in orthogonalisation than they save
_BASIS_BYTES = 2**31
_ENTRIES_FOR_THREE_PASSES = 2**20  # of a basis so small that orthogonalising thrice costs nothing
_PRODUCTS_BETWEEN_LOOKS = 4  # the device is read only this often


@dataclass(frozen=True)
class ExtremeEigenvalues:
    """Eigenpairs at the ends of a spectrum, each with a bound that was computed from a fresh product.

    Fields:
        values: Rayleigh quotients, in the order asked for.
        residuals: |A x - value x|; each interval value +- residual holds an eigenvalue of a symmetric A.
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
    of A^T A, the squared singular values. The residuals returned come from products of their own, and
    rounding bounds the tolerance from below.

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
    limit = (40 * room if max_matvecs is None else max_matvecs) // price - wanted  # the last for the check
    with keeping_to(
        operator, None if max_memory is None else max_memory - _held(operator, room, block), max(wanted, block)
    ):
        search = _Search(target, room, block, generator)
        coordinates = search.run(wanted, limit, tolerance, end)
        return _checked(target, search, coordinates, tolerance, (search.products + wanted) * price, end)


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


class _Search:
    """An orthonormal basis that grows by products, and the operator's projection onto it.

    Rows of `basis` are q_1..q_filled, followed by the block whose products come next. All is scaled by the
    length of the first product, so that thresholds have a meaning for tiny operators too.
    """

    def __init__(self, operator: LinearOperator, room: int, block: int, generator: torch.Generator) -> None:
        self.operator, self.room, self.block = operator, room, block
        dim, device, dtype = operator.shape[1], operator.device, operator.dtype
        self.basis = torch.zeros(room + block, dim, device=device, dtype=dtype)
        self.projection = torch.zeros(room + block, room + block, device=device, dtype=torch.float64)
        self.coupling = torch.zeros(block, block, device=device, dtype=torch.float64)
        self.scale = torch.ones((), device=device, dtype=torch.float64)
        self.closed_at = torch.full((), 2**40, device=device)
        # Noise just above rounding, turned a little at every step: where an invariant subspace is found it
        # alone remains, and the search goes on in a new random direction without asking the device.
        noise = 30.0 * torch.finfo(dtype).eps
        self.noise = sphere(dim, block, generator, device=device, dtype=dtype) * noise
        self.basis[:block] = torch.linalg.qr(sphere(dim, block, generator, device=device, dtype=dtype)).Q.T
        self.thorough = room * dim <= _ENTRIES_FOR_THREE_PASSES
        self.restarted = False
        self.filled = 0
        self.products = 0

    def run(self, wanted: int, limit: int, tolerance: float, end: End) -> Float[np.ndarray, "m k"]:
        """Expand and restart until so many pairs are found or `limit` products made; their coordinates."""
        while True:
            affordable = (limit - self.products) // self.block
            advanced = self.expand(max(1, min(_PRODUCTS_BETWEEN_LOOKS // self.block, affordable)))
            values, vectors, residuals = self.ritz_pairs()
            best = _best(values, min(wanted, len(values)), end)
            done = len(best) == wanted and bool((residuals[best] <= self.slack(values[best], tolerance)).all())
            done = done and self.explored(wanted)
            exhausted = self.products + self.block > limit or advanced == 0
            if done or exhausted or self.complete:
                found: Float[np.ndarray, "m k"] = vectors[:, best]
                return found
            if self.full:
                keep = min(max(wanted + 2 * self.block, self.room // 2), self.room - 2 * self.block)
                self.restart(vectors[:, _best(values, keep, end)])

    @property
    def full(self) -> bool:
        """No room for another block."""
        return self.filled + self.block > self.room

    @property
    def complete(self) -> bool:
        """The basis spans the whole space."""
        return self.filled >= self.operator.shape[1]

    def expand(self, blocks: int) -> int:
        """Multiply up to so many blocks; returns how many there was room for."""
        done = 0
        while done < blocks and not self.full:
            self._step()
            done += 1
        return done

    def _step(self) -> None:
        first, last = self.filled, self.filled + self.block
        w = self.operator.matmat(self.basis[first:last].T).detach()
        if self.products == 0:
            length = column_norms(w).max()
            self.scale = torch.where(length > 0, length, torch.ones_like(length))
        w = w / self.scale.to(w.dtype)
        # What A does couples the newest block to itself and to the one before only. That much is taken out
        # first; the pass over the whole basis then meets next to nothing, and is as good as a second pass.
        near = self.basis[max(0, first - self.block) : last]
        coupled = near @ w
        w = w - near.T @ coupled + self.noise.roll(self.products, dims=0)
        known = self.basis[:last]
        coefficients = known @ w
        q, r = torch.linalg.qr(w - known.T @ coefficients)
        coefficients[last - len(near) :] += coupled
        coefficients = coefficients.double()
        # Just after a restart it couples to all vectors kept; in a small space next to nothing may be left.
        for _ in range(2 if self.thorough else self.restarted):
            again = known @ q
            q, r_again = torch.linalg.qr(q - known.T @ again)
            coefficients = coefficients + (again @ r).double()
            r = r_again @ r
        self.restarted = False
        self.projection[:last, first:last] = coefficients
        self.projection[first:last, :last] = coefficients.T
        self.coupling = r.double()
        closed = self.coupling.diagonal().abs().min() < 60.0 * torch.finfo(w.dtype).eps
        now = torch.full_like(self.closed_at, self.products)
        self.closed_at = torch.where(closed, torch.minimum(self.closed_at, now), self.closed_at)
        self.products += self.block
        self.filled = last
        self.basis[last : last + self.block] = q.T

    def explored(self, wanted: int) -> bool:
        """Whether, if the basis ever closed under the operator, so many products were made since.

        All residuals vanish then, whatever is missing: the copies of multiple eigenvalues, the null space of
        a low-rank operator first among them. The next directions are random and bring them in.
        """
        since = self.products - int(self.closed_at) - 1
        return since < 0 or since >= wanted

    def ritz_pairs(
        self,
    ) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, "m m"], Float[np.ndarray, " m"]]:
        """Ritz values in units of the scale, coordinates of their vectors, lengths of their residuals."""
        m = self.filled
        require_finite(self.projection[:m, :m], self.operator)
        projection = self.projection[:m, :m].cpu().numpy()
        values, vectors = np.linalg.eigh(0.5 * (projection + projection.T))
        tail = self.coupling.cpu().numpy() @ vectors[m - self.block :]
        return values, vectors, np.linalg.norm(tail, axis=0)

    def slack(self, values: Float[np.ndarray, " k"], tolerance: float) -> Float[np.ndarray, " k"]:
        """Largest admissible residual of each Ritz value in units of the scale: tolerance or rounding."""
        floor = 100.0 * torch.finfo(self.operator.dtype).eps * max(1.0, float(np.abs(values).max(initial=0.0)))
        slack: Float[np.ndarray, " k"] = np.maximum(tolerance * np.abs(values), floor)
        return slack

    def restart(self, coordinates: Float[np.ndarray, "m kept"]) -> None:
        """Keep only the span of some Ritz vectors, and the block that comes next."""
        kept = coordinates.shape[1]
        turn = torch.from_numpy(coordinates.T.copy()).to(self.basis)
        following = self.basis[self.filled : self.filled + self.block].clone()
        diagonal = coordinates.T @ self.projection[: self.filled, : self.filled].cpu().numpy() @ coordinates
        self.basis[:kept] = turn @ self.basis[: self.filled]
        self.basis[kept : kept + self.block] = following
        self.restarted = True
        self.projection.zero_()
        self.projection[:kept, :kept] = torch.from_numpy(diagonal).to(self.projection)
        self.filled = kept


def _best(values: Float[np.ndarray, " m"], count: int, end: End) -> np.ndarray:
    """Places of the `count` most wanted Ritz values, most wanted first."""
    if end == "magnitude":
        return np.argsort(-np.abs(values), kind="stable")[:count]
    order = np.argsort(-values, kind="stable")
    if end == "largest":
        return order[:count]
    if end == "smallest":
        return order[::-1][:count]
    top = (count + 1) // 2
    return np.concatenate([order[:top], order[::-1][: count - top]])


def _checked(
    operator: LinearOperator,
    search: _Search,
    coordinates: Float[np.ndarray, "m k"],
    tolerance: float,
    matvecs: int,
    end: End,
) -> ExtremeEigenvalues:
    """Turn Ritz pairs into a result whose values and residuals come from products of their own."""
    turn = torch.from_numpy(coordinates.T.copy()).to(search.basis)
    vectors = (turn @ search.basis[: search.filled]).T
    vectors = vectors / column_norms(vectors).to(vectors.dtype)
    images = operator.matmat(vectors).detach()
    require_finite(images, operator)
    quotients = column_dots(vectors, images)
    left = torch.cat(
        [column_norms(images[:, j : j + 1].double() - vectors[:, j : j + 1] * q) for j, q in enumerate(quotients)]
    )
    pairs = torch.stack([quotients, left])
    require_finite(pairs, operator)  # squares of finite products may overflow
    values, residuals = pairs.cpu().numpy()
    scale = float(search.scale)
    slack = search.slack(values / scale, tolerance) * scale
    order = _best(values, len(values), end)
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
        matvecs=matvecs,
        converged=converged,
        advice=advice,
    )
