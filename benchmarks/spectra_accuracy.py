"""Accuracy at equal cost: our spectra and those of three rivals, on Hessians small enough to be written down.

    PYTHONPATH=. /path/to/python benchmarks/spectra_accuracy.py [--seeds 12] [--budgets 30 60 120] [--cases 0 1 ...]

Takes about three minutes on one idle core with all defaults; `--cases` runs some of the eight. Needs curvlinops,
hessian-eigenthings and PyHessian (those that are not installed are left out). Wasserstein-1 distance to the true
spectrum over the largest |eigenvalue|, in the mean over the seeds, for the same number of products. Ours is
`spectrum_within`, as a user calls it. Each rival runs its own stochastic Lanczos quadrature, its nodes and weights
taken as a discrete measure without the smoothing that some put on top (that makes the distance larger), once with all
products in one run, once in two and once in four; the best of the three counts. The best rival is put beside ours.
Nets, data and seeds are not those that any plan of ours was tuned on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from networks import GPT
from torch import Tensor, nn
from torch.func import functional_call, hessian

from torch_rmt.spectra import DenseOperator, spectrum_within

Rule = tuple[np.ndarray, np.ndarray]  # nodes and weights
Rival = Callable[[Tensor, int, int, int], Rule]  # matrix, runs, steps, seed


def dense_hessian(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Hessian of the mean cross-entropy by all parameters."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def loss(vector: Tensor) -> Tensor:
        parts = torch.split(vector, sizes)
        values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, values, (inputs,)), targets)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        matrix = hessian(loss)(flat)
    return (matrix + matrix.T) / 2


def nets() -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """Name, model, inputs and classes; the classes can be learnt."""
    torch.manual_seed(101)
    x = torch.randn(256, 20)
    yield "MLP 20-16-16-3 tanh", _mlp([20, 16, 16, 3], nn.Tanh), x, (x @ torch.randn(20, 3)).argmax(1)
    torch.manual_seed(102)
    x = torch.randn(200, 12)
    yield "MLP 12-20-20-20-4 ReLU", _mlp([12, 20, 20, 20, 4], nn.ReLU), x, (x @ torch.randn(12, 4)).argmax(1)
    torch.manual_seed(103)
    conv = [nn.Conv2d(1, 6, 3), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(6, 10, 2), nn.GELU(), nn.Flatten()]
    x = torch.randn(160, 1, 8, 8)
    yield (
        "CNN, 2 convolutions",
        nn.Sequential(*conv, nn.Linear(40, 10)),
        x,
        (x.flatten(1) @ torch.randn(64, 10)).argmax(1),
    )
    torch.manual_seed(104)
    tokens = torch.randint(0, 12, (24, 8))
    yield "GPT, 1 block of 8", GPT(12, 8, 1, 8, heads=2), tokens, tokens.roll(1, 1).flatten()


def _mlp(widths: list[int], activation: type[nn.Module]) -> nn.Sequential:
    pairs = pairwise(widths)
    layers = [part for i, o in pairs for part in (nn.Linear(i, o), activation())]
    return nn.Sequential(*layers[:-1])


def cases() -> Iterator[tuple[str, Tensor]]:
    """Name and dense Hessian, of each net before and after 300 steps of Adam."""
    for steps in (0, 300):
        for name, model, inputs, targets in nets():
            model = model.double()
            inputs = inputs.double() if inputs.is_floating_point() else inputs
            optimiser = torch.optim.Adam(model.parameters(), 3e-3)
            for _ in range(steps):
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimiser.step()
            yield f"{name}, {'trained' if steps else 'untrained'}", dense_hessian(model, inputs, targets)


def rivals() -> dict[str, Rival]:
    """Each rival's quadrature of a dense matrix, as many as are installed."""
    found: dict[str, Rival] = {}
    with contextlib.suppress(ImportError):
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        def papyan(matrix: Tensor, runs: int, steps: int, seed: int) -> Rule:
            torch.manual_seed(seed)
            rules = [fast_lanczos(matrix, steps) for _ in range(runs)]
            return np.concatenate([r[0].numpy() for r in rules]), np.concatenate([r[1][0].numpy() ** 2 for r in rules])

        found["curvlinops"] = papyan
    with contextlib.suppress(ImportError):
        import hessian_eigenthings
        from hessian_eigenthings.operators.base import LambdaOperator

        def eigenthings(matrix: Tensor, runs: int, steps: int, seed: int) -> Rule:
            operator = LambdaOperator(lambda v: matrix @ v, len(matrix), dtype=matrix.dtype)
            result = hessian_eigenthings.spectral_density(
                operator, num_runs=runs, lanczos_steps=steps, num_grid_points=2, seed=1000 * seed
            )
            known = ~torch.isnan(result.raw_eigenvalues)
            return result.raw_eigenvalues[known].numpy(), result.raw_weights[known].numpy()

        found["hessian-eigenthings"] = eigenthings
    with contextlib.suppress(ImportError):
        from pyhessian import hessian as PyHessian  # noqa: N812

        torch.eig = _eig  # gone from torch since 1.13; PyHessian calls it on a symmetric matrix

        def yao(matrix: Tensor, runs: int, steps: int, seed: int) -> Rule:
            torch.manual_seed(seed)
            model = _Quadratic(matrix)
            with contextlib.redirect_stdout(io.StringIO()):
                kept = PyHessian(model, lambda out, _: out, data=(torch.zeros(1), torch.zeros(1)), cuda=False)
                nodes, weights = kept.density(iter=steps, n_v=runs)
            return np.concatenate(nodes), np.concatenate(weights)

        found["PyHessian"] = yao
    return found


def _eig(matrix: Tensor, eigenvectors: bool = False) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


class _Quadratic(nn.Module):
    """A loss of which the given matrix is the Hessian."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.place = nn.Parameter(torch.ones(len(matrix), dtype=matrix.dtype))

    def forward(self, _: Tensor) -> Tensor:
        return 0.5 * (self.place @ (self.matrix @ self.place))


def wasserstein(nodes: np.ndarray, weights: np.ndarray, values: np.ndarray) -> float:
    places = np.concatenate([nodes.ravel(), values])
    masses = np.concatenate([weights.ravel() / weights.sum(), np.full(len(values), -1.0 / len(values))])
    order = np.argsort(places)
    return float(np.sum(np.abs(np.cumsum(masses[order])[:-1]) * np.diff(places[order])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--budgets", type=int, nargs="+", default=[30, 60, 120])
    parser.add_argument("--cases", type=int, nargs="+", default=range(8))
    options = parser.parse_args()
    found, began = rivals(), time.process_time()
    print("| Hessian | dimension | products | ours | " + " | ".join(found) + " | best rival / ours |")
    print("|---" * (5 + len(found)) + "|")
    for place, (name, matrix) in enumerate(cases()):
        if place not in options.cases:
            continue
        values = np.linalg.eigvalsh(matrix.numpy())
        top = np.abs(values).max()
        operator = DenseOperator(matrix, symmetric=True)
        for budget in options.budgets:
            ours = []
            for seed in range(options.seeds):
                s = spectrum_within(operator, torch.Generator().manual_seed(7000 + seed), matvecs=budget)
                assert s.matvecs <= budget
                ours.append(wasserstein(s.nodes, s.weights, values) / top)
            best: dict[str, tuple[float, float]] = {}
            for rival, run in found.items():
                for runs in (1, 2, 4):
                    errors = [
                        wasserstein(*run(matrix, runs, budget // runs, 7000 + seed), values) / top
                        for seed in range(options.seeds)
                    ]
                    spread = np.std(errors, ddof=1) / len(errors) ** 0.5
                    best[rival] = min(best.get(rival, (np.inf, 0.0)), (float(np.mean(errors)), float(spread)))
            mean, error = np.mean(ours), np.std(ours, ddof=1) / len(ours) ** 0.5
            shown = " | ".join(f"{m:.1e} ± {e:.0e}" for m, e in best.values())
            ratio = min((m for m, _ in best.values()), default=np.nan) / mean
            print(
                f"| {name} | {len(values)} | {budget} | {mean:.1e} ± {error:.0e} | {shown} | {ratio:.2f} |", flush=True
            )
    print(f"\n{time.process_time() - began:.0f} s of CPU")


if __name__ == "__main__":
    main()
