"""Operators made of others: `Gram`, A^T A; `Complement`, A with known eigenvectors taken out."""

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


class Complement(LinearOperator):
    """P A P for a symmetric A and P = 1 - U U^T, U orthonormal columns that A maps into their own span."""

    symmetric = True

    def __init__(self, operator: LinearOperator, vectors: Float[Tensor, "dim known"]) -> None:
        self.operator = operator
        self.vectors, _ = torch.linalg.qr(vectors)

    @property
    def shape(self) -> tuple[int, int]:
        """Return `(dim, dim)`."""
        return self.operator.shape

    @property
    def device(self) -> torch.device:
        """Where vectors must live."""
        return self.operator.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of vectors."""
        return self.operator.dtype

    def project(self, V: Float[Tensor, "dim k"]) -> Float[Tensor, "dim k"]:
        """Take the known vectors out of the k columns of V."""
        rest: Tensor = V - self.vectors @ (self.vectors.T @ V)
        return rest

    def matmat(self, V: Float[Tensor, "dim k"]) -> Float[Tensor, "dim k"]:
        """Multiply P A P by the k columns of V."""
        return self.project(self.operator.matmat(self.project(V)))

    def adjoint(self) -> LinearOperator:
        """Return itself."""
        return self
