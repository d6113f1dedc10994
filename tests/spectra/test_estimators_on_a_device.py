"""Estimators on a (pretended) CUDA device: nothing meets of another device; waits do not grow with the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.pretended_device import DEVICE, Pretence, on_device, pretended_device
from torch_rmt.diagnose.measuring import measure
from torch_rmt.learning_rate import largest_eigenvalue
from torch_rmt.operators import GaussNewton, Hessian, Jacobian, LinearOperator
from torch_rmt.spectra import (
    KPM,
    SLQ,
    BlockSLQ,
    DenseOperator,
    affordable_spectrum,
    diagonal,
    exact,
    golub_kahan,
    hutch_plus_plus,
    hutchinson,
    lanczos,
    mixed_moment,
    spectrum_within,
    top_eigenvalues,
    trace,
    xtrace,
)
from torch_rmt.spectra.probes import sphere


def _generator(where: str = "cpu") -> torch.Generator:
    return torch.Generator(device=where).manual_seed(0)


def _network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    return net, torch.randn(20, 6), torch.randint(0, 3, (20,))


def _start(operator: LinearOperator) -> Tensor:
    return sphere(operator.shape[1], 2, _generator(), device=operator.device, dtype=operator.dtype)


Estimator = Callable[[LinearOperator, torch.Generator, int], object]
#: name -> call with so many steps
ESTIMATORS: dict[str, Estimator] = {
    "lanczos": lambda A, g, n: lanczos(A, _start(A), n, reorthogonalise="none").diagonal,
    "lanczos, selective": lambda A, g, n: lanczos(A, _start(A), n, reorthogonalise="selective").diagonal,
    "golub-kahan": lambda A, g, n: golub_kahan(A, _start(A), n, reorthogonalise=True).diagonal,
    "slq": lambda A, g, n: SLQ(2, n)(A, g).moment(2)[0],
    "slq, no basis": lambda A, g, n: SLQ(2, n, reorthogonalise="none")(A, g).moment(2)[0],
    "block slq": lambda A, g, n: BlockSLQ(2, n)(A, g).moment(2)[0],
    "kpm": lambda A, g, n: KPM(2, n)(A, g).moment(2)[0],
    "hutchinson": lambda A, g, n: hutchinson(A, g, probes=n).value,
    "hutch++": lambda A, g, n: hutch_plus_plus(A, g, matvecs=n).value,
    "xtrace": lambda A, g, n: xtrace(A, g, matvecs=n).value,
    "trace": lambda A, g, n: trace(A, g, matvecs=n).value,
    "diagonal": lambda A, g, n: diagonal(A, g, probes=n).values.cpu().numpy(),
    "mixed moment": lambda A, g, n: mixed_moment((A, A), g, probes=n).value,
    "within": lambda A, g, n: spectrum_within(A, g, matvecs=n).moment(2)[0],
}


@pytest.fixture(scope="module")
def device() -> Iterator[Pretence]:
    with pretended_device() as device:
        yield device


def _proved(H: Hessian) -> Hessian:
    H.matmat(torch.ones(H.shape[0], 2, device=H.device))
    return H


@pytest.fixture(scope="module")
def on_cpu() -> Hessian:
    net, x, y = _network()
    return _proved(Hessian(net, F.cross_entropy, (x, y)))


@pytest.fixture(scope="module")
def on_gpu(device: Pretence) -> Hessian:
    net, x, y = _network()
    return _proved(Hessian(on_device(net), F.cross_entropy, (x.to("cuda"), y.to("cuda"))))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_same_figures_as_on_the_cpu_and_waits_that_do_not_grow(
    name: str, on_cpu: Hessian, on_gpu: Hessian, device: Pretence
) -> None:
    """One seed of a CPU generator means the same probes on every device."""
    run, waits = ESTIMATORS[name], []
    for steps in (6, 14):
        before = device.waits
        found = run(on_gpu, _generator(), steps)
        waits.append(device.waits - before)
    assert waits[0] == waits[1] > 0
    np.testing.assert_allclose(found, run(on_cpu, _generator(), 14), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["slq", "block slq", "kpm", "trace", "diagonal"])
def test_a_generator_of_the_device_serves(name: str, on_gpu: Hessian, device: Pretence) -> None:
    """Millions of numbers a probe are then drawn where they are needed."""
    before = device.waits
    sphere(on_gpu.shape[1], 2, _generator("cuda"), device=on_gpu.device, dtype=on_gpu.dtype)
    assert device.waits == before
    assert ESTIMATORS[name](on_gpu, _generator("cuda"), 12) is not None


def test_extreme_eigenvalues_look_once_in_four_products(on_gpu: Hessian, device: Pretence) -> None:
    before = device.waits
    found = top_eigenvalues(on_gpu, 3, _generator("cuda"), tolerance=1e-4)
    assert found.converged
    assert found.vectors.device == DEVICE
    assert device.waits - before <= 6 * -(-found.matvecs // 4) + 12
    SLQ(2, 8, deflate=2)(on_gpu, _generator())


@pytest.mark.usefixtures("device")
def test_exact_and_affordable_spectra(on_gpu: Hessian) -> None:
    net, x, y = _network()
    plain = exact(GaussNewton(net, F.cross_entropy, (x, y))).eigenvalues
    on_device(net)
    batch = x.to("cuda"), y.to("cuda")
    found = exact(GaussNewton(net, F.cross_entropy, batch))
    np.testing.assert_allclose(found.eigenvalues, plain, atol=1e-5)
    assert "dual" in found.method
    assert affordable_spectrum(on_gpu, _generator(), products=40, max_memory=2**24).dim == on_gpu.shape[0]
    J = Jacobian(net, batch[0][:1])
    assert SLQ(2, 3)(J, _generator()).dim == exact(J).dim == 6
    dense = DenseOperator(torch.eye(5, device="cuda"), symmetric=True)
    assert exact(dense).eigenvalues.tolist() == [1.0] * 5


@pytest.mark.usefixtures("device")
def test_what_we_draw_ourselves_is_drawn_on_the_device(on_gpu: Hessian) -> None:
    """A probe of a hundred million numbers takes seconds on the CPU and some milliseconds there."""
    drawn: list[str] = []
    draw = torch.randn

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        drawn.append(torch.device(kwargs.get("device", "cpu")).type)
        return draw(*args, **kwargs)

    for run in (largest_eigenvalue, measure):
        drawn.clear()
        few = mock.patch.multiple("torch_rmt.diagnose.measuring", _DENSE=8, _DEPTH=4, _SAMPLES=1)  # or it is exact
        with mock.patch("torch.randn", noted), few:
            run(on_gpu)
        assert set(drawn) == {"cuda"}
