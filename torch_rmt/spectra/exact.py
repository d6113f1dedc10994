"""All eigen- or singular values: from the dense matrix, or by duality where that costs less."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from torch_rmt.guard import full_precision
from torch_rmt.operators import (
    Curvature,
    GaussNewton,
    LinearOperator,
    NeuralTangentKernel,
    Route,
    dense_bytes,
    dual_gram,
    exact_routes,
    is_out_of_memory,
    keeping_to,
)
from torch_rmt.operators.plan import COLUMNS_AT_ONCE
from torch_rmt.spectra.probes import require_finite, require_size
from torch_rmt.spectra.spectrum import Spectrum

_LARGEST_DENSE_BYTES = 2 * 2**30  # of the float64 matrix; its decomposition takes about as much again
_AT_ONCE = 64  # parameters up to which counting takes longer than doing


@full_precision()
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
    dense = torch.empty(rows, columns, device=operator.device, dtype=operator.dtype)
    for start in range(0, columns, COLUMNS_AT_ONCE):
        width = min(COLUMNS_AT_ONCE, columns - start)
        unit = torch.zeros(columns, width, device=operator.device, dtype=operator.dtype)
        unit[start : start + width].fill_diagonal_(1.0)
        dense[:, start : start + width] = operator.matmat(unit).detach()
    require_finite(dense, operator)
    return dense


@full_precision()
def exact(operator: LinearOperator, *, max_memory: int | None = None, max_seconds: float | None = None) -> Spectrum:
    """All eigenvalues of a symmetric operator, all squared singular values of any other (the law of A^T A).

    A matrix with fewer rows than columns gets its columns - rows zeros. The decomposition is in float64
    on the operator's device. Gauss-Newton, Fisher and tangent kernel of one batch go by duality (the Gram matrix
    of samples x outputs) where that costs less in counted flops and bytes; `method` says which way was taken. A
    way that does not fit `max_memory` bytes or `max_seconds`, as predicted, is left out; one that runs out of
    memory is followed by the next.

    Raises:
        ValueError: no way fits the limits, or the products are not finite.

    >>> from torch_rmt.spectra import DenseOperator
    >>> exact(DenseOperator(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), symmetric=True)).eigenvalues.tolist()
    [2.0, 3.0]
    """
    if not isinstance(operator, (Curvature, NeuralTangentKernel)):
        need = 0 if max_memory is None else dense_bytes(operator)
        if max_memory is not None and need > max_memory:
            raise ValueError(
                f"no exact spectrum of an operator of shape {operator.shape} fits (the matrix and its eigenvalues take "
                f"{need} bytes, max_memory={max_memory}): estimate it with SLQ() or top_eigenvalues()"
            )
        columns = min(*operator.shape, COLUMNS_AT_ONCE)
        with keeping_to(operator, None if max_memory is None else max_memory - _matrix_bytes(operator), columns):
            return _by_dense(operator, "exact")
    has_choice = isinstance(operator, (GaussNewton, NeuralTangentKernel)) and operator.shape[0] > _AT_ONCE
    if not has_choice and max_memory is None and max_seconds is None:
        return _by_dense(operator, "exact")
    return along(exact_routes(operator), operator, max_memory, max_seconds)


def along(
    routes: tuple[Route, ...],
    operator: Curvature | NeuralTangentKernel,
    max_memory: int | None,
    max_seconds: float | None,
) -> Spectrum:
    """Take the first of these exact ways that fits, and the next where memory runs out."""
    notes: list[str] = []
    for route in routes:
        if max_memory is not None and route.bytes > max_memory:
            notes.append(f"left out for memory, {max_memory / 2**20:.3g} MiB allowed: {route}")
        elif max_seconds is not None and route.seconds > max_seconds:
            notes.append(f"left out for time, {max_seconds:.3g} s allowed: {route}")
        else:
            others = " or ".join(str(r) for r in routes if r is not route)
            method = f"exact, {route}" + (f", rather than {others}" if others else "")
            try:
                if route.name == "dual":
                    found = _by_dual(operator, max_memory)
                else:
                    left = None if max_memory is None else max_memory - _matrix_bytes(operator)
                    with keeping_to(operator, left):
                        found = _by_dense(operator, method)
            except (RuntimeError, MemoryError, ValueError) as problem:
                refused = isinstance(problem, ValueError) and (route.name == "dual" or "would take" in str(problem))
                if not (refused or is_out_of_memory(problem)):
                    raise
                problem.__traceback__ = None  # its frames hold what was computed
                reason = str(problem) if refused else "ran out of memory"
                notes.append(f"{route}: {reason}")
            else:
                return replace(found, method=method, notes=(*found.notes, *notes))
    raise ValueError(
        f"no exact spectrum of an operator of shape {operator.shape} fits ({'; '.join(notes)}): take fewer samples, "
        "or estimate it with affordable_spectrum() or SLQ(), its extreme eigenvalues with top_eigenvalues()"
    )


def _matrix_bytes(operator: LinearOperator) -> int:
    """Of the matrix and the columns at hand while it is written out."""
    (rows, columns), item = operator.shape, operator.dtype.itemsize
    return item * (rows * columns + 2 * max(rows, columns) * min(rows, columns, COLUMNS_AT_ONCE))


def _by_dual(operator: Curvature | NeuralTangentKernel, max_memory: int | None) -> Spectrum:
    assert isinstance(operator, (GaussNewton, NeuralTangentKernel))
    gram = dual_gram(operator, max_memory=max_memory)
    nodes = gram.eigenvalues().cpu().numpy()[None]
    notes = (*operator.notes, f"dual from {gram.method}")
    return Spectrum(nodes, np.full(nodes.shape, 1.0 / gram.dim), gram.dim, gram.passes, "exact", notes=notes)


def _by_dense(operator: LinearOperator, method: str) -> Spectrum:
    rows, columns = operator.shape
    dense = to_dense(operator).double()
    notes: tuple[str, ...] = getattr(operator, "notes", ())
    if operator.symmetric:
        asymmetry = (dense - dense.T).norm() / dense.norm().clamp_min(torch.finfo(torch.float64).tiny)
        if float(asymmetry) > 1e-3:
            notes += (f"the operator claims to be symmetric and is off by {float(asymmetry):.1e} of its norm",)
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
        method=method,
        symmetric=operator.symmetric,
        notes=notes,
    )
