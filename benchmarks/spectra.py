"""Cost of our spectral estimates beside those of the rivals that are installed, as ratios in one run.

    PYTHONPATH=. /path/to/python benchmarks/spectra.py --only mlp [--device cuda] [--quick] [--limit 20]

and `gpt`, `resnet` (on a GPU `large_gpt` too); each takes one to four minutes on an idle core, with a Python that has
curvlinops, hessian-eigenthings and PyHessian. Figures are seconds over the seconds of one gradient (g; CPU time on a
CPU with one thread), and peak memory, on the models of operators.py (ResNet-20 with a quarter of its batch). A call is
stopped after `--limit` seconds, which is then shown as "> ". Accuracy is measured by spectra_accuracy.py.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import resource
import signal
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from operators import MODELS
from torch import Tensor, nn

from torch_rmt.operators import Hessian
from torch_rmt.spectra import SLQ, spectrum_within, top_eigenvalues, trace


class OverLimit(BaseException):
    """A call took too long; no `except Exception` of a rival catches it."""


_TOGETHER = 10  # gradients to a reading of the clock


def seconds(work: Callable[[], object], device: torch.device, limit: int) -> float:
    """One timed call; raises OverLimit after so many seconds (of CPU time where that is what is measured)."""

    def stop(*_: object) -> None:
        raise OverLimit

    timer = (signal.ITIMER_PROF, signal.SIGPROF) if device.type == "cpu" else (signal.ITIMER_REAL, signal.SIGALRM)
    signal.signal(timer[1], stop)
    signal.setitimer(timer[0], limit)
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    try:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    finally:
        signal.setitimer(timer[0], 0)
    return clock() - start


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
            time.sleep(5e-3)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
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
            # It makes `max_iter` products whatever the tolerance: at its default of 10 residuals are 9 to 28 % on the
            # MLP, at 100 the fifth is still above 1e-3, at 200 the largest eigenvalue comes back three times.
            "top 5 to 1e-3": lambda: eigenthings.lanczos(matrix, k=5, tol=1e-3, max_iter=100),
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


def cost(name: str, device: torch.device, quick: bool, limit: int) -> None:
    """Seconds of whole estimates in units of one gradient, and peak memory; the rivals' in the same run."""
    torch.manual_seed(0)
    model, inputs, targets = (part.to(device) for part in MODELS[name](False))
    if name == "resnet":
        inputs, targets = inputs[:32], targets[:32]
    loss = nn.CrossEntropyLoss()
    parameters = list(model.parameters())

    def generator() -> torch.Generator:
        return torch.Generator(device).manual_seed(0)  # 100 million numbers are drawn where they are needed

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):

        def gradients() -> None:
            for _ in range(_TOGETHER):
                torch.autograd.grad(loss(model(inputs), targets), parameters)

        def gradient() -> float:
            """Anew beside every row, several together: the clock under a limit ticks every four milliseconds."""
            return statistics.median(seconds(gradients, device, limit) for _ in range(6)) / _TOGETHER

        operator = Hessian(model, loss, (inputs, targets))
        operator.matmat(torch.ones(operator.shape[0], 1, device=device))  # proves and records its engine
        ours: Row = {
            "SLQ 1 x 30": lambda: SLQ(1, 30)(operator, generator()),
            "the same, operator built anew": lambda: SLQ(1, 30)(Hessian(model, loss, (inputs, targets)), generator()),
            "spectrum within 30 products": lambda: spectrum_within(operator, generator(), matvecs=30),
            "trace, 30 products": lambda: trace(operator, generator(), matvecs=30),
            "top 5 to 1e-3": lambda: top_eigenvalues(operator, 5, generator()),
        }
        if name == "mlp" and not quick:
            ours["SLQ 10 x 80"] = lambda: SLQ(10, 80)(operator, generator())
        columns = {"torch_rmt": ours} | rivals(model, inputs, targets, device)
        print(f"\n{name} on {device}; each figure in gradients, then MiB at the peak\n")
        print("| work | gradient, ms | " + " | ".join(columns) + " |\n|" + "---|" * (2 + len(columns)))
        for row in ours:
            g, figures = gradient(), []
            for column in columns.values():
                work = column.get(row)
                if work is None:
                    figures.append("")
                    continue

                held: list[float] = []

                def measured(work: Callable[[], object] = work, held: list[float] = held) -> None:
                    with contextlib.redirect_stdout(io.StringIO()):
                        held.append(peak_mebibytes(work, device))

                try:
                    times = []
                    for _ in range(1 if quick else 3):
                        gc.collect()  # takes 25 g on the MLP, so not by the clock
                        times.append(seconds(measured, device, limit))
                    figures.append(f"{min(times) / g:.0f} / {held[0]:.0f}")
                except OverLimit:
                    figures.append(f"> {limit / g:.0f}")
                except Exception as problem:  # a rival that fails here must not end the run
                    figures.append(type(problem).__name__)
            print(f"| {row} | {1e3 * g:.2f} | " + " | ".join(figures) + " |", flush=True)
        found = top_eigenvalues(operator, 5, generator())
    residuals = ", ".join(f"{r:.0e}" for r in found.residuals / np.abs(found.values))
    print(f"\ntop 5: {found.matvecs} products, residuals over value {residuals}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="one call each instead of the least of three")
    parser.add_argument("--limit", type=int, default=20, help="seconds for one call")
    parser.add_argument(
        "--only", nargs="+", choices=["mlp", "gpt", "resnet", "large_gpt"], default=["mlp", "gpt", "resnet"]
    )
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # ours measures convolutions in float32; the others then do, too
    for name in options.only:
        cost(name, torch.device(options.device), options.quick, options.limit)


if __name__ == "__main__":
    main()
