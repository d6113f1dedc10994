"""Random start vectors, and the two looks at a device that every estimator takes: one before, one after."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from torch_rmt.guard import full_precision
from torch_rmt.operators.base import LinearOperator

_ROWS_AT_ONCE = 2**13  # of a sum over rows; found by tuning, as the next
_COLUMNS_FOR_GEMM = 64  # beyond, the products of unlike columns cost more than they save
_LONG = 2**15  # entries from which on a host makes them of random bytes
_SHORTEST_SQUARED, _ENLARGED = 1e-290, 500  # smaller squares lose digits; a factor 2^500 brings any number within
_CUBIC, _QUINTIC = -2.39241263019674, 2.40544280151054  # for moments of a normal up to the seventh


@full_precision()
def sphere(
    dim: int, count: int, generator: torch.Generator, *, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "dim count"]:
    """Columns drawn independently and uniformly from the unit sphere of R^dim.

    They are drawn in float32 or wider on the generator's own device and moved, so that one seed means one
    set of probes for every device and dtype of the operator. On a host, columns of 32,768 entries and more are not
    made of normal numbers but of random bytes, twice as fast: independent entries with the moments of a normal up
    to the seventh, so that Var(v^T A v) is what it is on the sphere, to a relative 1/dim.

    >>> generator = torch.Generator().manual_seed(0)
    >>> sphere(3, 2, generator, device=torch.device("cpu"), dtype=torch.float64).norm(dim=0)
    tensor([1., 1.], dtype=torch.float64)
    """
    draw = torch.float64 if dtype == torch.float64 else torch.float32
    if dim >= _LONG and generator.device.type == "cpu":
        return _of_bytes(dim, count, generator, draw).to(device=device, dtype=dtype).T
    vectors = torch.randn(dim, count, generator=generator, device=generator.device, dtype=draw)
    scale = column_dots(vectors, vectors, tame=True).rsqrt().to(draw).unsqueeze(1)
    columns = vectors.new_empty(count, dim)  # each column in one piece of memory, as operators want them
    for piece in _pieces(dim):
        torch.mul(vectors[piece].T, scale, out=columns[:, piece])
    return columns.to(device=device, dtype=dtype).T


def _of_bytes(dim: int, count: int, generator: torch.Generator, dtype: torch.dtype) -> Float[Tensor, "count dim"]:
    """Rows of unit length, entries u (1 + u^2 (a + b u^2)) for u of two random bytes."""
    words = torch.empty(-(-dim * count // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    raw = words.view(torch.int16)[: dim * count].view(count, dim)
    rows = torch.empty(count, dim, dtype=dtype)
    squares = torch.zeros(count, dtype=torch.float64)
    at_once = max(256, _LONG // count)
    for first in range(0, dim, at_once):
        piece = slice(first, first + at_once)
        part = rows[:, piece].copy_(raw[:, piece]).add_(0.5).mul_(2.0**-15)
        square = part * part
        part.mul_((square * _QUINTIC).add_(_CUBIC).mul_(square).add_(1.0))
        squares += torch.linalg.vector_norm(part, dim=1).double().square()
    return rows.mul_(squares.rsqrt().to(dtype).unsqueeze(1))


def column_dots(
    left: Float[Tensor, "dim count"], right: Float[Tensor, "dim count"], *, tame: bool = False
) -> Float64[Tensor, " count"]:
    """Inner product of each pair of columns, added up in float64, by pieces that stay in the cache.

    Over the whole at once the conversion costs as much as a few products with an operator. `tame` says that no
    product of two entries leaves the range of the vectors' own type: then each piece is one matrix product, of which
    the diagonal is taken; that is seven times faster, and right to the rounding of that type.
    """
    total = torch.zeros(left.shape[1], device=left.device, dtype=torch.float64)
    by_matrix = tame and left.shape[1] <= _COLUMNS_FOR_GEMM and left.dtype == right.dtype
    for piece in _pieces(left.shape[0]):
        if by_matrix:
            total += (left[piece].T @ right[piece]).diagonal()
        else:
            total += (left[piece].double() * right[piece].double()).sum(dim=0)
    return total


def column_gram(vectors: Float[Tensor, "dim count"], *, tame: bool) -> Float64[Tensor, "count count"]:
    """Inner products of all pairs of columns, added up in float64 by pieces; `tame` as in `column_dots`."""
    total = torch.zeros(vectors.shape[1], vectors.shape[1], device=vectors.device, dtype=torch.float64)
    for piece in _pieces(vectors.shape[0]):
        part = vectors[piece] if tame else vectors[piece].double()
        total += part.T @ part
    return total


def squared_lengths(vectors: Float[Tensor, "dim count"]) -> tuple[Float64[Tensor, " count"], bool]:
    """Squared length of each column, and whether all are so far from the ends of the range that sums are tame."""
    quick = column_dots(vectors, vectors, tame=True)
    tame = bool(((quick > 1e-12) & (quick < 1e24)).all())
    if tame:
        return quick, True
    exactly = column_dots(vectors, vectors)
    if bool((vectors.any(dim=0) & (exactly < _SHORTEST_SQUARED)).any()):
        raise ValueError(
            "products as short as these have no squares in float64, so no error could be told; measure the operator "
            f"times a number, as in `2.0**{_ENLARGED} * operator`, and divide what comes out by it"
        )
    return exactly, False


def _pieces(rows: int) -> list[slice]:
    """At most 64 runs of rows."""
    size = max(_ROWS_AT_ONCE, -(-rows // 64))
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def column_norms(vectors: Float[Tensor, "dim count"]) -> Float64[Tensor, " count"]:
    """Euclidean norm of each column in float64, so that it neither stalls nor, for a short one, underflows."""
    lengths: Tensor
    if vectors.dtype != torch.float64:  # squares of all narrower numbers are within its range
        lengths = torch.linalg.vector_norm(vectors, dim=0, dtype=torch.float64)
        return lengths
    exponent = torch.frexp(vectors.abs().amax(dim=0)).exponent.clamp(-1000, 0)  # a power of two rounds nothing
    lengths = torch.ldexp(torch.linalg.vector_norm(torch.ldexp(vectors, -exponent), dim=0), exponent)
    return lengths


def require_symmetric(operator: LinearOperator, method: str) -> int:
    """Dimension of a symmetric operator; a ValueError with the way out for any other."""
    rows, columns = operator.shape
    if not operator.symmetric or rows != columns:
        raise ValueError(
            f"{method} needs a symmetric operator, got one of shape {operator.shape} with "
            f"symmetric={operator.symmetric}; measure its singular values (SLQ, golub_kahan) or wrap it in "
            "Gram(operator), which is A^T A"
        )
    return require_size(operator)


def require_size(operator: LinearOperator) -> int:
    """Number of columns; a ValueError if the operator is empty."""
    rows, columns = operator.shape
    if rows < 1 or columns < 1:
        raise ValueError(f"the operator has shape {operator.shape}: there is no spectrum of an empty matrix")
    return columns


def require_finite(values: Tensor, operator: LinearOperator) -> None:
    """Raise a ValueError with advice when a product was not finite; one look at the device."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"products with {type(operator).__name__} of shape {operator.shape} are not finite: "
            "check that the loss and the gradients are finite at this batch, that no weight is NaN, and "
            "measure in float32 or float64 rather than in half precision"
        )
