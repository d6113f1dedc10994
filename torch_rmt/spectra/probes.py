"""Random start vectors, and the two looks at a device that every estimator takes: one before, one after."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from torch_rmt.operators.base import LinearOperator

_ROWS_AT_ONCE = 2**13  # of a sum over rows; found by tuning


def sphere(
    dim: int, count: int, generator: torch.Generator, *, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "dim count"]:
    """Columns drawn independently and uniformly from the unit sphere of R^dim.

    They are drawn in float32 or wider on the generator's own device and moved, so that one seed means one
    set of probes for every device and dtype of the operator.

    >>> generator = torch.Generator().manual_seed(0)
    >>> sphere(3, 2, generator, device=torch.device("cpu"), dtype=torch.float64).norm(dim=0)
    tensor([1., 1.], dtype=torch.float64)
    """
    draw = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = torch.randn(dim, count, generator=generator, device=generator.device, dtype=draw)
    return (vectors / column_dots(vectors, vectors).sqrt().to(draw)).to(device=device, dtype=dtype)


def column_dots(left: Float[Tensor, "dim count"], right: Float[Tensor, "dim count"]) -> Float64[Tensor, " count"]:
    """Inner product of each pair of columns in float64, by pieces that stay in the cache.

    Over the whole at once the conversion costs as much as a few products with an operator.
    """
    rows = max(_ROWS_AT_ONCE, -(-left.shape[0] // 64))
    total = torch.zeros(left.shape[1], device=left.device, dtype=torch.float64)
    for first in range(0, left.shape[0], rows):
        piece = slice(first, first + rows)
        total += (left[piece].double() * right[piece].double()).sum(dim=0)
    return total


def column_norms(vectors: Float[Tensor, "dim count"]) -> Float64[Tensor, " count"]:
    """Euclidean norm of each column in float64, so that it neither overflows nor stalls."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=0, dtype=torch.float64)
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
