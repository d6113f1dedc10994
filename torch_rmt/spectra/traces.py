"""Traces from products: Hutchinson, Hutch++, XTrace; the diagonal; mixed moments of several operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from torch_rmt.guard import full_precision
from torch_rmt.operators.base import LinearOperator
from torch_rmt.spectra.gram import widened
from torch_rmt.spectra.probes import column_dots, column_gram, require_finite, require_size, sphere, squared_lengths


@dataclass(frozen=True)
class Estimate:
    """A number that was estimated: its value, its standard error, its cost and how it was come by."""

    value: float
    standard_error: float
    matvecs: int
    method: str


@dataclass(frozen=True)
class DiagonalEstimate:
    """The diagonal of an operator, entry by entry, each with its standard error."""

    values: Float[Tensor, " dim"]
    standard_errors: Float[Tensor, " dim"]
    matvecs: int


@full_precision()
def trace(operator: LinearOperator, generator: torch.Generator, *, matvecs: int = 60) -> Estimate:
    """Trace of a square operator within a budget of products, by Hutchinson or by Hutch++.

    A third of the budget is spent on random vectors. How much of each product lies in the span of the others
    says what share c of |A|_F^2 a low-rank part would take. The rest is spent as Hutch++ does if
    3 (1 - c) < 1, so that this has the smaller variance, else on more of Hutchinson's vectors: on a flat
    spectrum Hutch++ loses a factor sqrt(3).

    Raises ValueError if the operator is not square, the budget is below 6 or a product is not finite.

    >>> from torch_rmt.spectra import DenseOperator
    >>> low_rank = DenseOperator(torch.diag(torch.tensor([5.0, 3.0] + 98 * [0.0])), symmetric=True)
    >>> estimate = trace(low_rank, torch.Generator().manual_seed(0), matvecs=12)
    >>> round(estimate.value, 4), estimate.method
    (8.0, 'hutch++')
    """
    operator = widened(operator)
    dim = _require_square(operator)
    if matvecs < 6:
        raise ValueError(f"a trace needs at least 6 products to have an error bar, got {matvecs}")
    third = min(matvecs // 3, dim)
    first = _probed(operator, _draw(operator, third, generator))
    if first.left_over_share() < 1.0 / 3.0:
        return _deflated(operator, generator, first.images, matvecs - 2 * third, spent=third)
    rest = _probed(operator, _draw(operator, matvecs - third, generator))
    value, error = _sphere_mean((first, rest), dim, symmetric=operator.symmetric)
    return Estimate(value, error, matvecs, "hutchinson")


@full_precision()
def hutchinson(operator: LinearOperator, generator: torch.Generator, *, probes: int = 30) -> Estimate:
    """Trace as dim times the mean of v^T A v for v uniform on the unit sphere (Girard 1989, Hutchinson 1990).

    Standard error from Var(v^T A v) = 2 / (dim + 2) (|A|_F^2 / dim - (tr A / dim)^2), with |A|_F^2 read from
    the lengths |A v|, which the products give for nothing.
    """
    operator = widened(operator)
    dim = _require_square(operator)
    probed = _probed(operator, _draw(operator, probes, generator))
    value, error = _sphere_mean((probed,), dim, symmetric=operator.symmetric)
    return Estimate(value, error, probes, "hutchinson")


@full_precision()
def hutch_plus_plus(operator: LinearOperator, generator: torch.Generator, *, matvecs: int = 60) -> Estimate:
    """Trace on the range of a sketch exactly, the rest by Hutchinson (Meyer, Musco, Musco, Woodruff 2021).

    A third of the budget each for the sketch A S, for the products with its range Q, for the probes of
    (1 - Q Q^T) A (1 - Q Q^T), which are drawn from the unit sphere of the complement.
    """
    operator = widened(operator)
    dim = _require_square(operator)
    if matvecs < 6:
        raise ValueError(f"hutch_plus_plus needs at least 6 products, got {matvecs}")
    third = min(matvecs // 3, dim)
    images = _product(operator, _draw(operator, third, generator))
    return _deflated(operator, generator, images, matvecs - 2 * third, spent=third)


@full_precision()
def xtrace(operator: LinearOperator, generator: torch.Generator, *, matvecs: int = 60) -> Estimate:
    """Trace by leaving each probe out in turn: every product serves the range and the residual.

    (Epperly, Tropp and Webber 2024, algorithm XTrace with normalised test vectors.) The estimates that leave
    out one probe each are not independent, so their spread is too small an error (root mean square z of 1.0
    to 1.5 over 200 seeds); the jackknife over probes errs upwards (Efron and Stein 1981; z of 0.4 to 0.8).
    The geometric mean of the two is used, found by tuning (z of 0.7 to 1.0).
    Raises ValueError if the operator is not square, the budget is below 6 or a product is not finite.
    """
    operator = widened(operator)
    dim = _require_square(operator)
    if matvecs < 6:
        raise ValueError(f"xtrace needs at least 6 products, got {matvecs}")
    count = min(matvecs // 2, dim)
    vectors = _draw(operator, count, generator)
    images = _product(operator, vectors)
    q, r = torch.linalg.qr(images)
    z = _product(operator, q)
    small = _Sketch(
        h=(q.T @ z).double().cpu(),
        w=(q.T @ vectors).double().cpu() * dim**0.5,
        t=(z.T @ vectors).double().cpu() * dim**0.5,
        r=r.double().cpu() * dim**0.5,
        dim=dim,
        eps=torch.finfo(operator.dtype).eps,
    )
    if count == dim:
        return Estimate(float(small.h.trace()), 0.0, 2 * count, "xtrace")
    estimates = small.estimates()
    without = torch.stack([small.without(i).estimates().mean() for i in range(count)])
    jackknife = (without - without.mean()).square().sum().sqrt() * ((count - 1) / count) ** 0.5
    error = (jackknife * estimates.std() / count**0.5).sqrt() * _student(count - 1)
    return Estimate(float(estimates.mean()), float(error), 2 * count, "xtrace")


@dataclass(frozen=True)
class _Sketch:
    """All that XTrace needs of A Omega = Q R and Z = A Q: H = Q^T Z, W = Q^T Omega, T = Z^T Omega and R."""

    h: Float64[Tensor, "k k"]
    w: Float64[Tensor, "k m"]
    t: Float64[Tensor, "k m"]
    r: Float64[Tensor, "k m"]
    dim: int
    eps: float

    def without(self, place: int) -> _Sketch:
        """The same sketch had one probe not been drawn."""
        keep = [i for i in range(self.r.shape[1]) if i != place]
        turn, r = torch.linalg.qr(self.r[:, keep])
        t, w = turn.T @ self.t[:, keep], turn.T @ self.w[:, keep]
        return _Sketch(turn.T @ self.h @ turn, w, t, r, self.dim, self.eps)

    def estimates(self) -> Float64[Tensor, " m"]:
        """For each i the trace by the range of all probes but i and the residual of probe i."""
        count = self.r.shape[1]
        # A range smaller than the sketch leaves zeros on the diagonal of R; any tiny number there will do,
        # since the direction it lets in adds nothing to the trace.
        pivot = self.r.diagonal().abs()
        tiny = self.eps * torch.where(pivot.max() > 0, pivot.max(), 1.0)
        r = self.r + torch.diag(torch.where(pivot <= tiny, tiny, 0.0))
        s = torch.linalg.solve_triangular(r, torch.eye(count, dtype=r.dtype), upper=True).T
        s = s / s.norm(dim=0)
        along = (s * self.w).sum(dim=0)
        x = self.w - s * along
        scale = (self.dim - count + 1) / (self.dim - self.w.square().sum(dim=0) + along.square()).clamp_min(1e-300)
        rest = (x * (self.h @ x)).sum(dim=0) - (self.t * x).sum(dim=0) + along * (s * r).sum(dim=0)
        found: Tensor = self.h.trace() - (s * (self.h @ s)).sum(dim=0) + rest * scale
        return found


@full_precision()
def diagonal(operator: LinearOperator, generator: torch.Generator, *, probes: int = 30) -> DiagonalEstimate:
    """Diagonal of A as the mean of v * (A v) for v of random signs (Bekas, Kokiopoulou and Saad 2007).

    The variance of entry i is the sum of A_ij^2 over j other than i, over `probes`; it is estimated as
    (|A v|_i^2 averaged - the squared estimate) and inflated for its own noise.
    """
    dim = _require_square(operator)
    if probes < 2:
        raise ValueError(f"the error of a diagonal needs at least two probes, got {probes}")
    signs = torch.randint(0, 2, (dim, probes), generator=generator, device=generator.device)
    vectors = (2 * signs - 1).to(device=operator.device, dtype=operator.dtype)
    samples = (vectors * _product(operator, vectors)).double()
    errors = samples.std(dim=1) * (_student(probes - 1) / probes**0.5)
    return DiagonalEstimate(samples.mean(dim=1), errors, probes)


@full_precision()
def mixed_moment(word: Sequence[LinearOperator], generator: torch.Generator, *, probes: int = 30) -> Estimate:
    """Normalised trace of a product of operators, tr(A B A B ...) / dim, by v^T (A B A B ... v).

    Free operators have vanishing alternating moments of their centred parts; this measures them.
    Cost: one product with every letter for each probe; the standard error as in `hutchinson`.

    >>> from torch_rmt.spectra import DenseOperator
    >>> two = DenseOperator(2.0 * torch.eye(40, dtype=torch.float64), symmetric=True)
    >>> round(mixed_moment((two, two, two), torch.Generator().manual_seed(0)).value, 9)
    8.0
    """
    if not word:
        raise ValueError("a mixed moment needs at least one operator")
    dim = word[-1].shape[1]
    for left, right in zip(word, [*word[1:], word[0]], strict=True):
        if left.shape[1] != right.shape[0]:
            raise ValueError(f"operators of shape {left.shape} and {right.shape} cannot be multiplied in turn")
    if probes < 2:
        raise ValueError(f"the error of a mixed moment needs at least two probes, got {probes}")
    last = word[-1]
    vectors = sphere(dim, probes, generator, device=last.device, dtype=last.dtype)
    images = vectors
    for operator in reversed(word):
        images = _product(operator, images)
    value, error = _sphere_mean((_Probed.of(vectors, images),), dim, symmetric=False)
    return Estimate(value / dim, error / dim, probes * len(word), "mixed moment")


def _deflated(
    operator: LinearOperator,
    generator: torch.Generator,
    images: Float[Tensor, "dim k"],
    probes: int,
    *,
    spent: int,
) -> Estimate:
    """Hutch++ from a sketch `images` that cost `spent` products, with `probes` more for the residual."""
    dim, rank = images.shape
    q, _ = torch.linalg.qr(images)
    inner = (q * _product(operator, q)).sum(dtype=torch.float64)
    if rank == dim:
        return Estimate(_host(inner)[0], 0.0, spent + rank, "hutch++")
    vectors = _draw(operator, probes, generator)
    for _ in range(2):
        vectors = vectors - q @ (q.T @ vectors)
    vectors = vectors / vectors.norm(dim=0)
    products = _product(operator, vectors)
    products = products - q @ (q.T @ products)
    rest, error = _sphere_mean((_Probed.of(vectors, products),), dim - rank, symmetric=operator.symmetric)
    return Estimate(_host(inner)[0] + rest, error, spent + rank + probes, "hutch++")


@dataclass(frozen=True)
class _Probed:
    """Columns v, A v and |A v|^2; `tame` as in `column_dots`."""

    vectors: Float[Tensor, "dim k"]
    images: Float[Tensor, "rows k"]
    squared: Float64[Tensor, " k"]
    tame: bool

    @classmethod
    def of(cls, vectors: Float[Tensor, "dim k"], images: Float[Tensor, "rows k"]) -> _Probed:
        return cls(vectors, images, *squared_lengths(images))

    def left_over_share(self) -> float:
        """Mean over i of the share of |A v_i|^2 outside the span of the other columns."""
        lengths = self.squared.sqrt().clamp_min(1e-150)
        gram = column_gram(self.images, tame=self.tame) / lengths / lengths[:, None]
        # 1 / (inverse Gram)_ii is the squared distance of column i from the span of the others.
        ridge = torch.finfo(self.images.dtype).eps * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        distance = 1.0 / torch.linalg.inv(gram + ridge).diagonal()
        return _host((self.squared * distance).sum() / self.squared.sum().clamp_min(1e-300))[0]


def _sphere_mean(blocks: Sequence[_Probed], freedom: int, *, symmetric: bool) -> tuple[float, float]:
    """Trace and standard error from columns v uniform on a unit sphere of `freedom` dimensions.

    Only the symmetric part of A matters: |A + A^T|_F^2 / 4 = (|A|_F^2 + tr A^2) / 2, and for A that is not
    symmetric tr A^2 comes from pairs of probes, E (v^T A u) (u^T A v) = tr A^2 / dim^2.
    """
    squared = torch.cat([block.squared for block in blocks])
    quadratic = torch.cat([column_dots(block.vectors, block.images, tame=block.tame) for block in blocks])
    count = len(quadratic)
    mean, second = quadratic.mean(), squared.mean()
    if not symmetric and count > 1:
        vectors = torch.cat([block.vectors for block in blocks], dim=1).double()
        forms = vectors.T @ torch.cat([block.images for block in blocks], dim=1).double()
        pairs = ((forms * forms.T).sum() - quadratic.square().sum()) / (count * (count - 1))
        second = 0.5 * (second + (freedom * pairs).clamp(-second, second))
    spread = (second - mean**2).clamp_min(0.0)
    variance = 2.0 * freedom**2 / (freedom + 2.0) * spread / count
    if count > 1:
        if not symmetric:
            variance = torch.maximum(variance, freedom**2 * quadratic.var() / count)
        # |A v|^2 has noise too, large where one eigenvalue outweighs the rest: inflate as Student does.
        noise = (squared / second.clamp_min(1e-300)).var() / count
        variance = variance * (1.0 + 2.0 / (2.0 / noise.clamp_min(1e-12) - 2.0).clamp_min(1.0))
    value, error = _host(freedom * mean, variance.sqrt())
    return value, error


def _student(freedom: int) -> float:
    """Factor that makes z-scores with an error of so many degrees of freedom have root mean square one."""
    return math.sqrt(1.0 + 2.0 / max(freedom - 2.0, 1.0))


def _require_square(operator: LinearOperator) -> int:
    if operator.shape[0] != operator.shape[1]:
        raise ValueError(f"only a square operator has a trace, got shape {operator.shape}; wrap it in Gram(...)")
    return require_size(operator)


def _draw(operator: LinearOperator, count: int, generator: torch.Generator) -> Float[Tensor, "dim count"]:
    return sphere(operator.shape[1], count, generator, device=operator.device, dtype=operator.dtype)


def _probed(operator: LinearOperator, vectors: Float[Tensor, "dim k"]) -> _Probed:
    probed = _Probed.of(vectors, operator.matmat(vectors).detach())
    require_finite(probed.squared, operator)
    return probed


def _product(operator: LinearOperator, vectors: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
    images = operator.matmat(vectors).detach()
    require_finite(squared_lengths(images)[0], operator)
    return images


def _host(*values: Tensor) -> tuple[float, ...]:
    numbers: list[float] = torch.stack([value.double() for value in values]).tolist()
    return tuple(numbers)
