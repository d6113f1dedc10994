"""Quadrature on a shared Krylov space: few products, with the eigenvalues that it resolves counted exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array

from torch_rmt.operators.base import LinearOperator
from torch_rmt.spectra.block_lanczos import BlockTridiagonal, block_lanczos, ritz_pairs
from torch_rmt.spectra.exact import exact
from torch_rmt.spectra.gram import widened
from torch_rmt.spectra.positive import clipped
from torch_rmt.spectra.probes import require_symmetric, sphere
from torch_rmt.spectra.spectrum import Spectrum

_ROOTS_PER_PROBE = 2.15  # probes = square root of the budget over this; this and the next two found by tuning
_SHORTEST_TAIL = 128  # rows
_ISOLATED = 0.03  # a residual below this share of the distance to the next Ritz value: one eigenvalue, and it alone
_NEGLIGIBLE = 1e-14  # a weight that is rounding
_DEPTH_LEFT_OUT = 0.8  # share of the steps whose span is counted when a probe is left out, found by tuning
_WIDEST_SPAN = 512  # columns; wider ones cost more than they tell
_CLOSED = 1e-4  # of the largest Ritz value: a coupling below it adds no direction to such a span


@dataclass(frozen=True)
class BlockSLQ:
    """Quadrature of `probes` random vectors on their common Krylov space, `depth` block steps deep.

    Each probe sees what all have found. A Ritz value whose residual is far below its distance to the next is an
    eigenvalue; a group of fewer than `probes` that coincide has as many eigenvalues as members (a block of that
    width would have found more). Such eigenvalues get weight 1/dim each instead of a random one. Of what is left the
    span Q of the other probes' Krylov vectors, four fifths of the steps deep, is counted too, tr(Q^T f(A) Q); only
    the probe's component outside stands for the rest, scaled to the rest of the mass: it is uniform on the sphere of
    the complement and independent of Q. So outliers cost no noise and no product of their own, and eigenvectors that
    are known in part cost noise for the missing part alone. Unbiased for polynomials of degree 2 ceil(depth / 5) + 1
    and below 2 depth. At equal products the Wasserstein error on Hessians was 2 to 50 times smaller than that of
    plain quadrature.

    The basis is kept, probes * depth * dim numbers. An operator of dimension at most probes * depth is written out
    instead. One that is not symmetric is refused (`SLQ` takes it, and so does Gram(operator)).

    Fields:
        probes: number of random vectors, columns of one `matmat`.
        depth: block steps.

    Source: block quadrature Golub and Meurant 1994; counting a Krylov space Chen and Hallman 2023; leaving out one
    probe at a time Epperly, Tropp and Webber 2024 (for traces); tail as in `SLQ`; the rest is our own.

    >>> from torch_rmt.spectra import DenseOperator
    >>> values = torch.cat([torch.linspace(-1, 1, 197), torch.tensor([5.0, 7.0, 9.0])])
    >>> operator = DenseOperator(torch.diag(values.double()), symmetric=True)
    >>> spectrum = BlockSLQ(probes=3, depth=12)(operator, torch.Generator().manual_seed(0))
    >>> spectrum.nodes[0, -3:].round(6).tolist(), spectrum.weights[0, -3:].tolist(), spectrum.matvecs
    ([5.0, 7.0, 9.0], [0.005, 0.005, 0.005], 36)
    """

    probes: int = 4
    depth: int = 30

    def __post_init__(self) -> None:
        if self.probes < 1 or self.depth < 1:
            raise ValueError(f"BlockSLQ needs at least one probe and one step, got {self.probes} and {self.depth}")

    @classmethod
    def for_budget(cls, matvecs: int) -> BlockSLQ:
        """Choose probes and depth for a number of products: probes near its square root over 2.15.

        >>> BlockSLQ.for_budget(30), BlockSLQ.for_budget(120)
        (BlockSLQ(probes=3, depth=10), BlockSLQ(probes=5, depth=24))
        """
        if matvecs < 1:
            raise ValueError(f"a budget is at least one product, got {matvecs}")
        probes = min(max(2, round(matvecs**0.5 / _ROOTS_PER_PROBE)), matvecs)
        return cls(probes=probes, depth=matvecs // probes)

    def __call__(self, operator: LinearOperator, generator: torch.Generator) -> Spectrum:
        """Measure a symmetric operator; probes come from `generator` alone."""
        operator = widened(operator)
        dim = require_symmetric(operator, "BlockSLQ")
        if self.probes * self.depth >= dim:
            return exact(operator)
        seed = generator.initial_seed()
        start = sphere(dim, self.probes, generator, device=operator.device, dtype=operator.dtype)
        run = block_lanczos(operator, start, self.depth)
        nodes, vectors = ritz_pairs(run, tail=-(-max(2 * self.depth, _SHORTEST_TAIL) // self.probes))
        ritz = ritz_pairs(run)
        known, found = resolved(run, ritz, eps=torch.finfo(operator.dtype).eps, nodes=nodes)
        size = float(np.abs(ritz[0][~found]).max(initial=0.0))
        rules = _leaving_out_each(run, ritz[1][:, found], size, vectors[:, ~known], dim)
        if rules is None:  # all of a probe lies in what was resolved or counted: nothing to scale
            known, found = np.zeros_like(known), np.zeros_like(found)
            weights = (run.start.T @ vectors[: self.probes]) ** 2
            weights /= weights.sum(axis=1, keepdims=True)
            rules = weights, weights
        count = int(found.sum())
        exactly = np.full((self.probes, count), 1.0 / dim)
        method = f"block slq, {self.probes} probes x {self.depth} steps"
        if count:
            method += f", {count} eigenvalues resolved"
        places = np.tile(np.concatenate([nodes[~known], nodes[known]]), (self.probes, 1))
        return Spectrum(
            nodes=clipped(places, operator, ritz[0]),
            weights=np.concatenate([rules[0], exactly], axis=1),
            dim=dim,
            matvecs=self.probes * self.depth,
            method=method,
            seed=seed,
            known=count,
            known_count=count,
            sampled=np.concatenate([rules[1], np.zeros_like(exactly)], axis=1),
        )


def _leaving_out_each(
    run: BlockTridiagonal,
    found: Float[np.ndarray, "rows found"],
    size: float,
    vectors: Float[np.ndarray, "rows nodes"],
    dim: int,
) -> tuple[Float[np.ndarray, "probes nodes"], Float[np.ndarray, "probes nodes"]] | None:
    """Each probe's weights, on nodes with these Ritz vectors, of all that was not found; the part that is sampled.

    For probe i: (tr(Q^T f(A) Q) + (dim - found - k) z^T f(A) z) / dim, Q of k columns from the others' Krylov space, z
    the unit vector along what Q and `found` leave of the probe. All in coordinates of the basis of `run`; `size` is
    the largest Ritz value that was not found.
    """
    rows, probes, count = len(run.matrix), len(run.coupling), found.shape[1]
    start = np.zeros((rows, probes))
    start[:probes] = run.start
    matrix = csr_array(run.matrix)
    steps = min(int(_DEPTH_LEFT_OUT * (rows - count) / probes), _WIDEST_SPAN // max(1, probes - 1))
    weights, sampled = np.zeros((2, probes, vectors.shape[1]))
    for i in range(probes):
        span = _krylov_span(matrix, np.delete(start, i, axis=1), steps, found, size)
        along = (_beside(span, start[:, i]) @ vectors) ** 2
        if along.sum() <= _NEGLIGIBLE * run.start[:, i] @ run.start[:, i]:
            return None
        sampled[i] = along / along.sum() * (1.0 - span.shape[1] / dim)
        counted = ((span[:, count:].T @ vectors) ** 2).sum(axis=0)
        weights[i] = sampled[i] + counted * ((span.shape[1] - count) / dim / max(counted.sum(), 1e-300))
    return weights, sampled


def _krylov_span(
    matrix: csr_array,
    block: Float[np.ndarray, "rows width"],
    steps: int,
    found: Float[np.ndarray, "rows found"],
    size: float,
) -> Float[np.ndarray, "rows columns"]:
    """Orthonormal columns: those found, then the Krylov space of a block beside them as far as it does not close."""
    (rows, width), used = block.shape, found.shape[1]
    span = np.empty((rows, used + steps * width))
    span[:, :used] = found
    for step in range(steps if width else 0):
        fresh, lengths, _ = np.linalg.svd(_beside(span[:, :used], block), full_matrices=False)
        fresh = fresh[:, lengths > _CLOSED * (size if step else 1.0)]
        if not fresh.shape[1]:
            break
        span[:, used : used + fresh.shape[1]] = fresh
        used += fresh.shape[1]
        block = matrix @ fresh
    return span[:, :used]


def _beside(known: Float[np.ndarray, "rows known"], vectors: Float[np.ndarray, "rows ..."]) -> np.ndarray:
    """What orthonormal columns leave of a vector or of several; twice, since once leaves their rounding."""
    for _ in range(2):
        vectors = vectors - known @ (known.T @ vectors)
    return vectors


def resolved(
    run: BlockTridiagonal,
    pairs: tuple[Float[np.ndarray, " rows"], Float[np.ndarray, "rows rows"]],
    *,
    eps: float,
    nodes: Float[np.ndarray, " nodes"],
) -> tuple[np.ndarray, np.ndarray]:
    """Which of `nodes` (of the rule with its tail) and of the Ritz pairs are eigenvalues, found with multiplicity.

    Ritz values closer than their residuals, or than rounding, form a group. A group counts if it has fewer members
    than the block has columns, if each residual is below 3 % of the distance to the next Ritz value outside, and
    if as many nodes lie there.
    """
    width = len(run.coupling)
    ritz, vectors = pairs
    size = float(np.abs(ritz).max(initial=0.0)) or 1.0
    residuals = size * np.linalg.norm(run.coupling / size @ vectors[-width:], axis=0)  # its squares shall not vanish
    seen = ((run.start.T @ vectors[:width]) ** 2).mean(axis=0) > _NEGLIGIBLE
    places, ritz, residuals = np.flatnonzero(seen), ritz[seen], residuals[seen]
    rounding = 100.0 * eps * size
    apart = np.diff(ritz) > residuals[1:] + residuals[:-1] + rounding
    known = np.zeros(nodes.shape, dtype=bool)
    found = np.zeros(seen.shape, dtype=bool)
    for group in np.split(np.arange(len(ritz)), np.flatnonzero(apart) + 1):
        first, last = group[0], group[-1]
        below = ritz[first] - ritz[first - 1] if first else np.inf
        above = ritz[last + 1] - ritz[last] if last + 1 < len(ritz) else np.inf
        gap = min(below, above)
        if len(group) >= width or not np.isfinite(gap) or residuals[group].max() > _ISOLATED * gap:
            continue
        here = (nodes > ritz[first] - 0.5 * gap) & (nodes < ritz[last] + 0.5 * gap)
        if here.sum() == len(group):
            known |= here
            found[places[group]] = True
    return known, found
