"""Probes so long that they are made of random bytes: unit, independent, with the variances of the sphere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.spectra.prescribed import generator
from torch_rmt.operators import LinearOperator
from torch_rmt.spectra import hutchinson
from torch_rmt.spectra.probes import _LONG, sphere


class Diagonal(LinearOperator):
    """A diagonal matrix too large to be written out."""

    symmetric = True
    device = torch.device("cpu")

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.values), len(self.values)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        return self.values[:, None] * V

    def adjoint(self) -> LinearOperator:
        return self


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1])
def test_moments_of_the_entries_are_those_of_a_normal(dtype: torch.dtype, seed: int) -> None:
    dim, count = _LONG + 3, 5
    columns = sphere(dim, count, generator(seed), device=torch.device("cpu"), dtype=dtype)
    assert torch.equal(columns, sphere(dim, count, generator(seed), device=torch.device("cpu"), dtype=dtype))
    assert columns.dtype == dtype
    v = columns.double() * dim**0.5
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(v.square().mean(dim=0), torch.ones(count).double(), atol=rounding, rtol=0)
    error = 5 / (dim * count) ** 0.5  # five standard errors, for the moments below with their own spreads
    assert abs(float(v.mean())) < error
    assert abs(float((v**3).mean())) < error * 11.6**0.5
    assert abs(float((v**4).mean()) - 3.0) < error * 41**0.5
    gram = v.T @ v / dim**0.5
    assert float((gram - gram.diagonal().diag()).abs().max()) < 5
    assert float((v[1:] * v[:-1]).sum()) < 5 * (dim * count) ** 0.5


@pytest.mark.parametrize("spikes", [(300.0,), (200.0, -250.0, 300.0)], ids=len)
def test_standard_errors_hold_even_where_the_eigenvectors_are_axes(spikes: tuple[float, ...]) -> None:
    values = torch.linspace(-1, 1, _LONG)
    values[10 : 10 + len(spikes)] = torch.tensor(spikes)
    operator, truth = Diagonal(values), float(values.double().sum())
    found = [hutchinson(operator, generator(seed), probes=12) for seed in range(200)]
    z = np.array([(f.value - truth) / f.standard_error for f in found])
    assert 0.85 < np.sqrt(np.mean(z**2)) < 1.2
    assert abs(np.mean([f.value - truth for f in found])) < 4 * np.std([f.value for f in found]) / 200**0.5
