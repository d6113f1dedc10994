"""Operators made of others: `Gram`, A^T A; `Complement`, A with known eigenvectors taken out."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from torch_rmt.operators.arithmetic import Transposed
from torch_rmt.operators.base import Like, LinearOperator


class Gram(Like):
    """The symmetric operator A^T A; its eigenvalues are the squared singular values of A.

    One product costs one with A and one with its adjoint.
    """

    symmetric = True
    positive = True

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator)
        self.operator = operator
        self._adjoint = operator.adjoint()

    @property
    def shape(self) -> tuple[int, int]:
        """Return `(columns, columns)`."""
        return self.operator.shape[1], self.operator.shape[1]

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
        """Multiply A^T A by the k columns of V."""
        return self._adjoint.matmat(self.operator.matmat(V))

    def adjoint(self) -> LinearOperator:
        """Return itself."""
        return self


class Complement(Like):
    """A P for P = 1 - V V^T, V orthonormal columns; P A P for a symmetric A.

    If V holds eigenvectors (right singular vectors), these are taken out of the spectrum and nothing else is.
    """

    def __init__(self, operator: LinearOperator, vectors: Float[Tensor, "columns known"]) -> None:
        super().__init__(operator)
        self.operator = operator
        self.vectors, _ = torch.linalg.qr(vectors)
        self.symmetric = operator.symmetric
        self.positive = operator.positive

    def project(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
        """Take the known vectors out of the k columns of V."""
        rest: Tensor = V - self.vectors @ (self.vectors.T @ V)
        return rest

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
        """Multiply A P, or P A P for a symmetric A, by the k columns of V."""
        image = self.operator.matmat(self.project(V))
        return self.project(image) if self.symmetric else image

    def adjoint(self) -> LinearOperator:
        """Return P A^T, or itself for a symmetric A."""
        if self.symmetric:
            return self
        adjoint = self.operator.adjoint()
        return Transposed(self, lambda V: self.project(adjoint.matmat(V)))
