"""Operators made of others: `Gram`, A^T A; `Complement`, A without known eigenvectors; `Widened`, half precision."""

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


class Widened(Like):
    """An operator in half precision that takes and gives float32: its products are made in its own type, no more.

    It does not say that it is positive: the rounding of its products may leave eigenvalues below zero.
    """

    dtype = torch.float32

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator)
        self.symmetric = operator.symmetric
        self.notes = (f"products in {str(operator.dtype).removeprefix('torch.')}, all else in float32",)

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
        """Multiply by the k columns of V, rounded."""
        return self._like.matmat(V.to(self._like.dtype)).float()

    def adjoint(self) -> LinearOperator:
        """Return the adjoint, likewise, or itself."""
        return self if self.symmetric else Widened(self._like.adjoint())


def widened(operator: LinearOperator) -> LinearOperator:
    """Return the operator, or what `Widened` makes of one in half precision."""
    return Widened(operator) if operator.dtype in (torch.float16, torch.bfloat16) else operator
