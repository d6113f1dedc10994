"""New operators from old ones: dense matrices, transposes, diagonal scaling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from torch_rmt.operators.base import Like, LinearOperator


class Transposed(Like):
    """Transpose of an operator that can multiply from the left; its adjoint is the operator itself."""

    copies = 0

    def __init__(self, operator: LinearOperator, rmatmat: Callable[[Tensor], Tensor]) -> None:
        super().__init__(operator)
        self._rmatmat = rmatmat

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns exchanged."""
        return self._like.shape[1], self._like.shape[0]

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
        """Columns `A^T v`."""
        return self._rmatmat(V)

    def adjoint(self) -> LinearOperator:
        """Return the operator that was transposed."""
        return self._like


class Dense(LinearOperator):
    """A matrix that is at hand; `symmetric` is declared by the caller and checked. Also named `DenseOperator`.

    Raises:
        ValueError: declared symmetric and is not, to 1e-5 of its norm.

    Example:
        >>> Dense(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), symmetric=True).matmat(torch.ones(2, 1)).flatten()
        tensor([2., 3.])
    """

    def __init__(self, matrix: Float[Tensor, "rows columns"], *, symmetric: bool = False) -> None:
        if symmetric:
            if matrix.shape[0] != matrix.shape[1]:
                raise ValueError(f"a matrix of shape {tuple(matrix.shape)} cannot be symmetric")
            gap, size = (torch.linalg.vector_norm(m, dtype=torch.float64) for m in (matrix - matrix.T, matrix))
            if float(gap) > 1e-5 * float(size):  # one that is not finite passes: its products will say so
                raise ValueError(
                    "the matrix is declared symmetric and is not symmetric; pass (A + A.T) / 2 if you mean that"
                )
        self.matrix = matrix
        self.symmetric = symmetric

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return (self.matrix.shape[0], self.matrix.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the matrix lies."""
        return self.matrix.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the matrix."""
        return self.matrix.dtype

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
        """Columns `A v`."""
        return self.matrix @ V

    def adjoint(self) -> LinearOperator:
        """Return the transposed matrix, or itself."""
        return self if self.symmetric else Dense(self.matrix.T)


DenseOperator = Dense


class Scaled(Like):
    """Diagonal scaling from both sides, `D A D`, as an optimiser's preconditioner does; see `adam_scale`.

    Raises:
        ValueError: the operator is not square or the diagonal has another length.
    """

    def __init__(self, operator: LinearOperator, diagonal: Float[Tensor, " n"]) -> None:
        if operator.shape != (diagonal.shape[0], diagonal.shape[0]):
            raise ValueError(f"a diagonal of length {diagonal.shape[0]} does not scale {operator.shape}")
        super().__init__(operator)
        self.diagonal = diagonal
        self.symmetric = operator.symmetric
        self.positive = operator.positive

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
        """Columns `D A D v`."""
        d = self.diagonal[:, None]
        return d * self._like.matmat(d * V)

    def adjoint(self) -> LinearOperator:
        """Return `D A^T D`."""
        return self if self.symmetric else Scaled(self._like.adjoint(), self.diagonal)


def dense(operator: LinearOperator) -> Float[Tensor, "rows columns"]:
    """Write a small operator out as a matrix, one product with the identity."""
    return operator.matmat(torch.eye(operator.shape[1], dtype=operator.dtype, device=operator.device))
