"""What a report and a refusal say: true of the model at hand, and of use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_rmt.compare.verdict import gradients_in_words
from torch_rmt.diagnose import diagnose
from torch_rmt.diagnose.reports import curvature_report
from torch_rmt.learning_rate import suggest_lr
from torch_rmt.operators import GaussNewton, Hessian
from torch_rmt.spectra import exact

X = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3


def mlp(activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = (nn.Linear(8, 8), activation(), nn.Linear(8, 8), activation())
    return nn.Sequential(*hidden, nn.Linear(8, 3))


def test_a_weight_that_is_not_finite_is_named() -> None:
    net = mlp()
    net[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'2\.weight' has values that are not finite"):
        diagnose(net, (X, Y), functional.cross_entropy)


def test_complex_weights_are_refused_with_the_way_round() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, dtype=torch.complex64), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.to(torch.complex64)).abs())

    with pytest.raises(TypeError, match=r"'a\.weight' is complex.*view_as_complex"):
        diagnose(Complex(), (X, Y), functional.cross_entropy, what=("jacobian",))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower, self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 3)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        left, right = pair
        return self.head((self.tower(left) - self.tower(right)).abs())


def test_a_model_that_takes_a_pair_is_told_how_to_be_given_one() -> None:
    pair = (X, X.flip(0))
    with pytest.raises(TypeError, match=r"\(\(inputs,\), targets\)"):
        diagnose(Pair(), (pair, Y), functional.cross_entropy, what=("hessian",))
    found = diagnose(Pair(), ((pair,), Y), functional.cross_entropy, what=("hessian", "fisher"))
    assert [report.name for report in found.reports] == ["hessian", "fisher"]


def test_a_matrix_that_cannot_be_had_leaves_the_others() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"logits": logits, "loss": functional.cross_entropy(logits, labels)}

    batch = {"x": X, "labels": Y}
    with pytest.raises(TypeError, match=r"fisher: .* what=\('jacobian', 'hessian'\)"):
        diagnose(WithLoss(), batch, lambda out, _: out["loss"])
    found = diagnose(WithLoss(), batch, lambda out, _: out["loss"], what=("jacobian", "hessian"))
    assert len(found.reports) == 2


def test_the_summary_of_dead_units_and_of_a_single_weight() -> None:
    net = mlp(nn.ReLU)
    net[2].bias.data.fill_(-100.0)
    found = diagnose(net, (X, Y), functional.cross_entropy, what=("jacobian",))
    assert found.summary().startswith("no gradient reaches the first of 3 weights ('0')")
    one = diagnose(nn.Sequential(nn.Linear(8, 3)), (X, Y), functional.cross_entropy, what=("jacobian",))
    assert "one weight was read ('0')" in one.summary()
    assert "nan" not in found.summary() + one.summary()


def test_a_loss_that_is_sure_of_every_sample_has_no_curvature() -> None:
    net = mlp()
    net[4].bias.data = torch.tensor([1000.0, 0.0, 0.0])
    report = curvature_report(net, (X, Y * 0), functional.cross_entropy, "gauss_newton")
    assert report.verdict.startswith("Measured only: the loss has no curvature by the outputs")


def test_batch_norm_in_training_mode_is_no_batch_of_one() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    report = curvature_report(net, (X, Y), functional.cross_entropy, "fisher")
    assert "normalisation" in report.verdict
    assert "batch of one" not in report.verdict


def test_the_table_says_no_law_only_where_nothing_was_predicted() -> None:
    found = diagnose(mlp(), (X, Y), functional.cross_entropy, what=("fisher",))
    norm = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    other = diagnose(norm, (X, Y), functional.cross_entropy, what=("fisher",))
    assert [one.rows()[1][3] for one in (found, other)] == ["scale only", "no law"]


def test_a_jacobian_of_one_factor_has_nothing_to_be_free_of() -> None:
    found = diagnose(nn.Sequential(nn.Linear(8, 3)), (X, Y), functional.cross_entropy, what=("freeness",))
    assert "a single factor" in found["freeness"].verdict


def test_gradients_that_hardly_change_keep_their_size() -> None:
    assert "gradients keep their size over" in gradients_in_words({"chi": 0.99, "depth": 2.0})
    assert "shrink 2 times" in gradients_in_words({"chi": 0.25, "depth": 1.0})
    assert "Raise sigma_w to 100 times what it is" in gradients_in_words({"chi": 1e-4, "depth": 3.0})
    assert "Raise sigma_w by 100.0%" in gradients_in_words({"chi": 0.25, "depth": 10.0})


def test_the_bound_of_the_gauss_newton_matrix_is_said_to_be_its_own() -> None:
    """One linear layer behind a square: H = G + R with R negative where the targets are above the outputs."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor([0.5]))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.a) ** 2

    net, x, y = Square(), torch.ones(2, 1), torch.full((2, 1), 0.4)
    tops = [float(exact(kind(net, functional.mse_loss, (x, y))).eigenvalues[-1]) for kind in (Hessian, GaussNewton)]
    assert 0 < tops[0] < tops[1]
    report = suggest_lr(net, (x, y), functional.mse_loss)
    assert report.max_lr == pytest.approx(2 / tops[1], rel=1e-2)
    assert f"allows up to {2 / tops[0]:.3g} here" in report.advice
