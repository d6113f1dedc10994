"""Spectra: accuracy and cost of our estimators beside the rivals that are installed, as ratios in one run.

    python benchmarks/spectra.py [--device cuda] [--quick] [--only accuracy mlp gpt resnet]

Accuracy: Wasserstein-1 distance to the true spectrum over the largest |eigenvalue|, at equal products, on
Hessians small enough to be written down; the draws of network and data are not those that the plans were tuned on.
Cost: seconds over the seconds of one gradient (g), and peak memory, on the models of operators.py.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import resource
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from operators import MODELS
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

    print(
        "| Hessian | budget | ours | plain Lanczos (curvlinops), best of four splits | ratio |\n|---|---|---|---|---|"
    )
    cases = [("20-16-16-3 untrained", 0, 7), ("20-16-16-3 trained", 200, 7), ("20-16-16-3 trained", 200, 8)]
    for name, steps, draw in cases:
        torch.manual_seed(draw)
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
            for depth in sorted({min(budget, depth) for depth in (15, 30, 60, 80)}):
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
            row = f"| {name}, draw {draw} | {budget} (spent {spent:.0f}) | {ours / top:.2e} | {min(theirs) / top:.2e} |"
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


def peak_mebibytes(work: Callable[[], object], device: torch.device) -> float:
    """Growth of memory during one call: the allocator's on CUDA, the process's resident set elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    page, seen, over = resource.getpagesize(), [], threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.append(int(Path("/proc/self/statm").read_text().split()[1]))
            time.sleep(1e-3)

    gc.collect()
    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    over.set()
    watcher.join()
    return (max(seen) - seen[0]) * page / 2**20


Row = dict[str, Callable[[], object] | None]


def rivals(model: nn.Module, inputs: Tensor, targets: Tensor, device: torch.device) -> dict[str, Row]:
    """What each rival that is installed can do of our rows, on the same model, data and loss."""
    loss, found = nn.CrossEntropyLoss(), {}
    with contextlib.suppress(ImportError):
        from curvlinops import HessianLinearOperator, hutchinson_trace
        from curvlinops.papyan2020traces.spectrum import fast_lanczos
        from scipy.sparse.linalg import eigsh

        # check_deterministic=False keeps their start-up test out of the timing.
        theirs = HessianLinearOperator(
            model, loss, list(model.parameters()), [(inputs, targets)], check_deterministic=False
        )
        found["curvlinops"] = {
            "SLQ 1 x 30": lambda: fast_lanczos(theirs, 30),
            "trace, 30 products": lambda: hutchinson_trace(theirs, 30),
            "top 5 to 1e-3": lambda: eigsh(theirs.to_scipy(), 5, which="LM", tol=1e-3),
        }
    with contextlib.suppress(ImportError):
        import hessian_eigenthings as eigenthings

        matrix = eigenthings.HessianOperator(model, [(inputs, targets)], eigenthings.supervised_loss(loss))
        found["hessian-eigenthings"] = {
            "SLQ 1 x 30": lambda: eigenthings.spectral_density(matrix, num_runs=1, lanczos_steps=30),
            "trace, 30 products": lambda: eigenthings.trace(matrix, num_matvecs=30, method="hutchinson"),
            "top 5 to 1e-3": lambda: eigenthings.lanczos(matrix, k=5, tol=1e-3),
        }
    with contextlib.suppress(ImportError):
        from pyhessian import hessian as PyHessian  # noqa: N812

        def eig(matrix: Tensor, eigenvectors: bool = False) -> tuple[Tensor, Tensor]:
            values, vectors = torch.linalg.eigh(matrix)
            return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

        torch.eig = eig  # gone from torch since 1.13; PyHessian calls it on a symmetric matrix
        kept = PyHessian(model, loss, data=(inputs, targets), cuda=device.type == "cuda")
        found["PyHessian"] = {
            "SLQ 1 x 30": lambda: kept.density(iter=30, n_v=1),
            "trace, 30 products": lambda: kept.trace(maxIter=30, tol=0.0),  # stops early where the trace is negative
            "top 5 to 1e-3": lambda: kept.eigenvalues(maxIter=100, tol=1e-3, top_n=5),
        }
    return found


def cost(name: str, device: torch.device, quick: bool) -> None:
    """Seconds of whole estimates in units of one gradient, and peak memory; the rivals' in the same run."""
    torch.manual_seed(0)
    model, inputs, targets = (part.to(device) for part in MODELS[name](False))
    loss = nn.CrossEntropyLoss()
    parameters = list(model.parameters())

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        g = seconds(lambda: torch.autograd.grad(loss(model(inputs), targets), parameters), device, repeats=10)
        operator = Hessian(model, loss, (inputs, targets))
        ours: Row = {
            "SLQ 1 x 30": lambda: SLQ(1, 30)(operator, generator()),
            "spectrum within 30 products": lambda: spectrum_within(operator, generator(), matvecs=30),
            "trace, 30 products": lambda: trace(operator, generator(), matvecs=30),
            "top 5 to 1e-3": lambda: top_eigenvalues(operator, 5, generator()),
        }
        if name == "mlp" and not quick:
            ours["SLQ 10 x 80"] = lambda: SLQ(10, 80)(operator, generator())
        columns = {"torch_rmt": ours} | rivals(model, inputs, targets, device)
        print(f"\n{name}: g = {1e3 * g:.2f} ms on {device}; each figure g, then MiB at the peak\n")
        print("| work | " + " | ".join(columns) + " |\n|" + "---|" * (1 + len(columns)))
        for row in ours:
            figures = []
            for column in columns.values():
                work = column.get(row)
                if work is None:
                    figures.append("")
                    continue
                taken = seconds(work, device, 1 if quick else 3) / g
                figures.append(f"{taken:.0f} / {peak_mebibytes(work, device):.0f}")
            print(f"| {row} | " + " | ".join(figures) + " |", flush=True)
        found = top_eigenvalues(operator, 5, generator())
    residuals = ", ".join(f"{r:.0e}" for r in found.residuals / np.abs(found.values))
    print(f"\ntop 5: {found.matvecs} products, residuals over value {residuals}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer seeds and repetitions")
    parser.add_argument("--only", nargs="+", choices=["accuracy", *MODELS], default=["accuracy", *MODELS])
    options = parser.parse_args()
    if "accuracy" in options.only:
        accuracy(options.quick)
    for name in MODELS:
        if name in options.only:
            cost(name, torch.device(options.device), options.quick)


if __name__ == "__main__":
    main()
