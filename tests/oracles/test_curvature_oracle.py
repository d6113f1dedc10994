"""BackPACK and nngeometry compute the same matrices, on the models that each supports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_rmt.operators import (
    Fisher,
    GaussNewton,
    GradientCovariance,
    Hessian,
    NeuralTangentKernel,
    dense,
    dual_gram,
)

Model = Callable[[], tuple[nn.Module, Tensor]]


def _mlp() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 3))
    return net.double(), torch.randn(6, 4, dtype=torch.float64)


def _cnn() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    return net.double(), torch.randn(5, 2, 6, 6, dtype=torch.float64)


MODELS: dict[str, Model] = {"mlp": _mlp, "cnn": _cnn}


def _setting(name: str, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    model, x = MODELS[name]()
    return model, x, torch.randint(0, 3, (len(x),))


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    assert float((a - b).norm()) < tolerance * float(b.norm())


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_backpack_has_the_same_diagonals_and_per_sample_gradients(name: str, seed: int) -> None:
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    model, x, y = _setting(name, seed)
    loss = nn.CrossEntropyLoss()
    ours = {
        "diag_ggn_exact": GaussNewton(model, loss, (x, y)),
        "diag_h": Hessian(model, loss, (x, y)),
    }
    covariance = GradientCovariance(model, loss, (x, y))
    fisher = Fisher(model, loss, (x, y), kind="empirical")
    ours_dense = {key: dense(op) for key, op in ours.items()}
    F, C = dense(fisher), dense(covariance)
    theirs_model, theirs_loss = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extensions.DiagGGNExact(), extensions.DiagHessian(), extensions.BatchGrad()):
        theirs_loss(theirs_model(x), y).backward()
    for key, matrix in ours_dense.items():
        theirs = torch.cat([getattr(p, key).flatten() for p in model.parameters()])
        _close(matrix.diagonal(), theirs)
    # BackPACK's per-sample gradients are already divided by the number of samples.
    rows = len(x) * torch.cat([p.grad_batch.flatten(1) for p in model.parameters()], dim=1)
    _close(F, rows.T @ rows / len(x))
    _close(C, torch.cov(rows.T, correction=0))


@pytest.mark.parametrize("name", MODELS)
def test_backpack_has_the_same_products(name: str) -> None:
    products = pytest.importorskip("backpack.hessianfree.hvp")
    ggn = pytest.importorskip("backpack.hessianfree.ggnvp")
    model, x, y = _setting(name, 2)
    loss = nn.CrossEntropyLoss()
    H, G = Hessian(model, loss, (x, y)), GaussNewton(model, loss, (x, y))
    v = torch.randn(H.shape[0], 1, dtype=torch.float64)
    params = list(model.parameters())
    pieces = [t[0] for t in H.pure.split(v.T)]
    value, output = loss(model(x), y), model(x)
    theirs = products.hessian_vector_product(value, params, pieces)
    _close(H.matmat(v)[:, 0], torch.cat([t.flatten() for t in theirs]))
    theirs = ggn.ggn_vector_product_from_plist(loss(output, y), output, params, pieces)
    _close(G.matmat(v)[:, 0], torch.cat([t.flatten() for t in theirs]))


@pytest.fixture
def _float64() -> Iterator[None]:
    """For nngeometry, which makes a matrix of the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _loader(x: Tensor, y: Tensor) -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x))


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_nngeometry_has_the_same_fisher_and_tangent_kernel(name: str, seed: int) -> None:
    metrics = pytest.importorskip("nngeometry.metrics")
    spaces = pytest.importorskip("nngeometry.object")
    gram = pytest.importorskip("nngeometry.gram")
    model, x, y = _setting(name, seed)
    fisher = metrics.FIM(model=model, loader=_loader(x, y), representation=spaces.PMatDense, variant="classif_logits")
    ours = dense(Fisher(model, nn.CrossEntropyLoss(), (x, y)))
    _close(ours, fisher.to_torch())
    kernel = gram.GramMatrix(model, _loader(x, y), function=lambda *d: model(d[0])).to_torch()
    theirs = kernel.permute(1, 0, 3, 2).reshape(dense(NeuralTangentKernel(model, x)).shape)
    _close(dense(NeuralTangentKernel(model, x)), theirs)
    _close(dual_gram(NeuralTangentKernel(model, x)).matrix, theirs)
