"""`Gram`: A^T A as an operator, for methods that need a symmetric one."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from torch_rmt.operators.base import LinearOperator


class Gram(LinearOperator):
    """The symmetric operator A^T A; its eigenvalues are the squared singular values of A.

    One product costs one with A and one with its adjoint.
    """

    symmetric = True

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator
        self._adjoint = operator.adjoint()

    @property
    def shape(self) -> tuple[int, int]:
        """Return `(columns, columns)`."""
        return self.operator.shape[1], self.operator.shape[1]

    @property
    def device(self) -> torch.device:
        """Where vectors must live."""
        return self.operator.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of vectors."""
        return self.operator.dtype

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
        """Multiply A^T A by the k columns of V."""
        return self._adjoint.matmat(self.operator.matmat(V))

    def adjoint(self) -> LinearOperator:
        """Return itself."""
        return self
