"""Gram matrices of per-sample gradients, module by module: what plain autograd gives sample by sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torch_rmt.operators.contractions import SLAB, module_gram

COLUMNS, SAMPLES = 2, 3


def _real(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(SAMPLES, *shape, dtype=torch.float64)


def _tokens(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 4, (SAMPLES, *shape))


# Each with sizes that differ wherever an axis, a stride or a padding could be taken for another.
KNOWN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(3, 4), _real(3)),
    "linear at many positions": (lambda: nn.Linear(3, 4), _real(2, 5, 3)),
    "wide linear at two positions": (lambda: nn.Linear(40, 30), _real(2, 40)),
    "linear without bias": (lambda: nn.Linear(3, 4, bias=False), _real(3)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=1, groups=2), _real(4, 11)),
    "conv2d": (lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 1)), _real(2, 7, 6)),
    "conv2d in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), _real(4, 5, 6)),
    "embedding": (lambda: nn.Embedding(4, 5), _tokens(6)),
    "embedding with padding": (lambda: nn.Embedding(4, 5, padding_idx=1), _tokens(6)),
    "layer norm": (lambda: nn.LayerNorm(5, eps=0.3), _real(4, 5)),
    "layer norm over two axes": (lambda: nn.LayerNorm((4, 5), eps=0.3), _real(2, 4, 5)),
    "rms norm": (lambda: nn.RMSNorm((4, 5), eps=0.3), _real(2, 4, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 6, eps=0.3), _real(6, 4)),
    "batch norm": (lambda: nn.BatchNorm2d(3, eps=0.3).eval(), _real(3, 4, 2)),
}


def _by_autograd(module: nn.Module, calls: list[tuple[Tensor, Tensor]], names: set[str]) -> Tensor:
    rows = []
    chosen = [p for name, p in module.named_parameters() if name in names]
    for n in range(SAMPLES):
        for c in range(COLUMNS):
            value = sum((module(x[n : n + 1]) * g[c, n : n + 1]).sum() for x, g in calls)
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, chosen)]))
    A = torch.stack(rows)
    return A @ A.T


@pytest.mark.parametrize("work", [SLAB, 1])
@pytest.mark.parametrize("kind", KNOWN)
def test_gram_of_a_module_is_that_of_its_gradients_sample_by_sample(kind: str, work: int) -> None:
    torch.manual_seed(0)
    make, draw = KNOWN[kind]
    module = make().double()
    if isinstance(module, nn.BatchNorm2d):
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2.0)
    for times in (1, 2) if not isinstance(module, nn.Embedding) else (1,):
        inputs = [draw() for _ in range(times)]
        gradients = [torch.randn(COLUMNS, *module(x).shape, dtype=torch.float64) for x in inputs]
        own = {name for name, _ in module.named_parameters()}
        for names in (own, *({name} for name in own)):
            found = module_gram(module, inputs, gradients, names, work)
            assert found is not None
            expected = _by_autograd(module, list(zip(inputs, gradients, strict=True)), names)
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_what_a_contraction_would_get_wrong_is_left_to_products() -> None:
    """Norms over the batch, other paddings, weights used twice by an embedding or without a call, other parameters."""
    x, tokens = torch.randn(SAMPLES, 2, 6, 6), torch.randint(0, 4, (SAMPLES, 6))
    for module, inputs in (
        (nn.BatchNorm2d(2), x),
        (nn.BatchNorm2d(2, track_running_stats=False).eval(), x),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), x),
        (nn.Conv2d(2, 3, 3, padding="same"), x),
        (nn.Embedding(4, 5, max_norm=1.0), tokens),
        (nn.Embedding(4, 5, scale_grad_by_freq=True), tokens),
        (nn.Bilinear(6, 6, 2), x),
    ):
        with torch.no_grad():
            out = module(inputs, inputs) if isinstance(module, nn.Bilinear) else module(inputs)
        assert module_gram(module, [inputs], [torch.zeros(COLUMNS, *out.shape)], {"weight"}) is None
    twice = [tokens, tokens], [torch.zeros(COLUMNS, SAMPLES, 6, 5)] * 2
    assert module_gram(nn.Embedding(4, 5), *twice, {"weight"}) is None
    linear = nn.Linear(6, 6)
    assert module_gram(linear, [x, x], [torch.zeros(COLUMNS, *x.shape)], {"weight"}) is None
    assert module_gram(linear, [x], [torch.zeros(COLUMNS, *x.shape)], {"weight", "scale"}) is None
