"""Dense eigen- or singular values, for operators small enough to be written down."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from torch_rmt.operators.base import LinearOperator
from torch_rmt.spectra.probes import require_finite, require_size
from torch_rmt.spectra.spectrum import Spectrum

_LARGEST_DENSE_BYTES = 2 * 2**30  # of the float64 matrix; its decomposition takes about as much again
_COLUMNS_AT_ONCE = 256  # found by tuning on a 2-core machine: wider blocks only cost memory


def to_dense(operator: LinearOperator) -> Float[Tensor, "rows columns"]:
    """Write the operator out as a matrix in its own dtype, by products with the shorter identity.

    Raises ValueError if the matrix would take over 2 GiB in float64 or its products are not finite.
    """
    require_size(operator)
    rows, columns = operator.shape
    if rows * columns * 8 > _LARGEST_DENSE_BYTES:
        raise ValueError(
            f"a dense matrix of shape {operator.shape} would take {rows * columns * 8 / 2**30:.1f} GiB: "
            "estimate its spectrum with SLQ(), its extreme eigenvalues with top_eigenvalues()"
        )
    if rows < columns and not operator.symmetric:
        return to_dense(operator.adjoint()).T
    blocks = []
    for start in range(0, columns, _COLUMNS_AT_ONCE):
        width = min(_COLUMNS_AT_ONCE, columns - start)
        unit = torch.zeros(columns, width, device=operator.device, dtype=operator.dtype)
        unit[start : start + width].fill_diagonal_(1.0)
        blocks.append(operator.matmat(unit).detach())
    dense = torch.cat(blocks, dim=1)
    require_finite(dense, operator)
    return dense


def exact(operator: LinearOperator) -> Spectrum:
    """All eigenvalues of a symmetric operator, all squared singular values of any other (the law of A^T A).

    A matrix with fewer rows than columns gets its columns - rows zeros. The decomposition is in float64
    on the operator's device. Raises ValueError if the operator is too large to be written down or not finite.

    >>> from torch_rmt.spectra import DenseOperator
    >>> exact(DenseOperator(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), symmetric=True)).eigenvalues.tolist()
    [2.0, 3.0]
    """
    rows, columns = operator.shape
    dense = to_dense(operator).double()
    notes: tuple[str, ...] = ()
    if operator.symmetric:
        asymmetry = (dense - dense.T).norm() / dense.norm().clamp_min(torch.finfo(torch.float64).tiny)
        if float(asymmetry) > 1e-3:
            notes = (f"the operator claims to be symmetric and is off by {float(asymmetry):.1e} of its norm",)
        values = torch.linalg.eigvalsh(0.5 * (dense + dense.T))
    else:
        values = torch.zeros(columns, dtype=torch.float64, device=dense.device)
        singular = torch.linalg.svdvals(dense) ** 2
        values[columns - len(singular) :] = singular.flip(0)
    nodes = values.cpu().numpy()[None]
    matvecs = columns if operator.symmetric else min(rows, columns)
    return Spectrum(
        nodes=nodes,
        weights=np.full(nodes.shape, 1.0 / columns),
        dim=columns,
        matvecs=matvecs,
        method="exact",
        symmetric=operator.symmetric,
        notes=notes,
    )
