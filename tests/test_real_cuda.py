"""On a real GPU: what the pretended one cannot tell. Skipped where there is none."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import torch_rmt.operators.ladder as ladder
from torch_rmt.guard import undisturbed
from torch_rmt.operators import (
    Fisher,
    GaussNewton,
    Hessian,
    Jacobian,
    NeuralTangentKernel,
    dual_gram,
    input_to_layers,
    layer_blocks,
    layers_to_output,
)
from torch_rmt.spectra import KPM, SLQ, BlockSLQ, exact, top_eigenvalues, trace, xtrace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


def _setting(kind: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    if kind == "mlp":
        net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Dropout(0.2), nn.Linear(30, 5))
        return net, (torch.randn(64, 20), torch.randint(0, 5, (64,)))
    if kind == "convolutions":
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(288, 5)).eval()
        return net, (torch.randn(16, 3, 8, 8), torch.randint(0, 5, (16,)))
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(20, 80), nn.Unflatten(1, (5, 16)), layer, nn.Flatten(), nn.Linear(80, 5)), (
        torch.randn(32, 20),
        torch.randint(0, 5, (32,)),
    )


def _on(device: str, kind: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    net, (x, y) = _setting(kind)
    return net.eval().to(device), (x.to(device), y.to(device))


MATRICES: dict[str, Callable[[nn.Module, tuple[Tensor, Tensor]], Any]] = {
    "hessian": lambda net, batch: Hessian(net, F.cross_entropy, batch),
    "gauss newton": lambda net, batch: GaussNewton(net, F.cross_entropy, batch),
    "empirical": lambda net, batch: Fisher(net, F.cross_entropy, batch, kind="empirical"),
    "tangent kernel": lambda net, batch: NeuralTangentKernel(net, batch[0]),
    "jacobian": lambda net, batch: Jacobian(net, batch[0][:1]),
}


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("kind", ["mlp", "convolutions", "attention"])
@pytest.mark.parametrize("name", MATRICES)
def test_products_are_those_of_the_cpu(name: str, kind: str, precision: str) -> None:
    """Also where the training run allows TF32: its 10 bits would be off by 1e-3."""
    images = []
    try:
        torch.set_float32_matmul_precision(precision)
        for device in ("cpu", "cuda"):
            operator = MATRICES[name](*_on(device, kind))
            V = torch.randn(operator.shape[1], 3, generator=torch.Generator().manual_seed(1))
            images.append(operator.matmat(V.to(device)).cpu())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert float((images[0] - images[1]).norm()) < 1e-4 * float(images[0].norm())


ESTIMATES: dict[str, Callable[[Any, torch.Generator], Any]] = {
    "slq": lambda A, g: SLQ(4, 12)(A, g).moment(2)[0],
    "block slq": lambda A, g: BlockSLQ(4, 12)(A, g).moment(2)[0],
    "kpm": lambda A, g: KPM(4, 12)(A, g).moment(2)[0],
    "trace": lambda A, g: trace(A, g, matvecs=30).value,
    "xtrace": lambda A, g: xtrace(A, g, matvecs=30).value,
    "top": lambda A, g: top_eigenvalues(A, 3, g, tolerance=1e-4).values,
    "exact": lambda A, g: exact(A).eigenvalues[-5:],
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_one_seed_means_one_figure_on_every_device(name: str) -> None:
    found = [
        ESTIMATES[name](Hessian(net, F.cross_entropy, batch), torch.Generator().manual_seed(0))
        for net, batch in (_on("cpu", "mlp"), _on("cuda", "mlp"))
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-2)
    net, batch = _on("cuda", "mlp")
    own = [
        ESTIMATES[name](Hessian(net, F.cross_entropy, batch), torch.Generator("cuda").manual_seed(0)) for _ in range(2)
    ]
    np.testing.assert_array_equal(*own)


@pytest.mark.parametrize("kind", ["hessian", "gauss newton", "empirical"])
def test_no_product_and_no_step_waits_for_the_device(kind: str) -> None:
    """By torch's own detector: synchronising calls raise."""
    operator = MATRICES[kind](*_on("cuda", "attention"))
    V = torch.randn(operator.shape[1], 20, device="cuda")
    operator.matmat(V)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for width in (1, 20):
            operator.matmat(V[:, :width])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_duals_blocks_and_sweeps() -> None:
    net, batch = _on("cuda", "mlp")
    fisher = Fisher(net, F.cross_entropy, batch)
    gram = dual_gram(fisher, by_layer=True)
    whole = fisher.matmat(torch.eye(fisher.shape[0], device="cuda")).trace()
    assert float(gram.eigenvalues().sum()) == pytest.approx(float(whole), rel=1e-3)
    H = Hessian(net, F.cross_entropy, batch)
    for block in layer_blocks(H).values():
        assert block.matmat(torch.ones(block.shape[0], 1, device="cuda")).device.type == "cuda"
    plain, plain_batch = _on("cpu", "mlp")
    for sweep in (input_to_layers, layers_to_output):
        expected, found = sweep(plain, plain_batch[0]), sweep(net, batch[0])
        for layer, jacobian in expected.items():
            torch.testing.assert_close(found[layer].cpu(), jacobian, rtol=1e-4, atol=1e-5)


def test_a_tape_plays_what_the_graph_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tapes are taken on the CPU alone; here is whether they would be right, and how fast."""
    net, batch = _on("cuda", "attention")
    images, seconds = [], []
    for busy in (False, True):
        monkeypatch.setattr(ladder, "_busy", lambda f, busy=busy: busy)
        ladder._proved.clear()
        H = Hessian(net, F.cross_entropy, batch)
        v = torch.ones(H.shape[0], 1, device="cuda")
        images.append(H.matmat(v))
        assert ("tape" in H.engine) == busy
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            H.matmat(v)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    ladder._proved.clear()
    print(f"20 products: graph {seconds[0]:.4f} s, tape {seconds[1]:.4f} s")
    torch.testing.assert_close(images[1], images[0], rtol=1e-3, atol=1e-4 * float(images[0].abs().max()))


def test_the_random_state_of_the_device_is_put_back() -> None:
    torch.cuda.manual_seed_all(3)
    before = torch.cuda.get_rng_state_all()
    with undisturbed(nn.Linear(2, 2)):
        torch.rand(5, device="cuda")
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    assert all(torch.equal(a, b) for a, b in zip(before, torch.cuda.get_rng_state_all(), strict=True))


def test_training_with_measurements_in_between_is_bit_identical() -> None:
    def train(measured: bool) -> list[Tensor]:
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)).cuda()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(5):
            x, y = torch.randn(32, 8, device="cuda"), torch.randint(0, 3, (32,), device="cuda")
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = F.cross_entropy(net(x), y)
                if measured:
                    SLQ(2, 6)(Hessian(net, F.cross_entropy, (x, y)), torch.Generator("cuda").manual_seed(0))
            loss.backward()
            optimizer.step()
        return [*(t.clone() for t in net.state_dict().values()), torch.cuda.get_rng_state(), torch.get_rng_state()]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))


def test_out_of_memory_falls_back() -> None:
    net, (x, y) = _on("cuda", "mlp")
    big = x.repeat(4000, 1), y.repeat(4000)
    expected = Hessian(copy.deepcopy(net), F.cross_entropy, (x, y))
    v = torch.ones(expected.shape[0], 1, device="cuda")
    held = torch.cuda.memory_allocated()
    total = torch.cuda.mem_get_info()[1]
    operator = Hessian(net, F.cross_entropy, big)
    torch.cuda.set_per_process_memory_fraction((held + 5 * operator.footprint().largest) / total)
    try:
        image = operator.matmat(v)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("out of memory" in note for note in operator.notes)
    torch.testing.assert_close(image, expected.matmat(v), rtol=1e-3, atol=1e-4)
