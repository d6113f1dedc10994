"""Operators on a (pretended) CUDA device: no tensor of another device meets, and no product waits for the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.pretended_device import DEVICE, OnDevice, on_device, pretended_device
from torch_rmt.operators import (
    ClosureHessian,
    Fisher,
    GaussNewton,
    GradientCovariance,
    Hessian,
    Jacobian,
    NeuralTangentKernel,
    Scaled,
    activation_slopes,
    adam_scale,
    conjugate_kernel,
    dual_gram,
    exact_routes,
    input_to_layers,
    layer_blocks,
    layers_to_output,
    partial_jacobian_norms,
    single_layers,
)
from torch_rmt.spectra import Gram


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.place, self.qkv, self.out = (
            nn.Embedding(7, 6),
            nn.Embedding(4, 6),
            nn.Linear(6, 18),
            nn.Linear(6, 7),
        )
        self.norm = nn.LayerNorm(6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        q, k, v = self.qkv(self.norm(x)).view(*tokens.shape, 3, 2, 3).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.out(x + y).transpose(1, 2)


def _mlp() -> tuple[nn.Module, Tensor, Tensor]:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))
    return net, torch.randn(8, 4), torch.randint(0, 3, (8,))


def _convolutions() -> tuple[nn.Module, Tensor, Tensor]:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    return net, torch.randn(5, 2, 4, 4), torch.randint(0, 3, (5,))


def _attention() -> tuple[nn.Module, Tensor, Tensor]:
    return _Attention(), torch.randint(0, 7, (3, 4)), torch.randint(0, 7, (3, 4))


MODELS = {"mlp": _mlp, "convolutions": _convolutions, "attention": _attention}
Make = Callable[[nn.Module, Tensor, Tensor], Any]
OPERATORS: dict[str, Make] = {
    "hessian": lambda m, x, y: Hessian(m, F.cross_entropy, (x, y)),
    "hessian, batches": lambda m, x, y: Hessian(m, F.cross_entropy, [(x[:2], y[:2]), (x, y)]),
    "gauss newton": lambda m, x, y: GaussNewton(m, F.cross_entropy, (x, y)),
    "gauss newton, squares": lambda m, x, y: GaussNewton(m, lambda out, _: out.square().mean(), (x, y)),
    "fisher": lambda m, x, y: Fisher(m, F.cross_entropy, (x, y)),
    "fisher, empirical": lambda m, x, y: Fisher(m, F.cross_entropy, (x, y), kind="empirical"),
    "covariance": lambda m, x, y: GradientCovariance(m, F.cross_entropy, (x, y)),
    "tangent kernel": lambda m, x, _: NeuralTangentKernel(m, x),
    "h0 and h1": lambda m, x, y: Hessian(m, F.cross_entropy, (x, y)) - GaussNewton(m, F.cross_entropy, (x, y)),
    "scaled": lambda m, x, y: _scaled(Hessian(m, F.cross_entropy, (x, y))),
    "restricted": lambda m, x, y: Hessian(m, F.cross_entropy, (x, y), params="*weight", max_memory=2**22),
}


def _scaled(H: Hessian) -> Scaled:
    return Scaled(H, torch.linspace(1, 2, H.shape[0], device=H.device))


def _vectors(operator: Any, where: str = "cpu") -> Tensor:
    return torch.randn(operator.shape[1], 3, generator=torch.Generator().manual_seed(1)).to(where)


def _seeded(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return MODELS[name]()


ELSEWHERE = ("hessian", "gauss newton", "fisher, empirical", "tangent kernel")  # the rest on the MLP alone


@pytest.mark.parametrize(
    ("name", "model"), [(name, model) for model in MODELS for name in (OPERATORS if model == "mlp" else ELSEWHERE)]
)
def test_products_stay_on_the_device_and_wait_for_nothing(name: str, model: str) -> None:
    net, x, y = _seeded(model)
    operator = OPERATORS[name](net, x, y)
    expected = operator.matmat(_vectors(operator))
    with pretended_device() as device:
        operator = OPERATORS[name](on_device(net), x.to("cuda"), y.to("cuda"))
        assert operator.device == DEVICE
        V = _vectors(operator, "cuda")
        found = operator.matmat(V)  # proves its engine
        assert device.waits > 0
        before = device.waits
        for width in (1, 3):
            operator.matmat(V[:, :width])
        assert device.waits == before
        assert found.device == DEVICE
        assert "central" not in str(getattr(operator, "engine", ""))
        found = found.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_pretended_device_refuses_and_counts() -> None:
    """Or the tests here could not fail."""
    with pretended_device() as device:
        here, there = torch.ones(3, device="cuda"), torch.ones(3)
        for meet in (lambda: here + there, lambda: torch.cat([here, there]), lambda: here @ there):
            with pytest.raises(RuntimeError, match="one device"):
                meet()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device="cuda", generator=torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            here.numpy()
        for count, read in enumerate((here.sum, here.tolist, here.cpu, lambda: here[here > 0], lambda: bool(here[0]))):
            read() if count else float(read())
            assert device.waits == count + 1
        assert (here * 2.0 + torch.tensor(1.0)).device == DEVICE  # a number may come from the host


@pytest.mark.parametrize("model", MODELS)
def test_blocks_duals_and_drawn_labels(model: str) -> None:
    net, x, y = _seeded(model)
    net.eval()
    with pretended_device() as device:
        on_device(net)
        x, y = x.to("cuda"), y.to("cuda")
        blocks = layer_blocks(Hessian(net, F.cross_entropy, (x, y)))
        vectors = {name: _vectors(block, "cuda") for name, block in blocks.items()}
        before = device.waits
        for name, block in blocks.items():
            assert block.matmat(vectors[name]).device == DEVICE
        assert device.waits == before
        for kind in ("exact", "sampled", "empirical") if model == "mlp" else ("sampled",):
            fisher = Fisher(net, F.cross_entropy, (x, y), kind=kind)
            gram = dual_gram(fisher, by_layer=True)
            trace = float((fisher.matmat(torch.eye(fisher.shape[0], device="cuda"))).trace())
            assert float(gram.eigenvalues().sum()) == pytest.approx(trace, rel=1e-3)
            assert len(gram.layer_eigenvalues()) == len(blocks)
        assert {route.name for route in exact_routes(fisher)} == {"dense", "dual"}


def test_restricted_blocks_wait_for_nothing() -> None:
    net, x, y = _seeded("mlp")
    with pretended_device() as device:
        operator = Hessian(on_device(net), F.cross_entropy, (x.to("cuda"), y.to("cuda")))
        operator.keep = False  # blocks then go by the whole operator
        block = layer_blocks(operator)["0"]
        V = _vectors(block, "cuda")
        block.matmat(V)
        before = device.waits
        block.matmat(V)
        assert device.waits == before


def test_jacobians_and_sweeps() -> None:
    net, x, _ = _seeded("mlp")
    names = ["0", "1", "3"]
    plain = input_to_layers(net, x, names)
    with pretended_device():
        on_device(net)
        x = x.to("cuda")
        found = input_to_layers(net, x, names)
        for name in names:
            torch.testing.assert_close(found[name].cpu(), plain[name])
        J = Jacobian(net, x[:1], source="0")
        assert (J.adjoint() @ (J @ torch.ones(6, device="cuda"))).device == DEVICE
        assert Gram(J).matmat(torch.ones(6, 1, device="cuda")).device == DEVICE
        for jacobian in layers_to_output(net, x, names).values():
            assert jacobian.device == DEVICE
        assert single_layers(net, x, names)["3"].device == DEVICE
        assert all(t.device == DEVICE for t in activation_slopes(net, x).values())
        assert conjugate_kernel(net, x, "0").device == DEVICE
        wide = torch.ones(4, 40).to("cuda")
        sketch = partial_jacobian_norms(nn.Sequential(nn.Tanh()), wide)
        exactly = partial_jacobian_norms(net, x)
        assert exactly.exact
        assert not sketch.exact
        own = partial_jacobian_norms(nn.Sequential(nn.Tanh()), wide, generator=torch.Generator(device="cuda"))
        assert own.values.device == DEVICE


def test_closures_and_preconditioners() -> None:
    with pretended_device() as device:
        net, x, y = _seeded("mlp")
        on_device(net)
        x, y = x.to("cuda"), y.to("cuda")
        optimizer = torch.optim.Adam(net.parameters(), foreach=False)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        H = Hessian(net, F.cross_entropy, (x, y))
        operator = Scaled(H, adam_scale(optimizer, net, H.pure.names))
        assert operator.matmat(_vectors(operator, "cuda")).device == DEVICE
        w = OnDevice(torch.randn(5)).requires_grad_()
        closure = ClosureHessian(lambda: w.tanh().square().sum(), [w])
        before = device.waits
        assert closure.matmat(torch.ones(5, 2, device="cuda")).device == DEVICE
        assert device.waits == before
