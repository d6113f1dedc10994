from __future__ import annotations

import json
import math

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from torch_rmt.diagnose import diagnose, jacobian_report, measure
from torch_rmt.init import critical_init_
from torch_rmt.learning_rate import suggest_lr
from torch_rmt.operators import Fisher, GaussNewton, Hessian


def mlp(depth: int = 5, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(width, 3))


X = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 3


def test_a_whole_diagnosis(tmp_path) -> None:
    net = mlp()
    found = diagnose(net, (X, Y), functional.cross_entropy, what=("jacobian", "hessian", "gauss_newton", "fisher"))
    assert [report.name for report in found.reports] == ["jacobian", "hessian", "gauss_newton", "fisher"]
    assert found["jacobian"].agrees, found["jacobian"].verdict
    assert "Ordered" in found["jacobian"].verdict
    assert "This is the Jacobian of '" in found["jacobian"].verdict
    assert found.chi == pytest.approx(1 / 3, rel=0.4)
    assert found["fisher"].prediction is None
    assert "those of a wide network on this batch" in found["fisher"].verdict
    for report in found.reports:
        json.loads(report.to_json())
    assert all(type(v) is float and math.isfinite(v) for v in found.scalars().values())
    page = found.to_html(tmp_path / "page.html")
    assert "jacobian" in page.read_text(encoding="utf-8")
    console = Console(width=120, record=True)
    console.print(found.table())
    assert "hessian" in console.export_text()
    with pytest.raises(KeyError, match="jacobian"):
        found["ntk"]


def test_the_largest_eigenvalue_is_the_dense_one() -> None:
    net = mlp(2, 6).double()
    x = X[:, :6].double()
    found = diagnose(net, (x, Y), functional.cross_entropy, what=("hessian",))
    parameters = tuple(net.parameters())
    names = [n for n, _ in net.named_parameters()]

    def loss(*values: Tensor) -> Tensor:
        out = torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))
        return functional.cross_entropy(out, Y)

    rows = torch.autograd.functional.hessian(loss, parameters)
    sizes = [p.numel() for p in parameters]
    blocks = [
        torch.cat([block.reshape(m, n) for block, n in zip(row, sizes, strict=True)], 1)
        for row, m in zip(rows, sizes, strict=True)
    ]
    dense = torch.cat(blocks)
    values = torch.linalg.eigvalsh(dense)
    assert found["hessian"].facts["largest_eigenvalue"] == pytest.approx(float(values[-1]), rel=1e-5)
    assert found["hessian"].spectrum.moment(1)[0] == pytest.approx(float(values.mean()), rel=1e-6, abs=1e-12)


def test_hessian_parts_sum_to_the_whole() -> None:
    net = mlp(2, 8)
    found = diagnose(net, (X[:, :8], Y), functional.cross_entropy, what=("hessian",))["hessian"]
    assert found.prediction is not None
    batch = (X[:, :8], Y)
    whole, part = (measure(kind(net, functional.cross_entropy, batch)) for kind in (Hessian, GaussNewton))
    assert whole.dim == part.dim == found.spectrum.dim
    assert found.prediction.measure.mean == pytest.approx(whole.moment(1)[0], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_not_disturbed(training: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3)).train(
        training
    )
    functional.cross_entropy(net(X), Y).backward()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    gradients = [p.grad.clone() for p in net.parameters()]
    rng = torch.get_rng_state()
    diagnose(net, (X, Y), functional.cross_entropy, what=("hessian", "fisher"))
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
    assert net.training is training


def test_a_cnn_and_a_model_that_theory_does_not_know() -> None:
    torch.manual_seed(0)
    conv = [m for _ in range(4) for m in (nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"), nn.Tanh())]
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), *conv, *tail)
    x = torch.randn(8, 1, 6, 6)
    critical_init_(net, x)
    report = jacobian_report(net, x)
    assert report.prediction is not None
    assert report.facts["chi"] == pytest.approx(1.0, abs=0.2)  # six channels

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(self.a(x), -1)

    report = jacobian_report(Odd(), X)
    assert report.prediction is None
    assert "softmax" in report.verdict


@pytest.mark.parametrize("seed", [0, 1])
def test_chi_of_a_bottleneck_is_that_of_gradients(seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(400, 200), nn.Tanh(), nn.Linear(200, 100), nn.Tanh(), nn.Linear(100, 50))
    for layer in net[::2]:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    x = torch.randn(1, 400)
    report = jacobian_report(net, x)
    dense = torch.autograd.functional.jacobian(net, x)[0, :, 0]
    # a gradient at the output that points anywhere, |u| = 1, has E|J^T u|^2 = |J|_F^2 / 50 at the input
    assert report.facts["chi"] ** 3 == pytest.approx(float(dense.square().sum()) / 50, rel=1e-4)
    assert report.prediction is not None
    assert report.prediction.scalars["chi"] == pytest.approx(report.facts["chi"], rel=0.1)


def test_chi_is_counted_alike_in_measurement_and_law() -> None:
    """From a pre-activation on, the law's first and last entries are half a layer each."""
    report = jacobian_report(mlp(6, 64), torch.randn(1, 64))
    assert report.facts["depth"] == 5
    assert report.prediction is not None
    assert report.prediction.scalars["chi"] ** 5 == pytest.approx(report.prediction.measure.mean, rel=1e-9)
    assert report.scalars()["predicted/chi"] == pytest.approx(report.facts["chi"], rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_freeness_of_a_network_in_half_precision(dtype: torch.dtype) -> None:
    net, x = mlp(4), torch.randn(4, 16)
    wide = diagnose(net, (x, Y[:4]), functional.cross_entropy, what=("freeness",))["freeness"]
    half = diagnose(net.to(dtype), (x.to(dtype), Y[:4]), functional.cross_entropy, what=("freeness",))["freeness"]
    assert half.prediction is not None, half.verdict
    assert wide.prediction is not None
    assert half.prediction.measure.mean == pytest.approx(wide.prediction.measure.mean, rel=0.02)


def test_findings_print_their_words() -> None:
    net = mlp(3)
    found = diagnose(net, (X, Y), functional.cross_entropy, what=("jacobian", "fisher"))
    assert str(found).splitlines() == [found.summary(), *(f"{r.name}: {r.verdict}" for r in found.reports)]
    assert "the Hessian's residual part may allow less" in found["fisher"].verdict
    made = critical_init_(net, X)
    assert str(made) == made.verdict
    advice = suggest_lr(net, (X, Y), functional.cross_entropy)
    assert str(advice) == advice.advice


class TwoHeads(nn.Module):
    """Returns a tuple, as a variational autoencoder does, or the two joined."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.left, self.right = nn.Linear(16, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        out = self.left(h), self.right(h)
        return torch.cat(out, -1) if self.joined else out


def test_a_model_that_returns_a_tuple() -> None:
    def of_pair(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return functional.cross_entropy(output[0], target) + 0.1 * output[1].square().sum(-1).mean()

    def of_joined(output: Tensor, target: Tensor) -> Tensor:
        return of_pair((output[:, :3], output[:, 3:]), target)

    pair, joined = TwoHeads(False), TwoHeads(True)
    found = diagnose(pair, (X, Y), of_pair, what=("jacobian", "freeness", "hessian", "fisher"))
    reference = diagnose(joined, (X, Y), of_joined, what=("hessian",))["hessian"]
    for key in ("mean", "largest_eigenvalue"):
        assert found["hessian"].scalars()[key] == pytest.approx(reference.scalars()[key], rel=1e-3)
    assert "no plain tensor" in found["hessian"].verdict
    empirical = measure(Fisher(joined, of_joined, (X, Y), kind="empirical"))
    assert found["fisher"].scalars()["mean"] == pytest.approx(empirical.moment(1)[0], rel=1e-4)
    assert "empirical Fisher" in found["fisher"].verdict
    for name in ("jacobian", "freeness"):
        assert found[name].prediction is not None, found[name].verdict
        assert "the Jacobian of 'left' by the input" in found[name].verdict
    rate, other = suggest_lr(pair, (X, Y), of_pair), suggest_lr(joined, (X, Y), of_joined)
    assert rate.gauss_newton is None
    assert rate.max_lr == pytest.approx(2 / other.hessian.value, rel=2e-2)
    assert all(math.isfinite(value) for value in rate.scalars().values())


def test_one_singular_value_agrees_with_nothing() -> None:
    """The Jacobian of a single output: the noise floor would excuse any distance."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))
    report = jacobian_report(net, X)
    assert report.distance("kolmogorov").noise > 1 / 2.5
    assert report.agrees is None
    assert report.verdict.startswith("Too small to tell")


def test_bad_input_is_refused_with_advice() -> None:
    net, loss = mlp(2), functional.cross_entropy
    with pytest.raises(ValueError, match="jacobian"):
        diagnose(net, (X, Y), loss, what=("hesian",))
    with pytest.raises(ValueError, match="tuple"):
        diagnose(net, (X, Y), loss, what="hessian")
    with pytest.raises(TypeError, match=r"pair|Type-check"):
        diagnose(net, X, loss)
    with pytest.raises(ValueError, match="empty"):
        diagnose(net, (X[:0], Y[:0]), loss)
    with pytest.raises(ValueError, match=r"(?i)inf|nan|finite"):
        diagnose(net, (X, Y), lambda out, y: out.sum() * float("nan"), what=("hessian",))
    with pytest.raises(ValueError, match="nope"):
        jacobian_report(net, X, "nope", "2")


class TokenModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.mixer = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.norm(x + self.mixer(x.mT).mT))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_model_of_tokens_is_diagnosed_from_its_embedding_on(seed: int) -> None:
    """Tied N(0, 1) embeddings make the logits so large that the softmax is sure: the curvature must not be rounding."""
    torch.manual_seed(seed)
    tokens = torch.randint(0, 11, (5, 6))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output.flatten(0, 1), target.flatten())

    found = diagnose(TokenModel(), (tokens, tokens.roll(-1, 1)), loss)
    assert [report.name for report in found.reports] == ["jacobian", "hessian", "fisher"]
    assert found["jacobian"].spectrum.dim == 72
    assert "embedding" in found["jacobian"].verdict
    values = found["fisher"].spectrum.eigenvalues
    assert values.min() > -1e-6 * values.max()


def test_a_loss_that_is_no_likelihood_gets_its_empirical_fisher_matrix() -> None:
    found = diagnose(mlp(2, 8), (X[:, :8], torch.rand(24, 3)), functional.huber_loss, what=("fisher",))["fisher"]
    assert "empirical Fisher" in found.verdict


def test_a_hessian_report_says_where_its_largest_eigenvalue_comes_from() -> None:
    """H = G + R, so |top(H) - top(G)| <= |R| (Weyl), whatever could be told of the bulk."""
    net = mlp()
    report = diagnose(net, (X, Y), functional.cross_entropy, what=("hessian",))["hessian"]
    top, gauss_newton, residual = (
        report.facts[key] for key in ("largest_eigenvalue", "gauss_newton/largest", "residual/largest")
    )
    assert abs(top - gauss_newton) <= residual * 1.001
    assert f"learning rate of {2 / top:.3g}" in report.verdict


@pytest.mark.parametrize("takes_labels", [False, True])
def test_a_batch_with_labels_is_the_pair_that_it_holds(takes_labels: bool) -> None:
    """As the data sets of transformers give them, for a model that returns a dict."""

    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(3, 16)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x)}

    class AnswersWithLoss(Answers):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
            out = super().forward(x)
            return out if labels is None else {**out, "loss": functional.cross_entropy(out["logits"], labels)}

    net = AnswersWithLoss() if takes_labels else Answers()
    loss = (lambda o, t: o["loss"]) if takes_labels else (lambda o, t: functional.cross_entropy(o["logits"], t))
    found = diagnose(net, {"x": X, "labels": Y}, loss, what=("jacobian", "hessian"))
    plain = diagnose(mlp(3, 16), (X, Y), functional.cross_entropy, what=("jacobian", "hessian"))
    torch.testing.assert_close(found["jacobian"].spectrum.nodes, plain["jacobian"].spectrum.nodes)
    assert found["hessian"].scalars()["largest"] == pytest.approx(plain["hessian"].scalars()["largest"], rel=1e-3)
    with pytest.raises(TypeError, match="without 'labels'"):
        diagnose(net, {"x": X}, loss)
