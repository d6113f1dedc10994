"""The tables of instances that the law tests run over: add one row to add a thing.

One section a package, in the order of the house.
"""

from __future__ import annotations

import numpy as np
import torch

# --- measures: laws -------------------------------------------------------------------------------------------------

# --- theory: activations, predictions -------------------------------------------------------------------------------

# --- operators: module kinds ----------------------------------------------------------------------------------------

# One function a kind, each returning (module, inputs, targets, loss); they are in tests/operators/module_kinds.py.
from tests.operators.module_kinds import MODULE_KINDS as MODULE_KINDS  # noqa: E402

# --- spectra: estimators --------------------------------------------------------------------------------------------

#: Prescribed spectra: test matrices are Q diag(values) Q^T with Q Haar.
MATRIX_SPECTRA: dict[str, np.ndarray] = {
    "flat": np.linspace(-1.0, 1.0, 120),
    "spike": np.concatenate([np.linspace(0.0, 1.0, 119), [20.0]]),
    "pairs": np.concatenate([[-5.0, 5.0, -3.0, 3.0], np.linspace(-1.0, 1.0, 116)]),
    "low rank": np.concatenate([np.zeros(110), np.arange(1.0, 11.0)]),
    "identity": np.ones(60),
    "zero": np.zeros(40),
    "tiny": 1e-12 * np.linspace(-1.0, 1.0, 50),
    "one": np.array([2.0]),
    "decades": np.logspace(-8, 0, 100),
}


def symmetric_matrix(values: np.ndarray, seed: int) -> torch.Tensor:
    """Q diag(values) Q^T in float64, Q drawn from Haar measure."""
    n = len(values)
    gaussian = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    q = q * torch.sign(torch.diagonal(r))
    matrix = (q * torch.as_tensor(values, dtype=torch.float64)) @ q.T
    return (matrix + matrix.T) / 2


# --- callbacks ------------------------------------------------------------------------------------------------------
