"""Half precision, scales near the ends of float32, dimensions one and two, blocks wider than the rank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.spectra.prescribed import generator, symmetric_matrix
from torch_rmt.operators import LinearOperator
from torch_rmt.spectra import (
    KPM,
    SLQ,
    BlockSLQ,
    DenseOperator,
    exact,
    hutch_plus_plus,
    hutchinson,
    spectrum_within,
    top_eigenvalues,
    trace,
    xtrace,
)

#: name -> a number of the dimension of the operator and its error, None where there is none
QUANTITIES: dict[str, Callable[[LinearOperator], tuple[float, float | None]]] = {
    "slq": lambda A: SLQ(3, 12)(A, generator(0)).moment(1),
    "slq deflated": lambda A: SLQ(2, 8, deflate=3)(A, generator(0)).moment(1),
    "block slq": lambda A: BlockSLQ(3, 6)(A, generator(0)).moment(1),
    "within": lambda A: spectrum_within(A, generator(0), matvecs=20).moment(1),
    "kpm": lambda A: KPM(2, 10)(A, generator(0)).moment(1),
    "exact": lambda A: exact(A).moment(1),
    "hutchinson": lambda A: _pair(hutchinson(A, generator(0), probes=6)),
    "trace": lambda A: _pair(trace(A, generator(0), matvecs=18)),
    "hutch++": lambda A: _pair(hutch_plus_plus(A, generator(0), matvecs=18)),
    "xtrace": lambda A: _pair(xtrace(A, generator(0), matvecs=18)),
    "top": lambda A: (float(top_eigenvalues(A, 2, generator(0), end="largest").values[0]), None),
}


def _pair(estimate: object) -> tuple[float, float]:
    return estimate.value, estimate.standard_error  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("exponent", [-100, 100])
def test_estimates_scale_with_the_operator(name: str, exponent: int) -> None:
    """By a power of two, which rounds nothing, to 1e-30 and 1e30 in float32."""
    matrix = symmetric_matrix(np.append(np.linspace(-1, 1, 70), 4.0), 0).float()
    value, error = QUANTITIES[name](DenseOperator(matrix, symmetric=True))
    scaled, scaled_error = QUANTITIES[name](DenseOperator(matrix * 2.0**exponent, symmetric=True))
    assert scaled / 2.0**exponent == pytest.approx(value, rel=1e-3, abs=1e-5)
    if error is not None and scaled_error is not None:
        assert scaled_error / 2.0**exponent == pytest.approx(error, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("exponent", [-450, -660])
def test_small_numbers_in_float64_are_scaled_or_refused_with_the_remedy(name: str, exponent: int) -> None:
    """1e-135, and 1e-199, whose squares are zero: an error of zero would claim that an estimate is exact."""
    matrix = symmetric_matrix(np.append(np.linspace(-1, 1, 70), 4.0), 0)
    value, error = QUANTITIES[name](DenseOperator(matrix, symmetric=True))
    small = DenseOperator(matrix * 2.0**exponent, symmetric=True)
    if exponent == -660 and name in ("hutchinson", "trace", "hutch++", "xtrace"):
        with pytest.raises(ValueError, match=r"2.0\*\*500 \* operator"):
            QUANTITIES[name](small)
        small, exponent = 2.0**500 * small, exponent + 500
    scaled, scaled_error = QUANTITIES[name](small)
    assert scaled / 2.0**exponent == pytest.approx(value, rel=1e-6, abs=1e-9)
    if error is not None and scaled_error is not None:
        assert scaled_error / 2.0**exponent == pytest.approx(error, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs_the_rounding_of_its_products_and_no_more(name: str, dtype: torch.dtype) -> None:
    matrix = symmetric_matrix(np.append(np.linspace(-1, 1, 70), 4.0), 0).to(dtype)
    half, single = (DenseOperator(m, symmetric=True) for m in (matrix, matrix.float()))
    value, reference = (QUANTITIES[name](operator)[0] for operator in (half, single))
    assert value == pytest.approx(reference, abs=8 * torch.finfo(dtype).eps * max(abs(reference), 4.0))
    assert any(str(dtype)[6:] in note for note in SLQ(2, 5)(half, generator(0)).notes)


@pytest.mark.parametrize("values", [[2.0], [-3.0], [0.0], [1.0, 1.0], [2.0, -3.0]], ids=str)
def test_dimensions_one_and_two(values: list[float]) -> None:
    operator = DenseOperator(symmetric_matrix(np.array(values), 0).float(), symmetric=True)
    for name, quantity in QUANTITIES.items():
        if name == "top" and len(values) == 1:
            continue
        value, error = quantity(operator)
        truth = max(values) if name == "top" else np.sum(values) if name in ("hutchinson", "trace") else np.mean(values)
        truth = np.sum(values) if name in ("hutch++", "xtrace") else truth
        assert abs(value - truth) <= 8 * (error or 0.0) + 1e-5, name
    with pytest.raises(ValueError, match="cannot find 3"):
        top_eigenvalues(operator, 3, generator(0))
    with pytest.raises(ValueError, match="blocks of 3"):
        top_eigenvalues(operator, 1, generator(0), block=3)


def test_a_rank_below_the_number_of_probes() -> None:
    factor = torch.randn(300, 2, generator=generator(0), dtype=torch.float64)
    operator = DenseOperator(factor @ factor.T, symmetric=True)
    spectrum = BlockSLQ(probes=5, depth=6)(operator, generator(0))
    assert spectrum.known == 2
    assert spectrum.moment(1)[0] == pytest.approx(float(factor.square().sum()) / 300, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in QUANTITIES if name != "exact"])
def test_products_whose_squares_overflow_are_refused(name: str) -> None:
    operator = DenseOperator(1e200 * symmetric_matrix(np.linspace(-1, 1, 70), 0), symmetric=True)
    with pytest.raises(ValueError, match="not finite"):
        QUANTITIES[name](operator)
