"""Stochastic Lanczos quadrature: a spectral distribution from a few dozen products."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from torch_rmt.guard import full_precision
from torch_rmt.operators import column_bytes, dense_bytes, keeping_to, room_beside
from torch_rmt.operators.base import LinearOperator
from torch_rmt.spectra.block_slq import BlockSLQ
from torch_rmt.spectra.exact import exact
from torch_rmt.spectra.extremes import top_eigenvalues
from torch_rmt.spectra.golub_kahan import golub_kahan, squared_gauss_rule
from torch_rmt.spectra.gram import Complement, widened
from torch_rmt.spectra.lanczos import Reorthogonalise, gauss_rule, lanczos
from torch_rmt.spectra.positive import clipped
from torch_rmt.spectra.probes import require_size, sphere
from torch_rmt.spectra.spectrum import Spectrum

_BASIS_BYTES = 2**31  # of the shared Krylov space
_VECTORS_PER_COLUMN = 10  # of a block that is orthogonalised, measured as live bytes
_CHEAP_BASIS_BYTES = 2**24  # below this, full reorthogonalisation costs less than a product; found by tuning
_SHORTEST_TAIL = 128  # rows; found by tuning: more only cost memory
_VECTOR_BYTES = 2**30  # the recurrence's own vectors of one block of probes stay below this
_DEFLATION_TOLERANCE = 1e-2  # of residuals: an eigenvalue is then known to about its square
_SHARE_FOR_DEFLATION = 0.25  # of a budget, found by tuning on Hessians, as are the next two
_PRODUCTS_PER_OUTLIER = 5
_BUDGET_FOR_DEFLATION = 100
_STEPS_PER_ROOT = 2.2  # depth = this times the square root of the budget


@dataclass(frozen=True)
class SLQ:
    """Stochastic Lanczos quadrature with `probes` random vectors and `depth` Lanczos steps each.

    mean_i f(lambda_i) = E v^T f(A) v, v uniform on the unit sphere, and v^T f(A) v = sum_j w_j f(theta_j)
    by Gauss quadrature on the Lanczos matrix. The Lanczos matrix is continued by a constant tail, the mean
    of its last coefficients, as the recursion method of solid-state physics does: the rule stays exact for
    polynomials of degree 2 depth - 1, its weights positive, and the steps of its distribution function
    become small. Unbiased for those polynomials; the standard error falls as (probes * dim)^(-1/2).
    An operator that is not symmetric is measured as A^T A or A A^T, whichever is smaller, and its zeros
    counted. (Golub and Meurant 1994; Ubaru, Chen and Saad 2017; tail: Haydock, Heine and Kelly 1975.)

    Fields:
        probes: number of random vectors; they share every product, as columns of one `matmat`.
        depth: Lanczos steps for each; taken down to the dimension where that is smaller.
        deflate: so many eigenvalues, largest in magnitude, are found first by `top_eigenvalues`, enter the
            spectrum with their exact weight, and the probes are drawn from the complement. Pays where few
            outliers carry most of the second moment and the budget is some hundreds of products.
        reorthogonalise: "full" or "selective" keep the whole basis (memory probes * depth * dim), "none" does
            not; None means "full" where the basis is so small that it costs nothing, else "none".
            The density hardly gains (Ritz values without ghosts do); for A that is not symmetric "selective"
            is taken as "full".
        max_memory: bytes for graphs and vectors: fewer probes run at a time. Raises ValueError if one does not fit.

    >>> from torch_rmt.spectra import DenseOperator
    >>> identity = DenseOperator(torch.eye(50, dtype=torch.float64), symmetric=True)
    >>> spectrum = SLQ(probes=2, depth=4)(identity, torch.Generator().manual_seed(0))
    >>> round(spectrum.moment(3)[0], 9), spectrum.matvecs
    (1.0, 8)
    """

    probes: int = 8
    depth: int = 64
    deflate: int = 0
    reorthogonalise: Reorthogonalise | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if self.probes < 1 or self.depth < 1:
            raise ValueError(f"SLQ needs at least one probe and one step, got {self.probes} and {self.depth}")
        if self.deflate < 0:
            raise ValueError(f"deflate counts eigenvalues, got {self.deflate}")

    @classmethod
    def for_budget(cls, matvecs: int) -> SLQ:
        """Choose probes and depth for a number of products.

        More steps blur less, more probes scatter less; the balance, found by tuning on Hessians of trained
        and untrained networks, is a depth of 2.2 times the square root of the budget.

        >>> SLQ.for_budget(30), SLQ.for_budget(800)
        (SLQ(probes=2, depth=15, deflate=0, reorthogonalise=None, max_memory=None), \
SLQ(probes=13, depth=61, deflate=0, reorthogonalise=None, max_memory=None))
        """
        if matvecs < 1:
            raise ValueError(f"a budget is at least one product, got {matvecs}")
        probes = max(1, round(matvecs**0.5 / _STEPS_PER_ROOT))
        return cls(probes=probes, depth=matvecs // probes)

    def __call__(self, operator: LinearOperator, generator: torch.Generator) -> Spectrum:
        """Measure the operator; probes come from `generator` alone."""
        operator = widened(operator)
        columns = require_size(operator)
        seed = generator.initial_seed()
        smaller = operator if operator.shape[1] <= operator.shape[0] else operator.adjoint()
        known, spent, vectors = _outliers(smaller, self.deflate, generator, self.max_memory)
        dim = smaller.shape[1]
        steps = min(self.depth, dim - len(known))
        how, block, notes = self._in_memory(smaller, steps, 0 if vectors is None else vectors.shape[1])
        rules = []
        for first in range(0, self.probes, block):
            count = min(block, self.probes - first)
            start = sphere(dim, count, generator, device=operator.device, dtype=operator.dtype)
            own = (_vectors(how, steps) * count + len(known)) * dim * operator.dtype.itemsize
            with keeping_to(smaller, None if self.max_memory is None else self.max_memory - own, count):
                rules.append(_rule(smaller, start, steps, vectors, how))
                notes = tuple(dict.fromkeys((*notes, *getattr(operator, "notes", ()))))
        nodes = np.concatenate([rule[0] for rule in rules])
        weights = np.concatenate([rule[1] for rule in rules])
        zeros = columns - dim
        certain = np.concatenate([known, np.zeros(1 if zeros else 0)])
        masses = np.concatenate([np.ones(len(known)), np.full(1 if zeros else 0, float(zeros))]) / columns
        weights = np.concatenate([weights * (1.0 - masses.sum()), np.tile(masses, (self.probes, 1))], axis=1)
        method = f"slq, {self.probes} probes x {steps} steps, {how} reorthogonalisation"
        if len(known):
            method += f", {len(known)} eigenvalues deflated"
        return Spectrum(
            nodes=np.concatenate([nodes, np.tile(certain, (self.probes, 1))], axis=1),
            weights=weights,
            dim=columns,
            matvecs=spent + self.probes * steps * (1 if operator.symmetric else 2),
            method=method,
            seed=seed,
            symmetric=operator.symmetric,
            notes=notes,
            known=len(certain),
            known_count=len(known) + zeros,
        )

    def _in_memory(
        self, operator: LinearOperator, steps: int, known: int
    ) -> tuple[Reorthogonalise, int, tuple[str, ...]]:
        """How to reorthogonalise and how many probes to run at a time, and what was given up for memory."""
        vector = operator.shape[1] * operator.dtype.itemsize
        how = self.reorthogonalise
        if how is None:
            how = "full" if vector * steps <= _CHEAP_BASIS_BYTES else "none"
        if self.max_memory is None:
            block = _VECTOR_BYTES // (_vectors(how, steps) * vector)
            return how, max(1, min(self.probes, block)), ()
        spare = room_beside(operator, self.max_memory) - known * vector
        product = column_bytes(operator)
        if self.reorthogonalise is None and spare < _vectors(how, steps) * vector + product:
            how = "none"
        each = _vectors(how, steps) * vector + product
        if spare < each:
            raise ValueError(
                f"one probe takes {self.max_memory - spare + each} bytes and max_memory={self.max_memory} are allowed; "
                "allow more, use smaller batches, fewer parameters (params=...), or reorthogonalise='none'"
            )
        block = min(self.probes, spare // each)
        said = (f"{block} of {self.probes} probes at a time: {self.max_memory} bytes allow no more",)
        return how, block, said if block < self.probes else ()


def _vectors(how: Reorthogonalise, steps: int) -> int:
    """Vectors that a probe's recurrence holds."""
    return 5 if how == "none" else steps + 8


def spectrum_within(
    operator: LinearOperator, generator: torch.Generator, *, matvecs: int, max_memory: int | None = None
) -> Spectrum:
    """Spend at most about so many products on a spectrum, in the way that leaves the smallest error.

    Dense where the budget covers the dimension, since nothing is cheaper then; `BlockSLQ` where its basis takes
    at most 2 GiB. Otherwise, and for an operator that is not symmetric, SLQ, with a quarter of a budget from
    100 products on spent on deflating outliers. A product with A^T A counts as two. `max_memory` bounds the bytes of
    graphs and vectors; `notes` say what was given up for it.

    Raises ValueError if not even one probe fits.

    >>> from torch_rmt.spectra import DenseOperator
    >>> operator = DenseOperator(torch.diag(torch.arange(1.0, 31.0)), symmetric=True)
    >>> spectrum_within(operator, torch.Generator().manual_seed(0), matvecs=40).method
    'exact'
    """
    operator = widened(operator)
    price = 1 if operator.symmetric else 2
    if matvecs >= min(operator.shape) and (max_memory is None or dense_bytes(operator) <= max_memory):
        return exact(operator, max_memory=max_memory)
    matvecs = min(matvecs, max(1, min(operator.shape) - 1))  # the matrix does not fit
    budget = max(1, matvecs // price)
    vector, shared = operator.shape[1] * operator.dtype.itemsize, BlockSLQ.for_budget(budget)
    held = (budget + _VECTORS_PER_COLUMN * shared.probes) * vector
    product = shared.probes * column_bytes(operator)
    fits = max_memory is None or held + product <= room_beside(operator, max_memory)
    if operator.symmetric and fits and budget * vector <= _BASIS_BYTES:
        with keeping_to(operator, None if max_memory is None else max_memory - held, shared.probes):
            found = shared(operator, generator)
            return replace(found, notes=tuple(dict.fromkeys((*found.notes, *getattr(operator, "notes", ())))))
    given_up = () if fits else (f"no shared Krylov space: it would take {held} bytes, max_memory={max_memory}",)
    for_outliers = int(_SHARE_FOR_DEFLATION * budget)
    if budget < _BUDGET_FOR_DEFLATION or max_memory is not None:  # the basis for outliers takes memory too
        found = replace(SLQ.for_budget(budget), max_memory=max_memory)(operator, generator)
    else:
        plan = SLQ.for_budget(budget - for_outliers)
        outliers = for_outliers // _PRODUCTS_PER_OUTLIER
        found = SLQ(probes=plan.probes, depth=plan.depth, deflate=outliers)(operator, generator)
    return replace(found, notes=(*found.notes, *given_up))


def _outliers(
    operator: LinearOperator, count: int, generator: torch.Generator, max_memory: int | None
) -> tuple[Float[np.ndarray, " known"], int, Float[Tensor, "dim known"] | None]:
    """Eigenvalues (of A^T A if A is not symmetric) to deflate, the products they cost and their vectors."""
    count = min(count, operator.shape[1] - 1)
    if count < 1:
        return np.zeros(0), 0, None
    most, tolerance = 6 * count + 10, _DEFLATION_TOLERANCE
    found = top_eigenvalues(operator, count, generator, tolerance=tolerance, max_matvecs=most, max_memory=max_memory)
    good = found.residuals <= 2.0 * _DEFLATION_TOLERANCE * np.abs(found.values)
    if not good.any():
        return np.zeros(0), found.matvecs, None
    return (
        found.values[good],
        found.matvecs,
        found.vectors[:, torch.from_numpy(good).to(found.vectors.device)],
    )


@full_precision()
def _rule(
    operator: LinearOperator,
    start: Float[Tensor, "dim probes"],
    steps: int,
    vectors: Float[Tensor, "dim known"] | None,
    how: Reorthogonalise,
) -> tuple[Float[np.ndarray, "probes nodes"], Float[np.ndarray, "probes nodes"]]:
    """Quadrature of one block of probes, on the complement of `vectors` where there are any."""
    spanned = steps >= operator.shape[1] - (0 if vectors is None else vectors.shape[1])
    tail = 0 if spanned else max(2 * steps, _SHORTEST_TAIL)
    target = operator
    if vectors is not None:
        target = Complement(operator, vectors)
        start = target.project(start)
    if not operator.symmetric:
        return squared_gauss_rule(golub_kahan(target, start, steps, reorthogonalise=how != "none"), tail=tail)
    run = lanczos(target, start, steps, reorthogonalise=how)
    nodes, weights = gauss_rule(run, tail=tail)
    return clipped(nodes, target, gauss_rule(run)[0] if target.positive else nodes), weights
