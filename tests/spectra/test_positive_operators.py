"""Operators that say they are positive: no node below zero, no excuse for an eigenvalue that is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.spectra.prescribed import symmetric_matrix
from torch_rmt.operators.base import LinearOperator
from torch_rmt.spectra import SLQ, DenseOperator
from torch_rmt.spectra.block_slq import BlockSLQ
from torch_rmt.spectra.positive import clipped


def claimed(values: np.ndarray, seed: int = 0, dtype: torch.dtype = torch.float64) -> LinearOperator:
    operator = DenseOperator(symmetric_matrix(values, seed).to(dtype), symmetric=True)
    operator.positive = True
    return operator


SPIKES = np.concatenate([np.zeros(150), np.linspace(1.0, 2.0, 40), [50.0, 100.0]])


@pytest.mark.parametrize("estimator", [SLQ(probes=3, depth=24), BlockSLQ(probes=3, depth=8)], ids=["slq", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_node_falls_below_zero(estimator, dtype: torch.dtype) -> None:
    found = estimator(claimed(SPIKES, dtype=dtype), torch.Generator().manual_seed(1))
    assert found.nodes[found.weights > 0].min() >= 0.0
    value, error = found.moment(1)
    assert abs(value - SPIKES.mean()) < 5 * error + 1e-3


@pytest.mark.parametrize("estimator", [SLQ(probes=3, depth=24), BlockSLQ(probes=3, depth=8)], ids=["slq", "block"])
@pytest.mark.parametrize("lowest", [-0.5, -30.0])
def test_a_false_claim_is_found_out(estimator, lowest: float) -> None:
    values = np.append(SPIKES, lowest)
    with pytest.raises(ValueError, match="positive semi-definite and has an eigenvalue near -"):
        estimator(claimed(values), torch.Generator().manual_seed(1))
    free = claimed(values)
    free.positive = False
    assert estimator(free, torch.Generator().manual_seed(1)).nodes.min() < 0.5 * lowest


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_rounding_is_measured_in_units_of_the_largest(size: float) -> None:
    operator = claimed(np.ones(100), dtype=torch.float32)
    eps = float(torch.finfo(torch.float32).eps)
    nodes = size * np.array([[-50 * eps, 0.5, 1.0]])
    assert clipped(nodes, operator, nodes).tolist() == [[0.0, size * 0.5, size]]
    tail = np.array([[-0.3 * size, 0.5 * size, size]])  # beyond the edge by the tail alone
    assert clipped(tail, operator, np.maximum(tail, 0.0)).min() == 0.0
    with pytest.raises(ValueError, match="positive"):
        clipped(nodes * np.array([[40.0, 1.0, 1.0]]), operator, nodes * np.array([[40.0, 1.0, 1.0]]))
