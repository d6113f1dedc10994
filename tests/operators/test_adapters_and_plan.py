"""SciPy both ways; plans that keep to their limits; the ladder's refusals."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from scipy.sparse.linalg import aslinearoperator, eigsh, svds
from torch import Tensor, nn

from tests.operators.module_kinds import Calls
from torch_rmt import operators
from torch_rmt.operators import (
    Combination,
    Dense,
    EngineError,
    GaussNewton,
    Hessian,
    Jacobian,
    Scaled,
    cost,
    dense,
    from_curvlinops,
    from_scipy,
    ladder,
    layer_blocks,
    plan,
    to_scipy,
)
from torch_rmt.operators.engines import Differentiable, Products, double_vjp, stacked


def _hessian(samples: int = 16) -> Hessian:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(samples, 6, dtype=torch.float64)
    return Hessian(net, F.cross_entropy, (x, torch.randint(0, 3, (samples,))))


def test_scipy_finds_our_extremes() -> None:
    H = _hessian()
    values = torch.linalg.eigvalsh(dense(H))
    np.testing.assert_allclose(eigsh(to_scipy(H), k=3, which="LA")[0], values[-3:].numpy(), rtol=1e-8)
    torch.manual_seed(1)
    J = Jacobian(nn.Sequential(nn.Linear(6, 8), nn.Tanh()).double(), torch.randn(1, 6, dtype=torch.float64))
    singular = torch.linalg.svdvals(dense(J)).numpy()
    np.testing.assert_allclose(np.sort(svds(to_scipy(J), k=2)[1])[::-1], singular[:2], rtol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scipy_operators_come_in_and_go_out_again(dtype: Any) -> None:
    matrix = np.random.default_rng(0).standard_normal((5, 3)).astype(dtype)
    A = from_scipy(aslinearoperator(matrix), symmetric=False)
    assert (A.shape, A.symmetric) == ((5, 3), False)
    np.testing.assert_allclose(dense(A).numpy(), matrix)
    np.testing.assert_allclose(dense(A.adjoint()).numpy(), matrix.T)
    np.testing.assert_allclose(to_scipy(A) @ np.eye(3, dtype=dtype), matrix)
    np.testing.assert_allclose(to_scipy(A).T @ np.ones(5, dtype=dtype), matrix.T @ np.ones(5), rtol=1e-5)
    square = from_scipy(matrix.T @ matrix, symmetric=True)
    assert square.adjoint() is square
    with pytest.raises(ValueError, match="cannot be symmetric"):
        from_scipy(matrix, symmetric=True)
    with pytest.raises(TypeError, match="use from_scipy"):
        from_curvlinops(matrix)


def test_complex_and_half_precision_at_the_border() -> None:
    matrix = np.random.default_rng(0).standard_normal((4, 4))
    with pytest.raises(TypeError, match=r"Re A, -Im A"):
        from_scipy(matrix + 1j, symmetric=False)
    A = to_scipy(from_scipy(matrix, symmetric=False))
    v = np.random.default_rng(1).standard_normal((4, 2)) @ np.array([1.0, 2.0j])
    np.testing.assert_allclose(A @ v, matrix @ v)
    np.testing.assert_allclose(A.H @ v, matrix.T @ v)
    half = to_scipy(Dense(torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.bfloat16)), symmetric=True))
    assert half.dtype == np.float32
    np.testing.assert_allclose(eigsh(half, k=1)[0], [8.0], rtol=1e-2)


def test_arithmetic_refuses_what_does_not_fit() -> None:
    a, b = Dense(torch.eye(2), symmetric=True), Dense(torch.ones(2, 3))
    with pytest.raises(ValueError, match="unequal shapes"):
        Combination((a, b), (1.0, 1.0))
    with pytest.raises(ValueError, match="length 3"):
        Scaled(a, torch.ones(3))
    with pytest.raises(ValueError, match="declared symmetric"):
        Dense(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), symmetric=True)
    mixed = Combination((b, b), (2.0, -1.0))
    torch.testing.assert_close(dense(mixed.adjoint()), torch.ones(3, 2))


def test_a_plan_keeps_to_its_limits_and_says_what_it_gave_up() -> None:
    H = _hessian()
    each = cost(H)
    # forward 2 (6*8 + 8*3) a sample, backward the weights again and the hidden layer's input: 2 (72 + 24)
    assert each.flops == 1.5 * 16 * 2 * (72 + 72 + 24)
    free = plan(H, 40)
    assert (free.products, free.notes) == (40, ())
    vmapped = replace(H.footprint(), vmapped=True)
    limit = vmapped.product(4, 4) + 4 * H.shape[0] * 8
    tight = plan(H, 10**9, max_seconds=0.05, max_memory=limit)
    assert tight.seconds <= 0.05
    assert tight.block == 4
    assert len(tight.notes) == 2
    with pytest.raises(ValueError, match="recomputed"):
        plan(H, 1, max_memory=1)
    with pytest.raises(ValueError, match="use fewer samples"):
        plan(H, 1, max_seconds=0.0)


def test_kept_bytes_grow_with_the_batch() -> None:
    assert cost(_hessian(64)).bytes == 4 * cost(_hessian(16)).bytes


class WrongBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.cos().detach()  # the second derivative is lost


def test_a_wrong_second_derivative_is_not_trusted() -> None:
    """Both reverse engines lose the same symmetric term; only central differences see it."""
    torch.manual_seed(0)
    net = Calls(lambda m, x: m.b(WrongBackward.apply(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2)).double()
    right = Calls(lambda m, x: m.b(torch.sin(m.a(x))), a=net.a, b=net.b)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    H = Hessian(net, F.mse_loss, (x, y))
    reference = dense(Hessian(right, F.mse_loss, (x, y)))
    if "central differences" in H.engine.split("(")[0]:
        assert float((dense(H) - reference).norm()) < 1e-6 * float(reference.norm())
    else:
        pytest.fail(f"trusted {H.engine}")


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_blocks_of_a_wrong_second_derivative_are_not_trusted(order: str) -> None:
    """Only the block of `a` lies behind the function that is wrong, whichever comes first."""
    torch.manual_seed(0)
    net = Calls(lambda m, x: m.b(WrongBackward.apply(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2)).double()
    right = Calls(lambda m, x: m.b(torch.sin(m.a(x))), a=net.a, b=net.b)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    groups = {name: name for name in order}
    expected = layer_blocks(Hessian(right, F.mse_loss, (x, y)), groups)
    for name, block in layer_blocks(Hessian(net, F.mse_loss, (x, y)), groups).items():
        assert float((dense(block) - dense(expected[name])).norm()) < 1e-6 * float(dense(expected[name]).norm())


def test_an_asymmetric_hessian_is_not_trusted() -> None:
    """The fused weight_norm of torch 2.13 takes the norm for a constant, in both reverse engines."""
    torch.manual_seed(0)
    net = Calls(lambda m, x: torch.tanh(x @ torch._weight_norm(m.v.weight, m.v.bias[:, None], 0).T), v=nn.Linear(3, 4))
    net = net.double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    H = Hessian(net, F.mse_loss, (x, y))
    assert H.engine.startswith("central differences")
    D = dense(H)
    assert float((D - D.T).norm()) < 1e-6 * float(D.norm())


def test_a_model_that_is_another_at_every_call_is_refused() -> None:
    """Each engine alone is consistent with itself; no two agree."""
    calls = iter(range(1, 1000))
    net = Calls(lambda m, x: m.a(x) * next(calls) ** 0.5, a=nn.Linear(3, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    for operator in (Hessian(net, F.mse_loss, (x, y)), GaussNewton(net, F.mse_loss, (x, y))):
        with pytest.raises(EngineError, match="differ by"):
            dense(operator)


def test_a_curvature_that_is_not_finite_is_refused_as_such() -> None:
    net = nn.Linear(3, 2).double()
    with torch.no_grad():
        net.weight.zero_()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, 2, dtype=torch.float64)
    with pytest.raises(EngineError, match="the product is not finite"):
        dense(Hessian(net, lambda o, t: (o - t - net.bias.detach()).abs().pow(1.5).mean(), (x, y)))


def test_a_rough_function_is_refused_with_the_remedy() -> None:
    class Harsh(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(5, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((1e6 * self.bag(x)).relu().sqrt())

    torch.manual_seed(0)
    H = Hessian(Harsh(), lambda o, t: (o - t).abs().pow(0.5).mean(), (torch.randint(0, 5, (3, 2)), torch.zeros(3, 2)))
    with pytest.raises(EngineError, match=r"differ.*second derivative"):
        H.matmat(torch.ones(H.shape[0], 1))


def test_the_choice_is_remembered_and_readable() -> None:
    H = _hessian()
    assert H.engine.startswith("vjp of grad (agrees with double backward to")
    again = Hessian(H.pure.module, F.cross_entropy, (H.batches[0].inputs, H.batches[0].targets))
    assert again.engine == H.engine


def test_operators_add_and_multiply_as_matrices_do() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    A, B, v = Dense(a), Dense(b), torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(dense(2.0 * A - B * 0.5 + -A), a - 0.5 * b)
    torch.testing.assert_close(dense((A - B).adjoint()), (a - b).T)
    torch.testing.assert_close((A + B) @ v, (a + b) @ v)
    torch.testing.assert_close(A @ v[:, None], (a @ v)[:, None])
    assert (Dense(torch.eye(2), symmetric=True) * 2).positive is False  # nothing declared, nothing gained
    with pytest.raises(ValueError, match="does not multiply"):
        A @ torch.ones(4)
    with pytest.raises(TypeError):
        A + 1.0  # type: ignore[operator]
    with pytest.raises(TypeError):
        A * B  # type: ignore[operator]
    S, d = Dense(a[:3]), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(dense(Scaled(S, d).adjoint()), (torch.diag(d) @ a[:3] @ torch.diag(d)).T)


def test_sums_and_scalings_are_as_symmetric_and_as_positive_as_their_parts() -> None:
    class Positive(Dense):
        positive = True

    d = torch.ones(2)
    P, Q = (Positive(torch.eye(2), symmetric=True) for _ in range(2))
    S, A = Dense(torch.diag(torch.tensor([1.0, -1.0])), symmetric=True), Dense(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    for operator, positive in (
        (P + Q, True),
        (2 * P, True),
        (P - Q, False),
        (-P, False),
        (P + S, False),
        (S + P, False),
    ):
        assert (operator.symmetric, operator.positive) == (True, positive)
    assert not (P + A).symmetric
    assert not (A + P).symmetric
    for whole, symmetric, positive in ((P, True, True), (S, True, False), (A, False, False)):
        scaled = Scaled(whole, d)
        assert (scaled.symmetric, scaled.positive) == (symmetric, positive)


class Untrue(torch.autograd.Function):
    """A sine whose backward is twice what it should be, and loses the second derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2.0 * g * x.cos().detach()


class _WrongWhere(nn.Module):
    """Two branches; where `wrong(module, hidden)` says so the second has a wrong derivative."""

    def __init__(self, wrong: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.act, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 2)
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(x)
        return self.head(self.act(torch.sin(self.a(x)) + (Untrue.apply(h) if self.wrong(self, h) else h.sin())))


PARTLY_WRONG: dict[str, tuple[Any, tuple[dict[str, Any], dict[str, Any]]]] = {
    "mode": (lambda m, h: m.training, ({"mode": False}, {"mode": True})),
    "type": (lambda m, h: h.dtype == torch.float64, ({"dtype": torch.float32}, {"dtype": torch.float64})),
    "parameters": (lambda m, h: True, ({"params": "a"}, {"params": "b"})),
    "target": (lambda m, h: True, ({"target": "a"}, {"target": "act"})),
    "source": (lambda m, h: True, ({"source": "act"}, {"source": "b"})),
    "sample": (lambda m, h: len(h) > 1, ({"samples": 1}, {"samples": 3, "sample": 1})),
    "layers": (lambda m, h: True, ({"layers": ["a"]}, {"layers": ["act"]})),
}
MEASURED: dict[str, tuple[str, ...]] = {
    "Hessian": ("mode", "type", "parameters"),
    "GaussNewton": ("mode", "type", "parameters"),
    "NeuralTangentKernel": ("mode", "type", "parameters"),
    "Jacobian": ("mode", "type", "target", "source", "sample"),
    "input_to_layers": ("mode", "type", "layers"),
    "layers_to_output": ("mode", "type"),
}


def _trusts_reverse_mode(what: str, net: nn.Module, settings: dict[str, Any]) -> bool:
    given = {"mode": False, "dtype": torch.float64, "samples": 1 if what == "Jacobian" else 4} | settings
    net.train(given.pop("mode")).to(given["dtype"])
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(given["samples"], n, generator=generator).to(given["dtype"]) for n in (3, 2))
    del given["samples"], given["dtype"]
    batch = (F.mse_loss, (x, y)) if what in ("Hessian", "GaussNewton") else (x,)
    try:
        made = getattr(operators, what)(net, *batch, **given)
        return not (hasattr(made, "engine") and made.engine.startswith("central differences"))
    except EngineError:
        return False


@pytest.mark.parametrize(("what", "change"), [(w, c) for w, changes in MEASURED.items() for c in changes])
def test_what_was_proved_of_one_is_not_believed_of_another(what: str, change: str) -> None:
    """The same module, first where its derivatives are right and then where they are not."""
    wrong, (right_there, wrong_there) = PARTLY_WRONG[change]
    net = _WrongWhere(wrong)
    assert _trusts_reverse_mode(what, net, right_there)
    assert not _trusts_reverse_mode(what, net, wrong_there)


def test_what_was_proved_of_one_loss_is_not_believed_of_another() -> None:
    H = _hessian()
    x, y = H.batches[0].inputs, H.batches[0].targets
    right, wrong = (lambda o, t: F.cross_entropy(o.sin(), t)), (lambda o, t: F.cross_entropy(WrongBackward.apply(o), t))
    assert right.__qualname__ == wrong.__qualname__
    assert Hessian(H.pure.module, right, (x, y)).engine.startswith("vjp of grad")
    trusted = Hessian(H.pure.module, wrong, (x, y))
    assert trusted.engine.startswith("central differences")
    torch.testing.assert_close(dense(trusted), dense(Hessian(H.pure.module, right, (x, y))), rtol=1e-5, atol=1e-7)


def _large() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(200, 250), nn.Tanh(), nn.Linear(250, 4)).double()
    return net, (torch.randn(3, 200, dtype=torch.float64), torch.randint(0, 4, (3,)))


@pytest.mark.parametrize("fault", ["stale", "pull doubled"])
def test_a_tape_that_plays_something_else_is_not_used(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, batch = _large()
    V = torch.randn(sum(p.numel() for p in net.parameters()), 2, dtype=torch.float64)
    expected = GaussNewton(net, F.cross_entropy, batch, max_memory=0).matmat(V)

    def faulty(one: Any) -> Any:
        first: list[Any] = []

        def many(block: tuple[Tensor, ...]) -> Any:
            found = stacked(one)(block)
            first.append(found)
            if fault == "stale":
                return tuple(t[:1].expand(len(block[0]), *t.shape[1:]) for t in first[0])
            return tuple(2.0 * t for t in found) if len(block) == 1 else found

        return many

    monkeypatch.setattr(ladder, "taped", faulty)
    monkeypatch.setitem(ladder._BLOCKS, "tape", faulty)
    G = GaussNewton(net, F.cross_entropy, batch)
    torch.testing.assert_close(G.matmat(V), expected)
    assert "tape" not in G.engine


def test_blocks_at_once_that_give_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(one: Any) -> Any:
        return lambda block: tuple(t * len(block[0]) for t in stacked(one)(block))

    expected = dense(_hessian())
    monkeypatch.setattr(ladder, "batched", faulty)
    monkeypatch.setitem(ladder._BLOCKS, "vmap", faulty)
    torch.testing.assert_close(dense(_hessian()), expected)


def test_differences_have_no_say_on_a_kink_of_built_in_operations() -> None:
    """At zero a ReLU's slope is zero for autograd and one half for differences; the former is the convention."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    H = Hessian(net, F.mse_loss, (x, y))
    assert H.engine.startswith("vjp of grad")
    D = dense(H)
    assert float(D[:-2].abs().max()) == 0.0
    torch.testing.assert_close(D[-2:, -2:], torch.eye(2, dtype=torch.float64))


def test_two_images_differ_by_as_much_in_either_order() -> None:
    a, b = torch.zeros(3), torch.tensor([3.0, 0.0, 4.0])
    assert ladder._gap(a, b) == ladder._gap(b, a) == 1.0
    assert ladder._gap(b, 2 * b) == ladder._gap(2 * b, b) == 0.5
    assert ladder._gap(a, a) == 0.0


@pytest.mark.parametrize(
    ("name", "dtype", "error", "trusted"),
    [
        ("double backward", torch.float64, 1e-10, True),
        ("double backward", torch.float64, 1e-6, False),
        ("double backward", torch.float32, 1e-4, True),
        ("double backward", torch.float32, 1e-2, False),
        ("central differences", torch.float64, 1e-4, True),
        ("central differences", torch.float64, 1e-2, False),
        ("central differences", torch.float32, 1e-3, True),
        ("central differences", torch.float32, 1e-1, False),
    ],
)
def test_engines_must_agree_to_their_rounding(name: str, dtype: torch.dtype, error: float, trusted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    point, mix = (torch.randn(4, 4, generator=generator).to(dtype) for _ in range(2))
    f = Differentiable(lambda w: torch.tanh(w @ mix), (point,), nullcontext, lambda _, thunk: thunk())

    def off(f: Any, block: Any, push: float, pull: float) -> Products:
        right = double_vjp(f, block)
        return Products(
            lambda v: tuple(t * (1 + push) for t in right.push(v)),
            lambda u: tuple(t * (1 + pull) for t in right.pull(u)),
            right.value,
        )

    engines = (("double vjp", double_vjp), (name, lambda f, block: off(f, block, error, error)))
    if trusted:
        assert ladder.climb(f, engines, nn.Identity(), "agree")[1].engine == "double vjp"
    else:
        with pytest.raises(EngineError, match="differ by"):
            ladder.climb(f, engines, nn.Identity(), "disagree")
    if name == "double backward" and not trusted:
        alone = (("double vjp", lambda f, block: off(f, block, 0.0, 10 * error)),)
        with pytest.raises(EngineError, match="the adjoint identity fails"):
            ladder.climb(f, alone, nn.Identity(), "alone")
