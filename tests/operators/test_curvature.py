"""Fisher, batches, blocks, closures, duals, and what is refused."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.operators.module_kinds import MODULE_KINDS
from torch_rmt.operators import (
    ClosureHessian,
    Combination,
    EngineError,
    Fisher,
    GaussNewton,
    GradientCovariance,
    Hessian,
    NeuralTangentKernel,
    Scaled,
    adam_scale,
    conjugate_kernel,
    dense,
    dual_gram,
    layer_blocks,
)

ROUGH = {"embedding_bag", "checkpointed_reentrant"}  # central differences only
NO_MODULE_GRAMS = {"batchnorm_train"}
pytestmark = pytest.mark.filterwarnings("ignore")


def _net(seed: int = 0, outputs: int = 3) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double(), torch.randn(
        8, 4, dtype=torch.float64
    )


LIKELIHOODS = {
    "cross-entropy": (F.cross_entropy, lambda n: torch.randint(0, 3, (n,))),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), lambda n: torch.randint(0, 3, (n,))),
    "a lambda": (lambda o, t: F.cross_entropy(o, t), lambda n: torch.randint(0, 3, (n,))),
    "squares": (F.mse_loss, lambda n: torch.randn(n, 3, dtype=torch.float64)),
    "sum of squares": (nn.MSELoss(reduction="sum"), lambda n: torch.randn(n, 3, dtype=torch.float64)),
    "binary": (F.binary_cross_entropy_with_logits, lambda n: torch.randint(0, 2, (n, 3)).double()),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_fisher_converges_to_the_exact_one(name: str) -> None:
    net, x = _net()
    loss, draw = LIKELIHOODS[name]
    y = draw(8)
    exact = dense(Fisher(net, loss, (x, y)))
    torch.testing.assert_close(exact, dense(GaussNewton(net, loss, (x, y))))
    gaps = [
        float((dense(Fisher(net, loss, (x, y), kind="sampled", draws=d, seed=1)) - exact).norm() / exact.norm())
        for d in (50, 5000)
    ]
    assert gaps[1] < 0.06
    assert 4 < gaps[0] / gaps[1] < 25  # falls as 1/sqrt(draws): by 10


@pytest.mark.parametrize("seed", [1, 2])
def test_labels_are_drawn_from_the_seed_and_anew_for_every_batch(seed: int) -> None:
    net, x = _net()
    y = torch.randint(0, 3, (8,))

    def sampled(batches: Any, seed: int) -> Tensor:
        operator = Fisher(net, F.cross_entropy, batches, kind="sampled", seed=seed)
        assert operator.positive
        return dense(operator)

    one = sampled((x, y), seed)
    assert torch.equal(one, sampled((x, y), seed))
    assert float((one - sampled((x, y), seed + 1)).norm()) > 0.05 * float(one.norm())
    twice = sampled([(x, y), (x, y)], seed)  # two labels a sample: the mean of two independent draws
    assert float((one - twice).norm()) > 0.05 * float(one.norm())


@pytest.mark.parametrize("loss", [F.huber_loss, F.l1_loss, lambda o, t: (o - t).pow(4).mean()])
def test_exact_fisher_of_no_likelihood_is_refused(loss: Any) -> None:
    net, x = _net()
    with pytest.raises(TypeError, match="use GaussNewton"):
        Fisher(net, loss, (x, 3 * torch.randn(8, 3, dtype=torch.float64)))


def test_gradient_covariance_is_fisher_less_the_mean() -> None:
    net, x = _net()
    y = torch.randint(0, 3, (8,))
    rows = []
    for i in range(8):
        net.zero_grad()
        F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    net.zero_grad()
    G = torch.stack(rows)
    C = dense(GradientCovariance(net, F.cross_entropy, (x, y)))
    torch.testing.assert_close(C, torch.cov(G.T, correction=0))


@pytest.mark.parametrize("cls", [Hessian, GaussNewton, Fisher, GradientCovariance])
@pytest.mark.parametrize("cut", [(8,), (4, 4), (5, 3), (1, 2, 5)])
def test_uneven_batches_average_to_one_batch(cls: Any, cut: tuple[int, ...]) -> None:
    net, x = _net()
    for loss, y in (
        (F.cross_entropy, torch.tensor([0, 1, -100, 2, -100, 1, 0, 2])),
        (F.mse_loss, torch.randn(8, 3, dtype=torch.float64)),
    ):
        pieces = [p for p in zip(x.split(cut), y.split(cut), strict=True)]
        if loss is F.cross_entropy and cls in (Fisher, GradientCovariance) and len(cut) > 1:
            continue  # per-sample gradients would need a batch's loss to weigh every sample alike
        whole, parts = dense(cls(net, loss, (x, y))), dense(cls(net, loss, pieces))
        torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)
        recomputed = cls(net, loss, pieces, max_memory=0)
        assert any("do not fit" in note for note in recomputed.notes)
        torch.testing.assert_close(dense(recomputed), whole, rtol=1e-10, atol=1e-12)


def test_a_loader_is_read_once_and_in_any_order() -> None:
    net, x = _net()
    y = torch.randint(0, 3, (8,))
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
    torch.testing.assert_close(
        dense(Hessian(net, F.cross_entropy, loader)), dense(Hessian(net, F.cross_entropy, (x, y)))
    )
    torch.testing.assert_close(  # one batch as a loader yields it
        dense(Hessian(net, F.cross_entropy, [x, y])), dense(Hessian(net, F.cross_entropy, (x, y)))
    )


def test_selected_parameters_are_a_block_of_the_whole() -> None:
    net, x = _net()
    y = torch.randint(0, 3, (8,))
    H = dense(Hessian(net, F.cross_entropy, (x, y)))
    for params in ("2", "2.*", ["2.bias", "2.weight"]):
        torch.testing.assert_close(dense(Hessian(net, F.cross_entropy, (x, y), params)), H[25:, 25:])


@pytest.mark.parametrize("kind", MODULE_KINDS)
@pytest.mark.parametrize("cls", [Hessian, GaussNewton])
def test_blocks_from_one_graph_are_the_blocks_of_the_whole(cls: Any, kind: str) -> None:
    torch.manual_seed(5)
    model, inputs, targets, loss = MODULE_KINDS[kind]()
    A = cls(model, loss, (inputs, targets))
    D, start = dense(A), 0
    for block in layer_blocks(A, {name: name for name in A.pure.names}).values():
        assert type(block).__name__ == ("_Restricted" if kind in ROUGH else "_Block")
        stop = start + block.shape[0]
        assert float((dense(block) - D[start:stop, start:stop]).norm()) <= 1e-11 * float(D.norm())
        start = stop
    assert start == A.shape[0]


def test_blocks_of_many_batches_and_by_glob() -> None:
    net, x = _net()
    y = torch.randint(0, 3, (8,))
    pieces = list(zip(x.split((5, 3)), y.split((5, 3)), strict=True))
    for cls in (Hessian, GaussNewton, Fisher):
        D = dense(cls(net, F.cross_entropy, (x, y)))
        blocks = layer_blocks(cls(net, F.cross_entropy, pieces), {"biases": "*.bias", "first": ["0.weight"]})
        assert {type(block).__name__ for block in blocks.values()} == {"_Block"}
        biases = [*range(20, 25), *range(40, 43)]
        torch.testing.assert_close(dense(blocks["biases"]), D[biases][:, biases])
        torch.testing.assert_close(dense(blocks["first"]), D[:20, :20])


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_dual_has_all_eigenvalues(kind: str) -> None:
    torch.manual_seed(6)
    model, inputs, targets, loss = MODULE_KINDS[kind]()
    for A in (
        GaussNewton(model, loss, (inputs, targets)),
        Fisher(model, loss, (inputs, targets), kind="empirical"),
        NeuralTangentKernel(model, inputs),
    ):
        gram = dual_gram(A, by_layer=True)
        # A wrong contraction would be found out and replaced by products: that must not happen here.
        expected = "products with every column" if kind in NO_MODULE_GRAMS else "Gram matrices of the modules"
        assert gram.method.startswith(expected)
        values = torch.linalg.eigvalsh(dense(A))
        torch.testing.assert_close(gram.eigenvalues(), values.clamp_min(0), rtol=1e-7, atol=1e-9 * float(values[-1]))
        if gram.layers:
            torch.testing.assert_close(torch.stack(list(gram.layers.values())).sum(0), gram.matrix)


def test_dual_of_a_loss_without_closed_form_and_of_few_parameters() -> None:
    """A loss that mixes outputs has a root by eigenvectors alone; five parameters have five eigenvalues."""
    net, x = _net()
    y, mix = torch.randn(8, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    for params in (None, "0.bias"):
        A = GaussNewton(net, lambda o, t: ((o - t) @ mix).square().mean(), (x, y), params)
        gram = dual_gram(A)
        assert (A.output_form, gram.method) == ("general", "Gram matrices of the modules") or A.output_form == ""
        values = torch.linalg.eigvalsh(dense(A))
        assert A.output_form == "general"
        torch.testing.assert_close(gram.eigenvalues(), values.clamp_min(0), rtol=1e-8, atol=1e-11)
    kernel = dense(NeuralTangentKernel(net, x, "0.bias"))
    torch.testing.assert_close(dual_gram(NeuralTangentKernel(net, x, "0.bias")).matrix, kernel)


@pytest.mark.parametrize("kind", ["checkpointed", "batchnorm_train"])
def test_dual_of_a_covariance_where_hooks_or_samples_refuse(kind: str) -> None:
    model, inputs, targets, loss = MODULE_KINDS[kind]()
    A = GradientCovariance(model, loss, (inputs, targets))
    values = torch.linalg.eigvalsh(dense(A)).clamp_min(0)
    torch.testing.assert_close(dual_gram(A).eigenvalues(), values, rtol=1e-7, atol=1e-9 * float(values[-1]))


def test_dual_by_layer_has_the_spectra_of_the_diagonal_blocks() -> None:
    torch.manual_seed(7)
    model, inputs, targets, loss = MODULE_KINDS["cnn_depthwise_strided"]()
    A = GaussNewton(model, loss, (inputs, targets))
    spectra = dual_gram(A, by_layer=True).layer_eigenvalues()
    for name, block in layer_blocks(A).items():
        values = torch.linalg.eigvalsh(dense(block)).flip(0)
        k = min(len(values), len(spectra[name]))
        torch.testing.assert_close(spectra[name].flip(0)[:k], values[:k], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(("size", "channels"), [(9, 1), (4, 6)])
def test_both_contractions_of_a_shared_weight(size: int, channels: int) -> None:
    """Few positions take the pairs, many take the explicit slabs; both are the Gram matrix."""
    torch.manual_seed(8)
    net = nn.Sequential(nn.Conv2d(channels, 2, 3), nn.Flatten(), nn.LazyLinear(2)).double()
    x = torch.randn(3, channels, size, size, dtype=torch.float64)
    net(x)
    A = GaussNewton(net, F.mse_loss, (x, torch.randn(3, 2, dtype=torch.float64)), "0")
    gram = dual_gram(A)
    assert gram.method == "Gram matrices of the modules"
    values = torch.linalg.eigvalsh(dense(A))
    torch.testing.assert_close(gram.eigenvalues(), values.clamp_min(0), rtol=1e-8, atol=1e-11)


def test_closure_and_adam() -> None:
    net, x = _net()
    y = torch.randint(0, 3, (8,))
    H = Hessian(net, F.cross_entropy, (x, y))
    closure = ClosureHessian(lambda: F.cross_entropy(net(x), y), list(net.parameters()))
    torch.testing.assert_close(dense(closure), dense(H))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-3)
    with pytest.raises(ValueError, match="take one step first"):
        adam_scale(optimizer, net, H.pure.names)
    before = [p.detach().clone() for p in net.parameters()]
    F.cross_entropy(net(x), y).backward()
    gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
    optimizer.step()
    scale = adam_scale(optimizer, net, H.pure.names)
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, net.parameters(), strict=True)])
    torch.testing.assert_close(1e-2 * scale**2 * gradient, moved)  # the step is lr D^2 m_hat
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.zero_grad()
    F.cross_entropy(net(2 * x), y).backward()
    optimizer.step()
    scale = adam_scale(optimizer, net, H.pure.names)
    assert not scale.requires_grad
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, net.parameters(), strict=True)])
    first = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in net.parameters()]) / (1 - 0.9**2)
    torch.testing.assert_close(1e-2 * scale**2 * first, moved)
    D = torch.diag(scale)
    torch.testing.assert_close(dense(Scaled(H, scale)), D @ dense(H) @ D)


class _HoldsGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.detach() * ctx.saved_tensors[0].cos()


def test_a_closure_whose_hessian_is_not_symmetric_is_refused() -> None:
    for dtype in (torch.float32, torch.float64):
        a, b = (torch.linspace(0.1, 1.0, 4, dtype=dtype, requires_grad=True) for _ in range(2))
        with torch.no_grad(), torch.inference_mode():
            assert ClosureHessian(lambda a=a, b=b: ((a * b).sin() * b).sum(), [a, b]).shape == (8, 8)
        with pytest.raises(EngineError, match="not symmetric"):
            ClosureHessian(lambda a=a, b=b: (_HoldsGradients.apply(a * b) * b).sum(), [a, b])


def test_one_batch_that_is_not_convex_makes_the_whole_not_positive() -> None:
    net, x = _net()
    up = torch.ones(4, 3, dtype=torch.float64)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (target * output.square()).mean()  # curved as the target's sign says

    for first, second in ((up, -2 * up), (-2 * up, up), (up, 2 * up)):
        G = GaussNewton(net, loss, [(x[:4], first), (x[4:], second)])
        values = torch.linalg.eigvalsh(dense(G))
        assert G.positive == bool(values[0] > -1e-12 * values[-1].abs())


def test_h0_and_h1_are_parts_of_h() -> None:
    net, x = _net()
    y = torch.randn(8, 3, dtype=torch.float64)
    H, H0 = Hessian(net, F.mse_loss, (x, y)), GaussNewton(net, F.mse_loss, (x, y))
    H1 = Combination((H, H0), (1.0, -1.0))
    assert H1.symmetric
    torch.testing.assert_close(dense(H1) + dense(H0), dense(H))
    with torch.no_grad():  # at zero residual the second part vanishes
        perfect = net(x)
    H1 = Combination((Hessian(net, F.mse_loss, (x, perfect)), GaussNewton(net, F.mse_loss, (x, perfect))), (1.0, -1.0))
    assert float(dense(H1).abs().max()) < 1e-14


def test_conjugate_kernel_of_a_hidden_layer() -> None:
    net, x = _net()
    features = net[:2](x)
    torch.testing.assert_close(conjugate_kernel(net, x, "1"), (features @ features.T / 5).detach())


def test_a_tangent_kernel_multiplies_fewer_vectors_at_a_time_within_a_limit_alone() -> None:
    net, x = _net()
    kernel = NeuralTangentKernel(net, x)
    expected, width = dense(kernel), kernel.chunk
    limit = kernel.footprint().product(width, 3)
    with kernel.within(limit):
        assert 1 <= kernel.chunk <= 3
        torch.testing.assert_close(dense(kernel), expected)
    assert kernel.chunk == width
    with kernel.within(None):
        assert kernel.chunk == width


def test_half_precision_is_measured_in_float32_and_said() -> None:
    net, x = _net()
    y = torch.randint(0, 3, (8,))
    half = copy.deepcopy(net).to(torch.bfloat16)
    H = Hessian(half, F.cross_entropy, (x.to(torch.bfloat16), y))
    assert H.dtype == torch.float32
    assert any("float32" in note for note in H.notes)
    reference = Hessian(copy.deepcopy(half).float(), F.cross_entropy, (x.to(torch.bfloat16).float(), y))
    torch.testing.assert_close(dense(H), dense(reference))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            dense(Hessian(net, F.cross_entropy, (x, y))), dense(Hessian(net, F.cross_entropy, (x, y)))
        )


def test_the_matrix_is_that_of_the_moment_it_was_made() -> None:
    net, x = _net()
    y = torch.randint(0, 3, (8,))
    H = Hessian(net, F.cross_entropy, (x, y))
    reference = dense(Hessian(net, F.cross_entropy, (x, y)))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    torch.testing.assert_close(dense(H), reference)


class _Returns(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x)}


def _bad() -> dict[str, tuple[Any, type[Exception], str]]:
    net, x = _net()
    y = torch.randint(0, 3, (8,))
    frozen = copy.deepcopy(net).requires_grad_(False)
    ce = F.cross_entropy
    return {
        "nan": (lambda: Hessian(net, ce, (x * math.nan, y)), ValueError, "loss is nan"),
        "empty": (lambda: Hessian(net, ce, (x[:0], y[:0])), ValueError, "batch is empty"),
        "no batch": (lambda: Hessian(net, ce, []), ValueError, "no batch"),
        "ignored": (lambda: Hessian(net, ce, (x, torch.full((8,), -100))), ValueError, "ignored"),
        "no pair": (lambda: Hessian(net, ce, x), TypeError, "pass .inputs, targets."),
        "vector loss": (
            lambda: Hessian(net, nn.CrossEntropyLoss(reduction="none"), (x, y)),
            TypeError,
            "mean",
        ),
        "dict": (lambda: Hessian(_Returns(net), ce, (x, y)), TypeError, r"your_loss\(output\['logits'\], target\)"),
        "dict, first order": (lambda: GaussNewton(_Returns(net), ce, (x, y)), TypeError, "wrap the model"),
        "name": (lambda: Hessian(net, ce, (x, y), "2.wieght"), ValueError, "nearest: '2.weight'"),
        "frozen": (lambda: Hessian(frozen, ce, (x, y)), ValueError, "requires_grad_"),
        "no module": (lambda: Hessian(lambda t: t, ce, (x, y)), TypeError, "nn.Module"),
        "no loss": (lambda: Hessian(net, "mse", (x, y)), TypeError, "callable"),
        "kind": (lambda: Fisher(net, ce, (x, y), kind="true"), ValueError, "'exact', 'sampled'"),
        "large dual": (
            lambda: dual_gram(GaussNewton(net, ce, (x, y)), max_memory=1000),
            ValueError,
            "24 samples x columns.*SLQ",
        ),
        "two batches": (lambda: dual_gram(GaussNewton(net, ce, [(x, y), (x, y)])), ValueError, "concatenate"),
    }


@pytest.mark.parametrize("case", _bad())
def test_bad_input_says_what_to_do(case: str) -> None:
    make, error, message = _bad()[case]
    with pytest.raises((error, TypeError) if case in ("kind", "no loss", "no module") else error) as caught:
        make()
    if "beartype" not in type(caught.value).__module__ and "TypeCheckError" not in type(caught.value).__name__:
        assert re.search(message, str(caught.value)), str(caught.value)
