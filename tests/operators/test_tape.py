"""Tapes: what is played is what the graph gives, for every kind of module, whatever was recorded before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.operators.module_kinds import MODULE_KINDS
from torch_rmt.operators import GaussNewton, Hessian, layer_blocks
from torch_rmt.operators.tape import Program, TapeError, record
from torch_rmt.operators.tape_player import player
from torch_rmt.operators.tape_rules import simplified
from torch_rmt.operators.taped import taped

pytestmark = pytest.mark.filterwarnings("ignore")
NO_GRAPH = {"checkpointed", "checkpointed_reentrant", "embedding_bag"}  # no kept graph serves them


def _vectors(shapes: tuple[torch.Size, ...], seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


def _walks(kind: str) -> dict[str, tuple[Any, tuple[torch.Size, ...]]]:
    """Products with Hessian, Jacobian and its adjoint by plain autograd, and the shapes that they take."""
    torch.manual_seed(3)
    model, inputs, targets, loss = MODULE_KINDS[kind]()
    operator = Hessian(model, loss, (inputs, targets))
    pure, batch = operator.pure, operator.batches[0]
    leaves = tuple(p.clone().requires_grad_() for p in pure.params)
    with pure.guarded():
        output = pure(leaves, batch.inputs)
        slopes = torch.autograd.grad(loss(output, batch.targets), leaves, create_graph=True, materialize_grads=True)
        seed = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(output, leaves, seed, create_graph=True, materialize_grads=True)

    def pull(outputs: tuple[Tensor, ...], points: tuple[Tensor, ...]) -> Any:
        def product(vectors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            pairs = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
            heads, weights = zip(*pairs, strict=True)
            return torch.autograd.grad(heads, points, weights, retain_graph=True, materialize_grads=True)

        return product

    shapes = tuple(p.shape for p in leaves)
    products = {"push": (pull(pulled, (seed,)), shapes), "pull": (pull((output,), leaves), (output.shape,))}
    if any(s.requires_grad for s in slopes):
        products["Hessian"] = (pull(slopes, leaves), shapes)
    return products


def _close(found: tuple[Tensor, ...], true: tuple[Tensor, ...], share: float = 1e-12) -> None:
    size = max(float(t.norm()) for t in true)
    for a, b in zip(found, true, strict=True):
        assert a.shape == b.shape
        assert float((a - b).norm()) <= share * size


@pytest.mark.parametrize("kind", [k for k in MODULE_KINDS if k not in NO_GRAPH])
def test_a_tape_plays_what_the_graph_gives(kind: str) -> None:
    for product, shapes in _walks(kind).values():
        with torch.no_grad():
            program, walked = record(product, _vectors(shapes, 0))
            assert len(simplified(program).steps) <= len(program.steps)
            for play in (player(program), player(simplified(program))):
                _close(play(_vectors(shapes, 0)), walked)
                for seed in (1, 2):
                    vectors = _vectors(shapes, seed)
                    kept = tuple(v.clone() for v in vectors)
                    _close(play(vectors), product(vectors))
                    assert all(torch.equal(a, b) for a, b in zip(vectors, kept, strict=True))  # not written over
                    into = tuple(torch.full((2, *t.shape), torch.nan, dtype=t.dtype)[1] for t in walked)
                    assert all(a is b for a, b in zip(play(vectors, into), into, strict=True))
                    _close(into, product(vectors))


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_what_the_vector_does_not_enter_is_done_once() -> None:
    product, shapes = _walks("layernorm")["Hessian"]
    with torch.no_grad():
        play = player(simplified(record(product, _vectors(shapes, 0))[0]))
        with _Count() as walked:
            product(_vectors(shapes, 1))
        with _Count() as played:
            play(_vectors(shapes, 1))
    assert len(played.names) < 0.7 * len(walked.names)
    assert not {"aten::exp", "aten::pow"} & set(played.names)  # of activations and inputs alone


def _program(product: Any, *shapes: tuple[int, ...]) -> Program:
    return record(product, _vectors(tuple(torch.Size(s) for s in shapes), 0))[0]


def test_rules_on_their_own() -> None:
    a, b, c = _vectors(tuple(map(torch.Size, [(4, 4), (4, 4), (4, 4)])), 5)

    def names(product: Any) -> list[str]:
        program = simplified(_program(product, (4, 4)))
        vectors = _vectors((torch.Size((4, 4)),), 1)
        _close(player(program)(vectors), product(vectors))
        return [step.function._schema.name.removeprefix("aten::") for step in program.steps]

    assert names(lambda v: (v[0].t().t() @ a,)) == ["mm"]
    assert names(lambda v: ((v[0] * a) * b / 3.0,)) == ["mul"]
    assert names(lambda v: (v[0] @ a + v[0] @ b,)) == ["mm", "addmm_"]
    assert names(lambda v: (v[0] @ a + c.exp() * v[0],)) == ["mul", "addmm_"]
    assert names(lambda v: (v[0] * a - 2.0 * (v[0] @ b),)) == ["mul", "addmm_"]
    assert names(lambda v: ((v[0] * a).sum(0) + (v[0] * a).sum(0),)) == ["mul", "sum", "add"]
    assert names(lambda v: (v[0] @ a, v[0] @ a)) == ["mm"]
    assert names(lambda v: (torch.addmm(v[0][0].expand(4, 4), v[0], a),)) == ["select", "mm", "add_"]
    assert names(lambda v: ((v[0] @ a).sum(0, keepdim=True).reshape(4),)) == ["mm", "sum"]
    kept = lambda v: (lambda s: (s.reshape(4), s @ b))((v[0] @ a).sum(0, keepdim=True))  # noqa: E731
    assert names(kept) == ["mm", "sum", "reshape", "mm"]
    # What is read twice is written over by its last reader, sums are formed as soon as they can be.
    assert names(lambda v: (lambda m: (m * b, m * c, m.sum(0)))(v[0] @ a)) == ["mm", "sum", "mul", "mul_"]
    assert names(lambda v: (lambda m: (m + m @ b,))(v[0] @ a)) == ["mm", "addmm"]
    # An output, and what something else looks at, are not written over.
    assert names(lambda v: (lambda m: (m, m + v[0]))(v[0] @ a)) == ["mm", "add"]
    assert names(lambda v: (lambda m: (m.t(), m * b))(v[0] @ a)) == ["mm", "t", "mul"]
    assert names(lambda v: (lambda m, t: (m * b, t @ c))(*(lambda m: (m, m.t()))(v[0] @ a))) == ["mm", "t", "mul", "mm"]
    # Memory in which somebody else looks is not written to.
    with pytest.raises(TapeError, match="another tensor looks"):
        _program(lambda v: (lambda m: (m[0], m.mul_(2.0)))(v[0] @ a), (4, 4))
    with pytest.raises(TapeError, match="constant"):
        _program(lambda v: (v[0] * a, a.mul_(1.0)), (4, 4))


def test_results_are_written_where_they_shall_lie() -> None:
    a, b = torch.randn(2, 4, 4, dtype=torch.float64)
    v = _vectors((torch.Size((4, 4)),), 0)
    for product in (
        lambda v: (v[0] @ a, v[0] * b),
        lambda v: (v[0] @ a + (v[0] * b) @ a + b * v[0],),
        lambda v: (lambda m: (m, m, m @ b))(v[0] @ a),  # one value in two places
        lambda v: (v[0], v[0].t(), a, (v[0] @ a).t()),  # the vector itself, a constant, transposes
    ):
        with torch.no_grad():
            true = product(v)
            program = record(product, v)[0]
            for play in (player(program), player(simplified(program))):
                rows = torch.full((3, len(true) * 16 + 7), torch.nan, dtype=torch.float64)
                into = tuple(rows[1, 16 * i : 16 * (i + 1)].view(4, 4) for i in range(len(true)))
                play(v, into)
                _close(into, true, 1e-14)
                assert int(rows.isnan().sum()) == rows.numel() - 16 * len(true)  # nothing else is touched
                assert rows.data_ptr() not in {t.data_ptr() for t in play(v)}


class _Still(nn.Module):
    """A model whose Hessian is the identity: the product with a vector is that vector."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(rows, 200, dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x.mean() * (self.a.square().sum() + self.b.square().sum())


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("rows", [1, 150])
def test_a_product_is_memory_of_its_own(rows: int, batches: int) -> None:
    ones = torch.ones(2, 1, dtype=torch.float64)
    operator = Hessian(_Still(rows), lambda out, _: out, [(ones, ones)] * batches if batches > 1 else (ones, ones))
    for columns in (1, 3):
        V = torch.randn(columns, operator.shape[0], dtype=torch.float64).T  # as products take it, without a copy
        kept, found = V.clone(), [operator.matmat(V) for _ in range(2)]
        torch.testing.assert_close(found[0], V, rtol=1e-12, atol=0.0)
        for image in found:
            image.mul_(torch.nan)
        assert torch.equal(V, kept)
        torch.testing.assert_close(operator.matmat(V), kept, rtol=1e-12, atol=0.0)
    assert operator.on_tape is (rows == 150)


@pytest.mark.parametrize("cls", [Hessian, GaussNewton])
def test_layer_blocks_of_large_models_are_played_from_tapes(cls: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 250), nn.Tanh(), nn.Linear(250, 250), nn.Tanh(), nn.Linear(250, 5)).double()
    x, y = torch.randn(7, 40, dtype=torch.float64), torch.randint(0, 5, (7,))
    operator = cls(net, nn.CrossEntropyLoss(), [(x[:4], y[:4]), (x[4:], y[4:])])
    blocks = layer_blocks(operator)
    assert operator.on_tape
    start = 0
    for block in blocks.values():
        for seed in (1, 2):  # the second is played, and the first, too
            V = torch.randn(block.shape[0], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            padded = V.new_zeros(operator.shape[0], 3)
            padded[start : start + len(V)] = V
            expected = operator.matmat(padded)[start : start + len(V)]
            torch.testing.assert_close(block.matmat(V), expected, rtol=1e-9, atol=1e-12)
        with _Count() as count:
            block.matmat(V[:, :1])
        assert not any("backward" in name and "softmax" not in name for name in count.names)  # slopes are constants
        assert block.matmat(V[:, :0]).shape == (len(V), 0)
        start += len(V)


class _Branches(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g if float(g.sum()) > 0 else 1.0 * g


def test_a_backward_that_looks_at_values_is_not_taped() -> None:
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    y = _Branches.apply(x)

    def product(v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (x,), v, retain_graph=True)

    with torch.no_grad():
        with pytest.raises(TapeError, match="values"):
            record(product, _vectors((x.shape,), 0))
        block = torch.randn(3, 4, 4, dtype=torch.float64)
        torch.testing.assert_close(taped(product)((block,))[0], block)


@pytest.mark.parametrize("cls", [Hessian, GaussNewton])
@pytest.mark.parametrize("seed", [0, 1])
def test_large_models_are_played_from_a_tape(cls: Any, seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 200),
        nn.Tanh(),
        nn.Linear(200, 5),
    ).double()
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(0, 5, (6,))
    loss = nn.CrossEntropyLoss()
    operator = cls(net, loss, (x, y))
    V = torch.randn(operator.shape[0], 3, dtype=torch.float64)
    found = operator.matmat(V)
    assert "tape" in operator.engine
    recomputed = cls(net, loss, (x, y), max_memory=0)
    torch.testing.assert_close(found, recomputed.matmat(V), rtol=1e-9, atol=1e-12)
    assert "tape" not in recomputed.engine
    # The first product is played as all others are: the same vector gives the same bits at any time.
    fresh = cls(net, loss, (x, y))
    assert torch.equal(fresh.matmat(V[:, 1:]), found[:, 1:])
    assert torch.equal(fresh.matmat(V), found)
    halves = cls(net, loss, [(x[:4], y[:4]), (x[4:], y[4:])])
    with torch.no_grad():
        parts = [4 / 6 * cls(net, loss, (x[:4], y[:4])).matmat(V), 2 / 6 * cls(net, loss, (x[4:], y[4:])).matmat(V)]
    torch.testing.assert_close(halves.matmat(V), parts[0] + parts[1], rtol=1e-9, atol=1e-12)
