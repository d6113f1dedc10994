"""Nothing inside an iteration waits for the device: what is read from tensors does not grow with the steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.spectra.prescribed import generator, symmetric_operator
from torch_rmt.operators import Fisher, GaussNewton, Hessian, LinearOperator, NeuralTangentKernel
from torch_rmt.spectra import (
    KPM,
    SLQ,
    BlockSLQ,
    DenseOperator,
    block_lanczos,
    diagonal,
    golub_kahan,
    hutch_plus_plus,
    hutchinson,
    lanczos,
    mixed_moment,
    top_eigenvalues,
    trace,
    xtrace,
)
from torch_rmt.spectra.probes import sphere

#: Everything by which Python learns a number from a tensor, or moves it to the host.
READS = {
    "item", "tolist", "numpy", "cpu", "nonzero", "equal", "allclose", "is_nonzero", "unique", "masked_select",
    "__bool__", "__float__", "__int__", "__index__", "__contains__", "__array__", "to_list", "argwhere",
}  # fmt: skip


class Reads(TorchFunctionMode):
    """Counts calls that would wait for an accelerator."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = getattr(func, "__name__", "") == "__getitem__" and _by_mask(args[1])
        self.count += getattr(func, "__name__", "") in READS or masked
        return func(*args, **(kwargs or {}))


def _by_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


def _start(operator: LinearOperator, count: int = 2) -> Tensor:
    return sphere(operator.shape[1], count, generator(0), device=operator.device, dtype=operator.dtype)


#: name -> call with so many steps (products, probes)
STEPS: dict[str, Callable[[LinearOperator, int], object]] = {
    "lanczos, none": lambda A, n: lanczos(A, _start(A), n, reorthogonalise="none"),
    "lanczos, full": lambda A, n: lanczos(A, _start(A), n, reorthogonalise="full"),
    "lanczos, selective": lambda A, n: lanczos(A, _start(A), n, reorthogonalise="selective"),
    "block lanczos": lambda A, n: block_lanczos(A, _start(A), n),
    "golub-kahan": lambda A, n: golub_kahan(A, _start(A), n, reorthogonalise=False),
    "golub-kahan, full": lambda A, n: golub_kahan(A, _start(A), n, reorthogonalise=True),
    "slq": lambda A, n: SLQ(probes=2, depth=n)(A, generator(0)),
    "slq, none": lambda A, n: SLQ(probes=2, depth=n, reorthogonalise="none")(A, generator(0)),
    "block slq": lambda A, n: BlockSLQ(probes=2, depth=n)(A, generator(0)),
    "kpm": lambda A, n: KPM(probes=2, degree=n)(A, generator(0)),
    "hutchinson": lambda A, n: hutchinson(A, generator(0), probes=n),
    "hutch++": lambda A, n: hutch_plus_plus(A, generator(0), matvecs=n),
    "xtrace": lambda A, n: xtrace(A, generator(0), matvecs=n),
    "trace": lambda A, n: trace(A, generator(0), matvecs=n),
    "diagonal": lambda A, n: diagonal(A, generator(0), probes=n),
    "mixed moment": lambda A, n: mixed_moment((A, A), generator(0), probes=n),
}


@pytest.fixture
def _as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[lanczos.__module__], "_decides_at_once", lambda device: False)


def _counts(run: Callable[[int], object], steps: tuple[int, ...]) -> list[int]:
    counts = []
    for n in steps:
        with Reads() as reads:
            run(n)
        counts.append(reads.count)
    return counts


@pytest.mark.usefixtures("_as_on_an_accelerator")
@pytest.mark.parametrize("name", STEPS)
def test_reads_do_not_grow_with_the_steps(name: str) -> None:
    operator = symmetric_operator("flat", 0)
    few, many = _counts(lambda n: STEPS[name](operator, n), (8, 44))
    assert few == many
    assert 1 <= many < 20  # or the counter is blind


@pytest.mark.usefixtures("_as_on_an_accelerator")
def test_reads_of_a_rectangular_operator_do_not_grow() -> None:
    rectangular = DenseOperator(symmetric_operator("flat", 0).matrix[:, :70])
    few, many = _counts(lambda n: SLQ(probes=2, depth=n)(rectangular, generator(0)), (6, 40))
    assert few == many


def test_the_host_may_decide_where_it_has_the_numbers_at_once() -> None:
    """Selective on the CPU: its decisions are free there, and the pass over the basis is not."""
    operator = symmetric_operator("flat", 0)
    few, many = _counts(lambda n: lanczos(operator, _start(operator), n, reorthogonalise="selective"), (8, 44))
    assert many > few
    assert torch.ops.aten._local_scalar_dense.default not in _dispatched(
        lambda: lanczos(operator, _start(operator), 44, reorthogonalise="selective"), above=8
    )


def _dispatched(run: Callable[[], object], above: int) -> set[Any]:
    """Operations that were dispatched more than so many times."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: dict[Any, int] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls[func] = self.calls.get(func, 0) + 1
            return func(*args, **(kwargs or {}))

    with Log() as log:
        run()
    return {func for func, count in log.calls.items() if count > above}


def test_extreme_eigenvalues_look_once_in_four_products() -> None:
    """Whether to stop must be asked; between two looks the queue is not held up."""
    values = torch.cat([torch.linspace(0, 1, 396), torch.tensor([1.01, 1.02, 1.03, 1.04])]).double()
    operator = DenseOperator(torch.diag(values), symmetric=True)
    with Reads() as reads:
        found = top_eigenvalues(operator, 3, generator(0), tolerance=1e-8)
    assert found.matvecs > 40
    looks = -(-found.matvecs // 4)
    assert reads.count <= 6 * looks + 20


@pytest.mark.parametrize("kind", ["hessian", "gauss newton", "empirical", "tangent kernel"])
def test_products_with_a_model_read_nothing(kind: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    loss, batch = nn.functional.cross_entropy, (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    operator: LinearOperator = {
        "hessian": lambda: Hessian(net, loss, batch),
        "gauss newton": lambda: GaussNewton(net, loss, batch),
        "empirical": lambda: Fisher(net, loss, batch, kind="empirical"),
        "tangent kernel": lambda: NeuralTangentKernel(net, batch[0]),
    }[kind]()
    V = torch.randn(operator.shape[1], 20)
    operator.matmat(V)  # proves its engine
    for width in (1, 20):
        with Reads() as reads:
            operator.matmat(V[:, :width])
        assert reads.count == 0
