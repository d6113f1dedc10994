"""Speed and accuracy of the mean-field and Jacobian engines on one core, against rivals where installed.

Run with `OMP_NUM_THREADS=1 python benchmarks/jacobian_theory.py`. Rivals (freealg, rmtool) are timed if importable.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

import numpy as np

from torch_rmt.theory import Architecture, critical_point, jacobian_spectrum, mean_field
from torch_rmt.theory import moments as cached

POINTS = 1000


def clear() -> None:
    """Forget every moment but the table that an activation gets once, at its first use (about 10 ms)."""
    for function in (cached.second_moment, cached.slope_moment, cached.length_slope):
        function.cache_clear()


def best(work: Callable[[], object], repeats: int = 7) -> float:
    """Fastest of a few runs, in milliseconds."""
    times = []
    for _ in range(repeats):
        clear()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def fuss_catalan(depth: int) -> tuple[np.ndarray, np.ndarray]:
    phi = np.linspace(0, np.pi / (depth + 1), POINTS + 2)[1:-1]
    a, b, c = np.sin(phi), np.sin(depth * phi), np.sin((depth + 1) * phi)
    log_x = (depth + 1) * np.log(c) - np.log(a) - depth * np.log(b)
    return log_x, 2 * np.log(a) + (depth - 1) * np.log(b) - np.log(np.pi) - depth * np.log(c)


def density(architecture: Architecture) -> np.ndarray:
    law = jacobian_spectrum(architecture).measure
    low, high = law.bounds()
    return law.density(np.linspace(max(low, 1e-3 * high), high, POINTS))


def main() -> None:
    print("mean field, one point (ms)")
    for name, sigma_w, sigma_b in (("tanh", 1.5, 0.05), ("tanh", 32.0, 3.0), ("relu", 1.2, 0.1), ("gelu", 1.45, 0.1)):
        q = mean_field(name, sigma_w, sigma_b).q_star
        print(f"  {name:8s} q* = {q:9.3g}  {best(lambda n=name, w=sigma_w, b=sigma_b: mean_field(n, w, b)):7.2f}")
    print(f"Jacobian law, {POINTS} points of the density, from scratch (ms)")
    for name in ("tanh", "erf", "hard_tanh", "relu", "gelu"):
        point = critical_point(name, sigma_b=0.05) if name in ("tanh", "erf", "hard_tanh") else critical_point(name)
        for depth in (8, 128, 8192):
            arch = Architecture.mlp(
                depth=depth, width=500, activation=name, sigma_w=point.sigma_w, sigma_b=point.sigma_b,
                ensemble="orthogonal", q=point.q_star,
            )  # fmt: skip
            print(f"  {name:10s} depth {depth:5d}  {best(lambda a=arch: density(a), 3):8.1f}")
    print("unlike layers: 784-256-256-10 tanh, input moment 0.5 (ms)")
    mlp = Architecture.mlp(
        depth=3, width=256, activation="tanh", sigma_w=1.1, sigma_b=0.05, n_in=784, n_out=10, input_second_moment=0.5
    )
    print(f"  {best(lambda: density(mlp), 3):8.1f}")
    print("linear Gaussian network against the exact Fuss-Catalan density: ms, median and worst relative error")
    for depth in (2, 16, 128, 1024, 8192):
        log_x, log_density = fuss_catalan(depth)
        seen = log_x > -600
        law = jacobian_spectrum(Architecture.mlp(depth=depth, width=500, activation=None, sigma_w=1.0)).measure
        error = np.abs(law.log_density(log_x[seen]) / np.exp(log_density[seen] + log_x[seen]) - 1)
        took = best(lambda d=depth, x=log_x[seen]: jacobian_spectrum(
            Architecture.mlp(depth=d, width=500, activation=None, sigma_w=1.0)).measure.log_density(x), 3)  # fmt: skip
        print(f"  depth {depth:5d}  {took:7.1f}  {np.median(error):.1e}  {error.max():.1e}")
    for rival in ("freealg", "rmtool"):
        if importlib.util.find_spec(rival) is None:
            print(f"{rival}: not installed here; peers.md has its figures")


if __name__ == "__main__":
    main()
