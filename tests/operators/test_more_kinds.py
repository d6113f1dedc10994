"""Every operator on more module kinds against plain autograd in float64; nothing is disturbed, nothing warned of."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.operators.more_kinds import MORE_KINDS
from torch_rmt.operators import (
    Fisher,
    GaussNewton,
    Hessian,
    Jacobian,
    NeuralTangentKernel,
    dense,
    dual_gram,
    input_to_layers,
    layer_blocks,
    layers_to_output,
)
from torch_rmt.operators.pure import MASK_SEED, _LogicalOrder

STEP = 1e-5
DIFFERENCES = {"embedding_bag_sum_with_weights", "function_once_differentiable"}  # no other engine can
# Autograd holds something constant by design (a padding row, a detached factor), which differences of it do not.
DETACHED = {"embedding_with_padding", "views_in_place"}
COUPLED = {  # samples do not stand alone: statistics, masks, lengths, a stride over the whole batch
    "causal_attention_with_dropout", "batch_norm_of_one_image", "batch_norm_without_statistics", "packed_gru",
    "checkpointed_with_dropout", "views_in_place", "stochastic_depth", "encoder_norm_first_train",
    "gru_two_layers_dropout",
}  # fmt: skip
REFUSED_SWEEP = {"batch_norm_without_statistics"}
OUTSIDE = {"bilinear", "conv_transpose_1d_and_3d", "tied_across_transposes"}  # the output is that of no module


def _call(model: nn.Module, inputs: Any) -> Tensor:
    """One plain forward pass, eager and with the mask that the operators see."""
    inner = getattr(model, "_orig_mod", model)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    state = torch.get_rng_state()
    torch.manual_seed(MASK_SEED)
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math, torch.compiler.set_stance("force_eager"), _LogicalOrder():
        copies = {name: b.clone() for name, b in inner.named_buffers()}
        output = torch.func.functional_call(inner, copies, tuple(a.clone() for a in args))
    torch.set_rng_state(state)
    return output


def _rows(value: Tensor, params: list[Tensor]) -> Tensor:
    pieces = torch.autograd.grad(value, params, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in pieces])


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm()) / max(float(b.norm()), 1e-12)


def _slopes(model: nn.Module, case: tuple[Any, Any, Any], params: list[Tensor], V: Tensor) -> Tensor:
    """Hessian times the columns of V, by central differences of plain gradients."""
    inputs, targets, loss = case
    before = [p.detach().clone() for p in params]
    columns = []
    for v in V.T:
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, old, step in zip(params, before, v.split([p.numel() for p in params]), strict=True):
                    p.copy_(old + sign * STEP * step.reshape(p.shape))
            ends.append(_rows(loss(_call(model, inputs), targets), params).detach())
        columns.append((ends[0] - ends[1]) / (2 * STEP))
    with torch.no_grad():
        for p, old in zip(params, before, strict=True):
            p.copy_(old)
    return torch.stack(columns, dim=1)


def _check(kind: str, model: nn.Module, inputs: Any, targets: Any, loss: Any) -> None:
    params = [p for p in model.parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = _call(model, inputs)
        J = torch.stack([_rows(t, params) for t in output.flatten()])
        inner = torch.func.hessian(lambda f: loss(f, targets))(output.detach()).reshape(output.numel(), -1)
        V = torch.randn(J.shape[1], 3, dtype=J.dtype, generator=torch.Generator().manual_seed(1))
        slopes = _slopes(model, (inputs, targets, loss), params, V)
    exact, batch = (1e-8 if kind in DIFFERENCES else 1e-11), (inputs, targets)

    H = dense(Hessian(model, loss, batch))
    assert _gap(H, H.T) < exact
    assert kind in DETACHED or _gap(H @ V, slopes) < 1e-6
    G = GaussNewton(model, loss, batch)
    assert _gap(dense(G), J.T @ inner @ J) < exact
    assert _gap(dense(Fisher(model, loss, batch)), J.T @ inner @ J) < exact
    assert _gap(dense(NeuralTangentKernel(model, inputs)), J @ J.T) < exact
    values = torch.linalg.eigvalsh(J.T @ inner @ J).clamp_min(0)
    assert _gap(dual_gram(G).eigenvalues(), values) < 100 * exact
    start = 0
    for block in layer_blocks(G, {name: name for name in G.pure.names}).values():
        here = slice(start, start + block.shape[0])
        assert float((dense(block) - (J.T @ inner @ J)[here, here]).norm()) < 10 * exact * float(values.norm())
        start += block.shape[0]
    if kind not in COUPLED:
        expected = torch.zeros_like(H)
        for i in range(targets.shape[0]):
            one = tuple(t[i : i + 1] for t in inputs) if isinstance(inputs, tuple) else inputs[i : i + 1]
            g = _rows(loss(_call(model, one), targets[i : i + 1]), params)
            expected += torch.outer(g, g) / targets.shape[0]
        assert _gap(dense(Fisher(model, loss, batch, kind="empirical")), expected) < exact
    first = inputs[0] if isinstance(inputs, tuple) else inputs
    if first.is_floating_point():
        _check_jacobians(kind, model, inputs, first, exact)


def _check_jacobians(kind: str, model: nn.Module, inputs: Any, first: Tensor, exact: float) -> None:
    leaf = first.clone().requires_grad_()
    output = _call(model, (leaf, *inputs[1:]) if isinstance(inputs, tuple) else leaf)
    expected = torch.stack([_rows(t, [leaf])[: leaf[0].numel()] for t in output[0].flatten()])
    exact = max(exact, 1e-7 if kind == "function_once_differentiable" else 0.0)
    assert _gap(dense(Jacobian(model, inputs, sample=0)), expected) < exact
    if kind in REFUSED_SWEEP:
        with pytest.raises(ValueError, match="depend on one another"):
            input_to_layers(model, inputs)
        return
    sweep, back = input_to_layers(model, inputs), layers_to_output(model, inputs)
    assert sweep.keys() == back.keys()
    if kind not in OUTSIDE:
        assert _gap(next(reversed(sweep.values()))[0], expected) < exact


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_every_operator_on(kind: str) -> None:
    torch.manual_seed(sum(map(ord, kind)))
    model, inputs, targets, loss = MORE_KINDS[kind]()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    tensors = {k: (t, t.clone()) for k, t in (*model.named_parameters(), *model.named_buffers())}
    gradients = [(p, p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    modes = [(m.training, list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    data = [(t, t.clone()) for t in (inputs if isinstance(inputs, tuple) else (inputs,))]
    random_state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's own, of a rule that it lacks, among them
        warnings.filterwarnings("ignore", message=".*oneDNN.*")  # of the user's own layer
        _check(kind, model, inputs, targets, loss)
    assert torch.equal(random_state, torch.get_rng_state())
    assert modes == [(m.training, list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    assert all(p.grad is g and torch.equal(g, before) for p, g, before in gradients)
    assert all(torch.equal(t, before) for t, before in (*tensors.values(), *data))


def test_a_missing_batching_rule_is_said_by_the_engine_and_not_warned_of() -> None:
    torch.manual_seed(0)
    rnn = nn.LSTM(2, 3, batch_first=True)
    net = nn.Sequential(rnn, _Last(), nn.Linear(3, 2))  # float32: the kernel of oneDNN, which has no rule for vmap
    batch = torch.randn(4, 3, 2), torch.randn(4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cls in (Hessian, GaussNewton):
            for _ in range(2):  # found, then remembered
                A = cls(net, nn.functional.mse_loss, batch)
                A.matmat(torch.ones(A.shape[1], 3))
    if torch.backends.mkldnn.is_available():
        assert "runs vector by vector" in Hessian(net, nn.functional.mse_loss, batch).engine


class _Last(nn.Module):
    def forward(self, output: tuple[Tensor, Any]) -> Tensor:
        return output[0][:, -1]
