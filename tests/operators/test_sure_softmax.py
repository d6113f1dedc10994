"""The curvature of cross-entropy where the network is sure of its class: exact to rounding, in float32 too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from torch_rmt.operators.losses import Loss, output_curvature


def truth(output: Tensor, u: Tensor, dim: int) -> Tensor:
    """p_i sum_j p_j (u_i - u_j), whose terms cannot cancel but by their own signs; in float64."""
    logits, v = output.double().movedim(dim, -1), u.double().movedim(dim, -1)
    p = logits.softmax(-1)
    return (p * (p.unsqueeze(-2) * (v.unsqueeze(-1) - v.unsqueeze(-2))).sum(-1)).movedim(-1, dim)


@pytest.mark.parametrize("scale", [1.0, 15.0, 60.0])
@pytest.mark.parametrize(("shape", "dim"), [((5, 7), 1), ((2, 6, 4), 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_products_and_roots_keep_their_digits(seed: int, shape: tuple[int, ...], dim: int, scale: float) -> None:
    torch.manual_seed(seed)
    output, u = torch.randn(shape) * scale, torch.randn(shape)
    target = torch.randint(0, shape[dim], [n for i, n in enumerate(shape) if i != dim])
    with torch.enable_grad():
        found = output_curvature(lambda o, t: functional.cross_entropy(o, t, reduction="sum"), output, target)
    assert found.form == "softmax"
    wanted = truth(output, u, dim)
    size = wanted.abs().amax(dim, keepdim=True)
    error = (found.product(u[None])[0].double() - wanted).abs() / size
    assert float(error[size.expand_as(error) > 1e-30].max()) < 3e-6
    assert found.root is not None
    eye = torch.eye(output.numel()).reshape(-1, *shape)
    roots = found.root(eye).double().flatten(1)  # row k is Z e_k
    wanted_dense = torch.stack([truth(output, e, dim).flatten() for e in eye])
    diagonal = wanted_dense.diagonal().clamp_min(1e-30)
    scaled = (roots.T @ roots - wanted_dense).abs() / (diagonal[:, None] * diagonal).sqrt()
    assert float(scaled[diagonal > 1e-20][:, diagonal > 1e-20].max()) < 1e-5


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target.argmax(1))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e6])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("loss", "form", "known"),
    [
        (_cross_entropy, "softmax", True),
        (functional.binary_cross_entropy_with_logits, "elementwise", True),
        (functional.mse_loss, "elementwise", True),
        (functional.smooth_l1_loss, "elementwise", False),
    ],
)
def test_a_likelihood_is_known_however_sure_the_network_is(
    loss: Loss, form: str, known: bool, seed: int, scale: float
) -> None:
    """At 1e6 no curvature is left: what the loss is shows elsewhere. The mean of |z|^2 is the trace."""
    torch.manual_seed(seed)
    output, target = torch.randn(6, 5) * scale, torch.rand(6, 5).round()
    with torch.enable_grad():
        found = output_curvature(loss, output, target)
    assert found.form == form
    assert (found.draw is not None) is known
    if found.draw is not None:
        squares = torch.stack([found.draw(torch.Generator().manual_seed(i)).square().sum() for i in range(2000)])
        trace = found.product(torch.eye(30).reshape(30, 6, 5)).flatten(1).trace()
        assert float((squares.mean() - trace).abs()) <= 5 * float(squares.std()) / 2000**0.5 + 1e-6  # of rarer labels
