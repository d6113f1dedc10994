"""Spectra: accuracy and cost of our estimators beside curvlinops', as ratios in one run.

    python benchmarks/spectra.py [--device cuda] [--quick]

Accuracy: Wasserstein-1 distance to the true spectrum over the largest |eigenvalue|, at equal products, on
Hessians small enough to be written down. Cost: seconds over the seconds of one gradient (g), on the MLP of
784-256-256-10 at batch 512.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian

from torch_rmt.operators import Hessian
from torch_rmt.spectra import SLQ, DenseOperator, spectrum_within, top_eigenvalues, trace


def mlp(*widths: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def dense_hessian(model: nn.Sequential, inputs: Tensor, targets: Tensor) -> Tensor:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def loss(vector: Tensor) -> Tensor:
        parts = torch.split(vector, sizes)
        values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, values, (inputs,)), targets)

    matrix = hessian(loss)(flat)
    return (matrix + matrix.T) / 2


def accuracy(quick: bool) -> None:
    """W1 at equal cost: ours by budget, theirs as probes x steps of `fast_lanczos`."""
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    print("| Hessian | budget | ours | curvlinops (best of three splits) | ratio |\n|---|---|---|---|---|")
    for name, steps in (("20-16-16-3 untrained", 0), ("20-16-16-3 trained", 200)):
        torch.manual_seed(0)
        model = mlp(20, 16, 16, 3, dtype=torch.float64)
        inputs = torch.randn(256, 20, dtype=torch.float64)
        targets = inputs[:, :3].argmax(dim=1)
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(steps):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimiser.step()
        matrix = dense_hessian(model, inputs, targets)
        values = np.linalg.eigvalsh(matrix.numpy())
        operator = DenseOperator(matrix, symmetric=True)
        for budget in (30, 120, 240, 600):
            seeds = range(4 if quick else 20)
            drawn = [spectrum_within(operator, torch.Generator().manual_seed(s), matvecs=budget) for s in seeds]
            ours = np.mean([wasserstein(s.nodes, s.weights, values) for s in drawn])
            theirs = []
            for depth in sorted({min(budget, depth) for depth in (30, 60, 80)}):
                errors = []
                for seed in seeds:
                    torch.manual_seed(seed)
                    rules = [fast_lanczos(matrix, depth) for _ in range(budget // depth)]
                    nodes = np.concatenate([rule[0].numpy() for rule in rules])
                    weights = np.concatenate([rule[1][0].numpy() ** 2 for rule in rules])
                    errors.append(wasserstein(nodes, weights, values))
                theirs.append(np.mean(errors))
            top = np.abs(values).max()
            spent = np.mean([s.matvecs for s in drawn])
            row = f"| {name} | {budget} (spent {spent:.0f}) | {ours / top:.2e} | {min(theirs) / top:.2e} |"
            print(row, f"{min(theirs) / ours:.2f} |")


def wasserstein(nodes: np.ndarray, weights: np.ndarray, values: np.ndarray) -> float:
    places = np.concatenate([nodes.ravel(), values])
    masses = np.concatenate([weights.ravel() / weights.sum(), np.full(len(values), -1.0 / len(values))])
    order = np.argsort(places)
    return float(np.sum(np.abs(np.cumsum(masses[order])[:-1]) * np.diff(places[order])))


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Least of a few timings, after one to warm up."""
    work()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def cost(device: torch.device, quick: bool) -> None:
    """Seconds of whole estimates in units of one gradient; the rival's in the same run."""
    from curvlinops import HessianLinearOperator
    from curvlinops.papyan2020traces.spectrum import fast_lanczos
    from scipy.sparse.linalg import eigsh

    torch.manual_seed(0)
    model = mlp(784, 256, 256, 10).to(device)
    inputs = torch.randn(512, 784, device=device)
    targets = torch.randint(0, 10, (512,), device=device)
    loss = nn.CrossEntropyLoss()
    parameters = list(model.parameters())
    g = seconds(lambda: torch.autograd.grad(loss(model(inputs), targets), parameters), device, repeats=10)
    operator = Hessian(model, loss, (inputs, targets))
    # check_deterministic=False keeps their start-up test out of the timing.
    rival = HessianLinearOperator(model, loss, parameters, [(inputs, targets)], check_deterministic=False)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    repeats = 1 if quick else 3
    rows: list[tuple[str, Callable[[], object], Callable[[], object] | None]] = [
        ("SLQ 1 x 30", lambda: SLQ(1, 30)(operator, generator()), lambda: fast_lanczos(rival, 30)),
        ("trace, 30 products", lambda: trace(operator, generator(), matvecs=30), None),
        (
            "top 5 to 1e-3",
            lambda: top_eigenvalues(operator, 5, generator()),
            lambda: eigsh(rival.to_scipy(), 5, which="LM", tol=1e-3),
        ),
        ("SLQ 10 x 80", lambda: SLQ(10, 80)(operator, generator()), None),
    ]
    print(f"\ng = {1e3 * g:.2f} ms on {device}\n\n| work | ours / g | curvlinops / g |\n|---|---|---|")
    for name, ours, theirs in rows:
        mine = seconds(ours, device, repeats) / g
        other = "" if theirs is None else f"{seconds(theirs, device, repeats) / g:.0f}"
        print(f"| {name} | {mine:.0f} | {other} |")
    found = top_eigenvalues(operator, 5, generator())
    print(f"\ntop 5: {found.matvecs} products, residuals over value {found.residuals / np.abs(found.values)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    accuracy(options.quick)
    cost(torch.device(options.device), options.quick)


if __name__ == "__main__":
    main()
