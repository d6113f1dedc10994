"""Models that return no tensor, batches that are mappings: measured as the same model with tensors is, or refused."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_rmt.operators import (
    Fisher,
    GaussNewton,
    GradientCovariance,
    Hessian,
    Jacobian,
    NeuralTangentKernel,
    cost,
    dense,
    dual_gram,
    layer_blocks,
)
from torch_rmt.operators.trees import tensors_of, tree_map


class Named(NamedTuple):
    logits: Tensor
    features: Tensor
    step: int


@dataclass
class Plain:
    logits: Tensor
    features: Tensor
    cache: Any = None


@dataclass(frozen=True)
class Frozen:
    logits: Tensor
    features: Tensor


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As in transformers: entries are attributes, and `torch.utils._pytree` knows the class."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


pytree.register_pytree_node(
    ModelOutput, lambda o: (list(o.values()), list(o)), lambda values, keys: ModelOutput(zip(keys, values, strict=True))
)


class ReadOnly(Mapping[str, Any]):
    def __init__(self, entries: dict[str, Any]) -> None:
        self.entries = entries

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class Returning(nn.Module):
    """Logits and features of a small network, in a form of one's own."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.form = form
        self.double()

    def forward(self, x: Tensor) -> Any:
        features = torch.tanh(self.body(x))
        return self.form(self.head(features), features)


def _loss(logits: Tensor, features: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target) + 0.1 * features.square().sum(1).mean()


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any, Tensor], Tensor]]] = {
    "dict": (
        lambda a, b: {"step": 3, "mask": torch.ones(2), "logits": a, "features": b},
        lambda o, t: _loss(o["logits"], o["features"], t),
    ),
    "tuple": (lambda a, b: (a, (None, [b])), lambda o, t: _loss(o[0], o[1][1][0], t)),
    "named tuple": (lambda a, b: Named(a, b, 3), lambda o, t: _loss(o.logits, o.features, t)),
    "dataclass": (lambda a, b: Plain(a, b), lambda o, t: _loss(o.logits, o.features, t)),
    "frozen dataclass": (lambda a, b: Frozen(a, b), lambda o, t: _loss(o.logits, o.features, t)),
    "model output": (
        lambda a, b: ModelOutput(logits=a, hidden_states=(b, b.detach())),
        lambda o, t: _loss(o.logits, o.hidden_states[0], t),
    ),
    "read-only mapping": (
        lambda a, b: ReadOnly({"logits": a, "features": b}),
        lambda o, t: _loss(o["logits"], o["features"], t),
    ),
}
MATRICES: dict[str, Any] = {
    "hessian": Hessian,
    "empirical": lambda *given, **limits: Fisher(*given, kind="empirical", **limits),
    "gradient covariance": GradientCovariance,
}


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 0, 1, 0])


def _reference(kind: str) -> tuple[nn.Module, Any]:
    """The same with one tensor: logits and features side by side."""
    return Returning(lambda a, b: torch.cat([a, b], dim=1)), lambda o, t: _loss(o[:, :3], o[:, 3:], t)


@pytest.mark.parametrize("kind", list(MATRICES))
@pytest.mark.parametrize("form", list(FORMS))
def test_any_output_is_the_tensor_it_holds(form: str, kind: str) -> None:
    x, y = _batch()
    net, loss = _reference(kind)
    expected = dense(MATRICES[kind](net, loss, (x, y)))
    shape, loss = FORMS[form]
    net = Returning(shape)
    torch.testing.assert_close(dense(MATRICES[kind](net, loss, (x, y))), expected)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    torch.testing.assert_close(dense(MATRICES[kind](net, loss, batches)), expected)
    assert float(expected.norm()) > 0.1


@pytest.mark.parametrize("kind", list(MATRICES))
def test_the_rest_of_the_engine_takes_any_output(kind: str) -> None:
    """Sums, blocks, cuts for memory, plans and the dual."""
    (x, y), (shape, loss) = _batch(), FORMS["model output"]
    net = Returning(shape)
    operator = MATRICES[kind](net, loss, (x, y))
    expected = dense(operator)
    assert cost(operator).flops > 0
    least = operator.footprint().product(1)
    cut = MATRICES[kind](net, loss, (x, y), max_memory=int(0.9 * least))
    torch.testing.assert_close(dense(cut), expected)
    assert any("cut into parts" in note for note in cut.notes)
    if kind == "gradient covariance":
        return
    for name, rows in {"body": slice(0, 16), "head": slice(16, 31)}.items():
        torch.testing.assert_close(dense(layer_blocks(operator)[name]), expected[rows, rows])
    summed = MATRICES[kind](net, lambda o, t: loss(o, t) * len(t), [(x[:3], y[:3]), (x[3:], y[3:])])
    torch.testing.assert_close(dense(summed), 7 * expected)
    if kind == "empirical":
        gram = dual_gram(operator)
        assert "Gram matrices of the modules" in gram.method
        torch.testing.assert_close(gram.eigenvalues(), torch.linalg.eigvalsh(expected).clamp_min(0.0))


def test_a_mean_that_the_model_computed_has_a_hessian_but_no_gradients_by_sample() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Returning(lambda a, b: torch.cat([a, b], dim=1))

        def forward(self, x: Tensor, labels: Tensor | None = None) -> ModelOutput:
            out = self.net(x)
            loss = None if labels is None else _loss(out[:, :3], out[:, 3:], labels)
            return ModelOutput(loss=loss, logits=out)

    x, y = _batch()
    net, loss = _reference("hessian")
    expected = dense(Hessian(net, loss, (x, y)))
    batch = {"x": x, "labels": y}
    torch.testing.assert_close(dense(Hessian(Own(), lambda o, labels: o.loss, batch)), expected)
    torch.testing.assert_close(dense(Hessian(Own(), lambda o, labels: o.loss, UserDict(batch))), expected)
    parts: list[Any] = [{"x": x[k], "labels": y[k]} for k in (slice(0, 5), slice(5, 7))]
    for several in (parts, tuple(parts), iter(parts)):
        torch.testing.assert_close(dense(Hessian(Own(), lambda o, labels: o.loss, several)), expected)
    with pytest.raises(TypeError, match="no row for each of 7 samples"):
        Fisher(Own(), lambda o, labels: o.loss, batch, kind="empirical")
    with pytest.raises(TypeError, match=r"return self.model\(x\)\['logits'\]"):
        GaussNewton(Own(), lambda o, labels: o.loss, batch)


def test_labels_are_kept_from_a_model_that_does_not_take_them() -> None:
    x, y = _batch()
    net = Returning(lambda a, b: a)
    for kind in (Hessian, GaussNewton, Fisher):
        expected = dense(kind(net, F.cross_entropy, (x, y)))
        torch.testing.assert_close(dense(kind(net, F.cross_entropy, {"labels": y, "x": x})), expected)
    with pytest.raises(TypeError, match="without 'labels'"):
        Hessian(net, F.cross_entropy, {"x": x})


REFUSED: dict[str, Callable[[nn.Module, Tensor, Tensor], Any]] = {
    "gauss-newton": lambda net, x, y: GaussNewton(net, F.cross_entropy, (x, y)),
    "fisher": lambda net, x, y: Fisher(net, F.cross_entropy, (x, y)),
    "tangent kernel": lambda net, x, y: NeuralTangentKernel(net, x),
    "jacobian": lambda net, x, y: Jacobian(net, x[:1]),
}
SAID = {"dict": r"\['logits'\]", "tuple": r"\[0\]", "dataclass": r"\.logits", "model output": r"\['logits'\]"}


@pytest.mark.parametrize("form", list(SAID))
@pytest.mark.parametrize("case", list(REFUSED))
def test_what_needs_a_tensor_says_how_to_give_it(case: str, form: str) -> None:
    with pytest.raises(TypeError, match=r"`return self\.model\(x\)" + SAID[form]):
        REFUSED[case](Returning(FORMS[form][0]), *_batch())


def test_a_loss_that_takes_no_such_output_says_how_to_write_it() -> None:
    x, y = _batch()
    for kind in MATRICES.values():
        with pytest.raises(TypeError, match=r"loss=lambda output, target: your_loss\(output\.logits, target\)"):
            kind(Returning(FORMS["dataclass"][0]), F.cross_entropy, (x, y))
        with pytest.raises(TypeError, match="your_loss"):
            kind(Returning(FORMS["dataclass"][0]), lambda o, t: F.cross_entropy(o.logit, t), (x, y))
        if kind is not Hessian:
            with pytest.raises(ValueError, match="does not depend"):
                kind(Returning(FORMS["dict"][0]), lambda o, t: o["logits"].detach().sum(), (x, y))


def test_trees_keep_their_types_and_leave_the_original_alone() -> None:
    a, b = torch.ones(2), torch.zeros(3)
    for form, _ in FORMS.values():
        tree = form(a, b)
        doubled = tree_map(lambda t: 2 * t, tree)
        assert type(doubled) is (dict if isinstance(tree, ReadOnly) else type(tree))
        assert [t.tolist() for t in tensors_of(doubled)] == [(2 * t).tolist() for t in tensors_of(tree)]
        assert any(t is a for t in tensors_of(tree))
        assert not any(t is a for t in tensors_of(doubled))
    kept = UserDict(x=a)
    assert type(tree_map(lambda t: t + 1, kept)) is UserDict
    assert kept["x"] is a
