"""Our estimators beside those of SciPy and curvlinops, on the Hessian of a small trained network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.func import functional_call, hessian

from tests.spectra.prescribed import generator, symmetric_operator, wasserstein
from torch_rmt.spectra import (
    DenseOperator,
    hutch_plus_plus,
    hutchinson,
    spectrum_within,
    top_eigenvalues,
    xtrace,
)

curvlinops = pytest.importorskip("curvlinops")


@pytest.fixture(scope="module", params=[0, 30], ids=["untrained", "trained"])
def hessian_matrix(request: pytest.FixtureRequest) -> Tensor:
    """Dense Hessian of cross-entropy on a 12-14-14-4 tanh network after so many steps of Adam."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(12, 14), nn.Tanh(), nn.Linear(14, 14), nn.Tanh(), nn.Linear(14, 4)]
        model = nn.Sequential(*layers).double()
        inputs = torch.randn(200, 12, dtype=torch.float64)
    targets = inputs[:, :4].argmax(dim=1)
    optimiser = torch.optim.Adam(model.parameters(), 3e-2)
    for _ in range(request.param):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimiser.step()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def loss(vector: Tensor) -> Tensor:
        parts = torch.split(vector, [shape.numel() for shape in shapes.values()])
        values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, values, (inputs,)), targets)

    matrix = hessian(loss)(flat)
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize(("end", "which"), [("magnitude", "LM"), ("largest", "LA"), ("smallest", "SA")])
def test_extreme_eigenvalues_against_arpack(hessian_matrix: Tensor, end: str, which: str) -> None:
    operator = DenseOperator(hessian_matrix, symmetric=True)
    found = top_eigenvalues(operator, 5, generator(0), tolerance=1e-9, end=end)
    theirs = eigsh(hessian_matrix.numpy(), 5, which=which, return_eigenvectors=False, tol=1e-12)
    np.testing.assert_allclose(np.sort(found.values), np.sort(theirs), rtol=1e-10)


def test_top_eigenvalues_need_about_as_many_products_as_arpack(hessian_matrix: Tensor) -> None:
    """Both to a residual of 1e-3 |value|, averaged over starts; ours has five more for its check."""
    ours, theirs = [], []
    for seed in range(6):
        operator = DenseOperator(hessian_matrix, symmetric=True)
        ours.append(top_eigenvalues(operator, 5, generator(seed)).matvecs)
        calls = _Counted(hessian_matrix)
        start = torch.randn(len(hessian_matrix), generator=generator(seed), dtype=torch.float64).numpy()
        eigsh(calls.as_scipy(), 5, which="LM", tol=1e-3, v0=start)
        theirs.append(calls.count)
    assert np.mean(ours) - 5 <= 1.1 * np.mean(theirs)


class _Counted:
    """A matrix that counts its products for SciPy."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.count = matrix.numpy(), 0

    def as_scipy(self) -> object:
        from scipy.sparse.linalg import LinearOperator

        def product(vector: np.ndarray) -> np.ndarray:
            self.count += 1
            return self.matrix @ vector

        return LinearOperator(self.matrix.shape, matvec=product, dtype=np.float64)


@pytest.mark.parametrize(("budget", "repeats", "steps"), [(120, 2, 60), (400, 7, 57)])
def test_wasserstein_error_at_equal_cost_against_curvlinops(
    hessian_matrix: Tensor, budget: int, repeats: int, steps: int
) -> None:
    """At least 1.5 times smaller than quadrature by curvlinops' `fast_lanczos`, on average over seeds."""
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    operator = DenseOperator(hessian_matrix, symmetric=True)
    values = np.linalg.eigvalsh(hessian_matrix.numpy())
    ours, theirs = [], []
    for seed in range(20 if budget < 200 else 8):
        spectrum = spectrum_within(operator, generator(seed), matvecs=budget)
        assert spectrum.matvecs <= 1.2 * budget
        ours.append(wasserstein(spectrum.nodes, spectrum.weights, values))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            rules = [fast_lanczos(hessian_matrix, steps) for _ in range(repeats)]
        nodes = np.stack([rule[0].numpy() for rule in rules])
        weights = np.stack([rule[1][0].numpy() ** 2 for rule in rules])
        theirs.append(wasserstein(nodes, weights, values))
    assert np.mean(theirs) > 1.5 * np.mean(ours)


@pytest.mark.parametrize("name", ["flat", "spike", "decades"])
def test_traces_are_as_accurate_as_those_of_curvlinops(name: str) -> None:
    """Root mean square error over 60 seeds at the same budget, within the noise of such a comparison."""
    operator = symmetric_operator(name, 0)
    truth = float(operator.matrix.trace())
    pairs = [
        (lambda seed: hutchinson(operator, generator(seed), probes=30), curvlinops.hutchinson_trace),
        (lambda seed: hutch_plus_plus(operator, generator(seed), matvecs=30), curvlinops.hutchpp_trace),
        (lambda seed: xtrace(operator, generator(seed), matvecs=30), curvlinops.xtrace),
    ]
    for ours, theirs in pairs:
        errors = np.array([ours(seed).value - truth for seed in range(60)])
        others = []
        for seed in range(60):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                others.append(float(theirs(operator.matrix, 30)) - truth)
        assert np.sqrt(np.mean(errors**2)) < 1.4 * np.sqrt(np.mean(np.square(others)))
