"""The search for extreme eigenpairs: block Lanczos that restarts with its best Ritz vectors."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from torch_rmt.operators.base import LinearOperator
from torch_rmt.spectra.probes import column_norms, require_finite, sphere

End = Literal["magnitude", "largest", "smallest", "both"]

_ENTRIES_FOR_THREE_PASSES = 2**20  # of a basis so small that orthogonalising thrice costs nothing
_PRODUCTS_BETWEEN_LOOKS = 4  # the device is read only this often, until the end is near


class RitzPairs(NamedTuple):
    """Ritz values, the coordinates of their vectors in the basis, and the lengths of their residuals."""

    values: Float[np.ndarray, " k"]
    coordinates: Float[np.ndarray, "m k"]
    residuals: Float[np.ndarray, " k"]


class Search:
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
        # Noise just above rounding, turned a little at every step: where an invariant subspace is found it alone
        # remains, and the search goes on in a new random direction without asking the device. It would show in the
        # last digits, so a single vector gets it only where its product is lost; a block may be lost in other ways.
        rounding = torch.finfo(dtype).eps
        self.noise = sphere(dim, block, generator, device=device, dtype=dtype) * (30.0 * rounding)
        self.lost = 60.0 * rounding
        self.basis[:block] = torch.linalg.qr(sphere(dim, block, generator, device=device, dtype=dtype)).Q.T
        self.thorough = room * dim <= _ENTRIES_FOR_THREE_PASSES
        self.restarted = False
        self.filled = 0
        self.products = 0

    def run(self, wanted: int, limit: int, tolerance: float, end: End) -> RitzPairs:
        """Expand and restart until so many pairs are found or `limit` products made."""
        worst, pause = math.inf, _PRODUCTS_BETWEEN_LOOKS
        while True:
            affordable = (limit - self.products) // self.block
            advanced = self.expand(max(1, min(pause // self.block, affordable)))
            values, vectors, residuals = self.ritz_pairs()
            best = best_of(values, min(wanted, len(values)), end)
            before, worst = worst, math.inf
            if len(best) == wanted:
                worst = float((residuals[best] / self.slack(values[best], tolerance)).max())
            pause = _until_done(before, worst, advanced * self.block)
            done = worst <= 1.0 and self.explored(wanted)
            exhausted = self.products + self.block > limit or advanced == 0
            if done or exhausted or self.complete:
                return RitzPairs(values[best], vectors[:, best], residuals[best])
            if self.full:
                keep = min(max(wanted + 2 * self.block, self.room // 2), self.room - 2 * self.block)
                self.restart(vectors[:, best_of(values, keep, end)])

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
        made = self.products
        w = self.multiply(self.following.T)
        if made == 0:
            length = column_norms(w).max()
            self.scale = torch.where(length > 0, length, torch.ones_like(length))
        w = w / self.scale.to(w.dtype)
        # What A does couples the newest block to itself and to the one before only. That much is taken out
        # first; the pass over the whole basis then meets next to nothing, and is as good as a second pass.
        near = self.basis[max(0, first - self.block) : last]
        coupled = near @ w
        w = w - near.T @ coupled
        w = w + self.noise.roll(made, dims=0) * (column_norms(w) < self.lost if self.block == 1 else 1.0)
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
        closed = self.coupling.diagonal().abs().min() < self.lost
        now = torch.full_like(self.closed_at, made)
        self.closed_at = torch.where(closed, torch.minimum(self.closed_at, now), self.closed_at)
        self.filled = last
        self.basis[last : last + self.block] = q.T

    def explored(self, wanted: int) -> bool:
        """Whether, if the basis ever closed under the operator, so many products were made since.

        All residuals vanish then, whatever is missing: the copies of multiple eigenvalues, the null space of
        a low-rank operator first among them. The next directions are random and bring them in.
        """
        since = self.products - int(self.closed_at) - 1
        return since < 0 or since >= wanted

    def ritz_pairs(self) -> RitzPairs:
        """All Ritz pairs, in units of the scale."""
        m = self.filled
        require_finite(self.projection[:m, :m], self.operator)
        projection = self.projection[:m, :m].cpu().numpy()
        values, vectors = np.linalg.eigh(0.5 * (projection + projection.T))
        return RitzPairs(values, vectors, np.linalg.norm(self.tails(vectors), axis=0))

    def tails(self, coordinates: Float[np.ndarray, "m k"]) -> Float[np.ndarray, "block k"]:
        """Residuals of vectors with these coordinates, as combinations of the rows that follow the basis."""
        ends: Float[np.ndarray, "block k"] = self.coupling.cpu().numpy() @ coordinates[-self.block :]
        return ends

    @property
    def following(self) -> Float[Tensor, "block dim"]:
        """The rows after the basis, whose products come next."""
        return self.basis[self.filled : self.filled + self.block]

    def multiply(self, vectors: Float[Tensor, "dim k"]) -> Float[Tensor, "dim k"]:
        """Products with the operator, counted."""
        self.products += vectors.shape[1]
        return self.operator.matmat(vectors).detach()

    def slack(self, values: Float[np.ndarray, " k"], tolerance: float) -> Float[np.ndarray, " k"]:
        """Largest admissible residual of each Ritz value in units of the scale: tolerance or rounding."""
        floor = 100.0 * torch.finfo(self.operator.dtype).eps * max(1.0, float(np.abs(values).max(initial=0.0)))
        slack: Float[np.ndarray, " k"] = np.maximum(tolerance * np.abs(values), floor)
        return slack

    def restart(self, coordinates: Float[np.ndarray, "m kept"]) -> None:
        """Keep only the span of some Ritz vectors, and the block that comes next."""
        kept = coordinates.shape[1]
        turn = torch.from_numpy(coordinates.T.copy()).to(self.basis)
        following = self.following.clone()
        diagonal = coordinates.T @ self.projection[: self.filled, : self.filled].cpu().numpy() @ coordinates
        self.basis[:kept] = turn @ self.basis[: self.filled]
        self.basis[kept : kept + self.block] = following
        self.restarted = True
        self.projection.zero_()
        self.projection[:kept, :kept] = torch.from_numpy(diagonal).to(self.projection)
        self.filled = kept


def best_of(values: Float[np.ndarray, " m"], count: int, end: End) -> np.ndarray:
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


def _until_done(before: float, worst: float, products: int) -> int:
    """Products that it takes at this rate until the worst ratio of residual to tolerance is one; at most four."""
    if not 1.0 < worst < before < math.inf:
        return _PRODUCTS_BETWEEN_LOOKS
    rate = math.log(before / worst) / products
    return max(1, min(_PRODUCTS_BETWEEN_LOOKS, int(math.log(worst) / rate)))
