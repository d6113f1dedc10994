"""`DenseOperator`: a matrix that is at hand, as an operator; what tests and small examples measure."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from torch_rmt.operators import Dense


class DenseOperator(Dense):
    """The given matrix; `symmetric` is declared by the caller and checked.

    Raises ValueError if a matrix declared symmetric is not square or not symmetric to rounding.
    """

    def __init__(self, matrix: Float[Tensor, "rows columns"], *, symmetric: bool = False) -> None:
        if symmetric:
            if matrix.shape[0] != matrix.shape[1]:
                raise ValueError(f"a matrix of shape {tuple(matrix.shape)} cannot be symmetric")
            slack = 1e3 * torch.finfo(matrix.dtype).eps * float(matrix.norm())
            if float((matrix - matrix.T).norm()) > slack:
                raise ValueError("the matrix is not symmetric: pass (M + M.T) / 2 or symmetric=False")
        super().__init__(matrix, symmetric=symmetric)
