"""What once failed on real modules: attention alone, sparse gradients, probabilities as outputs, complex parameters."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from torch_rmt.operators import Fisher, GaussNewton, Hessian, NeuralTangentKernel, dense, dual_gram


class _Attention(nn.Module):
    """No module with parameters is called: attention reads the weights of its projection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0].mean(1)


def test_dual_of_attention_alone_goes_by_products() -> None:
    torch.manual_seed(0)
    kernel = NeuralTangentKernel(_Attention().double(), torch.randn(3, 2, 4, dtype=torch.float64))
    gram = dual_gram(kernel)
    assert "4 parameters by products" in gram.method
    torch.testing.assert_close(gram.matrix, dense(kernel))


def test_a_sparse_embedding_is_measured_as_a_dense_one_and_stays_sparse() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)).double()
    plain = copy.deepcopy(net)
    plain[0].sparse = False
    x, y = torch.randint(0, 5, (4, 2)), torch.randint(0, 2, (4,))
    torch.testing.assert_close(
        dense(Hessian(net, F.cross_entropy, (x, y))), dense(Hessian(plain, F.cross_entropy, (x, y)))
    )
    assert net[0].sparse is True


def test_a_loss_of_probabilities_has_curvature_and_no_exact_fisher() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.Sigmoid()).double()
    batch = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64).round()
    logits = GaussNewton(net[0], F.binary_cross_entropy_with_logits, batch)
    # One linear layer before a convex function of logits: both Hessians are the same, Gauss-Newton by the output not.
    hessian = dense(Hessian(net, F.binary_cross_entropy, batch))
    torch.testing.assert_close(hessian, dense(logits))
    assert (
        GaussNewton(net, F.binary_cross_entropy, batch).matmat(torch.ones(8, 1, dtype=torch.float64)).isfinite().all()
    )
    with pytest.raises(TypeError, match="use GaussNewton"):
        Fisher(net, F.binary_cross_entropy, batch)


def test_complex_parameters_are_refused_with_advice() -> None:
    net = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(TypeError, match="view_as_complex"):
        Hessian(net, lambda o, t: o.abs().sum(), (torch.randn(1, 2, dtype=torch.complex64), torch.zeros(1)))
