"""Measured in float32, whatever precision the training run multiplies in; and that is as before afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_rmt.guard import full_precision, undisturbed
from torch_rmt.operators import (
    Fisher,
    GaussNewton,
    Hessian,
    Jacobian,
    NeuralTangentKernel,
    conjugate_kernel,
    dual_gram,
    input_to_layers,
    layer_blocks,
    layers_to_output,
)
from torch_rmt.spectra import KPM, SLQ, BlockSLQ, DenseOperator, exact, top_eigenvalues, trace, xtrace

PLACES = [
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
]


def _state() -> list[Any]:
    def said(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except RuntimeError:
            return "no answer"

    legacy = (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: torch.backends.cuda.matmul.allow_tf32,
    )
    return [torch.backends.fp32_precision, *(p.fp32_precision for p in PLACES), *(said(read) for read in legacy)]


def _is_full() -> bool:
    return all(p.fp32_precision in ("ieee", "none") for p in PLACES)


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.fp32_precision = "none"
    for place, usual in zip(PLACES, ("none", "tf32", "tf32", "none", "none"), strict=True):
        place.fp32_precision = usual


def _set(owner: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(owner, name, value)


#: what a training script may have said
SETTINGS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": _set(torch.backends.cuda.matmul, "allow_tf32", True),
    "no tf32 in cudnn": _set(torch.backends.cudnn, "allow_tf32", False),
    "later flag, one": _set(torch.backends.cudnn.conv, "fp32_precision", "ieee"),  # the earlier one then raises
    "later flag, two": _set(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "later flag, all": _set(torch.backends, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_precision_is_full_inside_and_as_before_outside(setting: str) -> None:
    SETTINGS[setting]()
    before = _state()
    for guard in (full_precision, lambda: undisturbed(nn.Linear(2, 2))):
        with guard():
            assert _is_full()
        assert _state() == before
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert _state() == before


class Lowered(TorchDispatchMode):
    """Products of float32 matrices that were made in less."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func.overloadpacket).removeprefix("aten.") in ("mm", "addmm", "bmm", "baddbmm", "addmm_", "linalg_qr"):
            self.products += 1
            if not _is_full():
                self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _net() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    return net, (torch.randn(8, 4), torch.randint(0, 3, (8,)))


def _dense() -> DenseOperator:
    return DenseOperator(torch.diag(torch.linspace(-1, 1, 80)), symmetric=True)


def _product(operator: Any) -> None:
    operator.matmat(torch.ones(operator.shape[1], 3))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


MEASUREMENTS: dict[str, Callable[[], Any]] = {
    "hessian": lambda: _product(Hessian(_net()[0], F.cross_entropy, _net()[1])),
    "gauss newton": lambda: _product(GaussNewton(_net()[0], F.cross_entropy, _net()[1])),
    "fisher": lambda: _product(Fisher(_net()[0], F.cross_entropy, _net()[1], kind="empirical")),
    "tangent kernel": lambda: _product(NeuralTangentKernel(_net()[0], _net()[1][0])),
    "jacobian": lambda: _product(Jacobian(_net()[0], torch.ones(1, 4))),
    "blocks": lambda: [_product(b) for b in layer_blocks(Hessian(_net()[0], F.cross_entropy, _net()[1])).values()],
    "dual": lambda: dual_gram(GaussNewton(_net()[0], F.cross_entropy, _net()[1])).eigenvalues(),
    "sweeps": lambda: (input_to_layers(_net()[0], torch.ones(2, 4)), layers_to_output(_net()[0], torch.ones(2, 4))),
    "conjugate kernel": lambda: conjugate_kernel(_net()[0], _net()[1][0]),
    "slq": lambda: SLQ(2, 8)(_dense(), _generator()),
    "slq, deflated": lambda: SLQ(2, 8, deflate=2)(_dense(), _generator()),
    "slq, rectangular": lambda: SLQ(2, 8)(DenseOperator(torch.randn(90, 80)), _generator()),
    "block slq": lambda: BlockSLQ(2, 8)(_dense(), _generator()),
    "kpm": lambda: KPM(2, 8)(_dense(), _generator()),
    "top": lambda: top_eigenvalues(_dense(), 2, _generator()),
    "trace": lambda: trace(_dense(), _generator(), matvecs=12),
    "xtrace": lambda: xtrace(_dense(), _generator(), matvecs=12),
    "exact": lambda: exact(_dense()),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_no_product_of_a_measurement_is_lowered(name: str) -> None:
    torch.set_float32_matmul_precision("medium")
    with Lowered() as lowered:
        MEASUREMENTS[name]()
    assert not lowered.seen
    assert lowered.products
    assert torch.get_float32_matmul_precision() == "medium"


def _bites() -> bool:
    """Whether this processor multiplies in less than float32 if it may."""
    torch.set_float32_matmul_precision("medium")
    x = torch.randn(256, 256, generator=_generator())
    rough = x @ x
    torch.set_float32_matmul_precision("highest")
    return not torch.equal(rough, x @ x)


def test_a_hessian_product_is_right_to_rounding() -> None:
    if not _bites():
        pytest.skip("this processor multiplies in float32 whatever it is told")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
    x, y = torch.randn(128, 128), torch.randint(0, 10, (128,))
    v = torch.randn(sum(p.numel() for p in net.parameters()), 1)
    torch.set_float32_matmul_precision("medium")
    found = Hessian(net, F.cross_entropy, (x, y)).matmat(v)
    torch.set_float32_matmul_precision("highest")
    exactly = Hessian(net.double(), F.cross_entropy, (x.double(), y)).matmat(v.double())
    assert float((found - exactly).norm()) < 2e-5 * float(exactly.norm())  # 6e-3 where it is rough
