"""Other people's operators as ours, and ours as theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from torch_rmt.operators.base import LinearOperator


class Foreign(LinearOperator):
    """An operator from two functions, `V -> A V` and `U -> A^T U` (needed only where A is not symmetric)."""

    def __init__(
        self,
        shape: tuple[int, int],
        matmat: Callable[[Tensor], Tensor],
        rmatmat: Callable[[Tensor], Tensor] | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shape, self._matmat, self._rmatmat = shape, matmat, rmatmat
        self._dtype, self._device = dtype, device
        self.symmetric = rmatmat is None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._shape

    @property
    def device(self) -> torch.device:
        """As given."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """As given."""
        return self._dtype

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
        """Columns `A v`."""
        return self._matmat(V)

    def adjoint(self) -> LinearOperator:
        """Return `A^T`, or itself where symmetric."""
        if self._rmatmat is None:
            return self
        rows, columns = self._shape
        return Foreign((columns, rows), self._rmatmat, self._matmat, dtype=self._dtype, device=self._device)


def from_scipy(operator: Any, *, symmetric: bool, device: torch.device | str = "cpu") -> LinearOperator:
    """Take a SciPy `LinearOperator`, sparse matrix or array.

    Raises:
        ValueError: declared symmetric and not square.
        TypeError: a complex operator.

    Example:
        >>> from scipy.sparse import diags_array
        >>> A = from_scipy(diags_array([1.0, 2.0]), symmetric=True)
        >>> A.matmat(torch.ones(2, 1, dtype=torch.float64)).sum()
        tensor(3., dtype=torch.float64)
    """
    from scipy.sparse.linalg import aslinearoperator

    linear = aslinearoperator(operator)
    rows, columns = int(linear.shape[0]), int(linear.shape[1])
    if symmetric and rows != columns:
        raise ValueError(f"a {rows} x {columns} operator cannot be symmetric; pass symmetric=False")
    if np.issubdtype(linear.dtype, np.complexfloating):
        raise TypeError(
            "the operator is complex, and operators here are real: pass [[Re A, -Im A], [Im A, Re A]], whose "
            "eigenvalues are those of A and their conjugates"
        )
    dtype = torch.float32 if linear.dtype == np.float32 else torch.float64
    place = torch.device(device)

    def through(product: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
        return lambda V: torch.as_tensor(np.asarray(product(V.detach().cpu().numpy())), dtype=dtype, device=place)

    rmatmat = None if symmetric else through(linear.rmatmat)
    return Foreign((rows, columns), through(linear.matmat), rmatmat, dtype=dtype, device=place)


def to_scipy(operator: LinearOperator) -> Any:
    """Hand an operator to SciPy, for example to `scipy.sparse.linalg.eigsh`.

    Example:
        >>> from torch_rmt.operators import Dense
        >>> to_scipy(Dense(torch.eye(2), symmetric=True)) @ np.ones(2)
        array([1., 1.], dtype=float32)
    """
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    adjoint = operator.adjoint()
    # NumPy has no bfloat16, and no LAPACK in half precision.
    wide = torch.float64 if operator.dtype == torch.float64 else torch.float32

    def through(product: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
        def run(block: Any) -> Any:
            if np.iscomplexobj(block):
                return run(block.real) + 1j * run(block.imag)
            V = torch.as_tensor(np.ascontiguousarray(block), dtype=operator.dtype, device=operator.device)
            flat = V.ndim == 1
            image = product(V.unsqueeze(1) if flat else V).detach().cpu().to(wide).numpy()
            return image[:, 0] if flat else image

        return run

    forward, backward = through(operator.matmat), through(adjoint.matmat)
    number = np.dtype(str(wide).removeprefix("torch."))
    return ScipyOperator(
        shape=operator.shape, matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=number
    )


def from_curvlinops(operator: Any) -> LinearOperator:
    """Take an operator of curvlinops 3 (it multiplies tensors by `@`; `SELF_ADJOINT` says whether symmetric).

    Raises:
        TypeError: the object is no curvlinops operator.
    """
    if not hasattr(operator, "SELF_ADJOINT") or not hasattr(operator, "__matmul__"):
        raise TypeError(
            f"{type(operator).__name__} is no curvlinops (>= 3) operator; use from_scipy for SciPy operators"
        )
    rows, columns = (int(n) for n in operator.shape)
    rmatmat = None
    if not operator.SELF_ADJOINT:
        transposed = operator.adjoint()
        rmatmat = lambda U: transposed @ U  # noqa: E731
    return Foreign((rows, columns), lambda V: operator @ V, rmatmat, dtype=operator.dtype, device=operator.device)
