"""Densities of free convolutions at 1,000 points: time and error beside freealg and rmtool, in one run.

Run: python benchmarks/free_probability.py [--repeats 5] [--lilypads FOLDER], with freealg and rmtool (PyPI) installed
or not; FOLDER is a checkout of FreeNN, which is on no registry (its scripts need click). CPU time. The reference of
each row is known without any of the rivals: a closed form, or the mass of the density.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Callable
from types import ModuleType

import numpy as np

from torch_rmt.measures import (
    Discrete,
    FussCatalan,
    GaussianPushforward,
    MarchenkoPastur,
    Semicircle,
    SpectralMeasure,
    free_add,
    free_mul,
    free_power,
)
from torch_rmt.theory import Architecture, jacobian_spectrum

POINTS = 1000


def optional(name: str) -> ModuleType | None:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def timed(work: Callable[[], np.ndarray], repeats: int) -> tuple[float, np.ndarray]:
    """Best time in milliseconds and the result."""
    best, result = np.inf, np.zeros(0)
    for _ in range(repeats):
        start = time.process_time()
        result = np.asarray(work())
        best = min(best, 1e3 * (time.process_time() - start))
    return best, result


def line(name: str, ours: tuple[float, np.ndarray], theirs: tuple[float, np.ndarray], truth: np.ndarray) -> None:
    """One row: times, ratio, median relative errors."""

    def error(values: np.ndarray) -> float:
        return float(np.median(np.abs(values - truth) / np.abs(truth)))

    ratio = theirs[0] / ours[0]
    mine = f"{ours[0]:8.1f} ms {error(ours[1]):8.0e}"
    print(f"{name:42} {mine}   {theirs[0]:9.1f} ms {error(theirs[1]):8.0e}   {ratio:7.1f} x")


def against_freealg(freealg: ModuleType, repeats: int) -> None:
    """Fuss-Catalan laws, and ours by the general multiplicative solver, not by the formula."""
    for order in (2, 3, 7):
        law = FussCatalan(order)
        x = law.bounds()[1] * np.linspace(0.005, 0.99, POINTS)
        theirs = freealg.distributions.FussCatalan(order + 1)
        rival = timed(lambda x=x, theirs=theirs: np.ravel(theirs.density(x)), repeats)
        closed = timed(lambda x=x, order=order: FussCatalan(order).density(x), repeats)
        general = timed(lambda x=x, order=order: free_power(MarchenkoPastur(1.0), order).density(x), repeats)
        line(f"Fuss-Catalan {order}, formula | freealg", closed, rival, law.density(x))
        line(f"Fuss-Catalan {order}, free_power | freealg", general, rival, law.density(x))


def against_rmtool(rmtool: ModuleType, repeats: int) -> None:
    """Two points plus a semicircle: a cubic, which rmtool solves without help; so does the reference."""
    import sympy

    half = sympy.Rational(1, 2)
    x = np.linspace(-2.0, 2.0, POINTS) + 1e-4
    polynomial = rmtool.AplusB(rmtool.atomLmz([-1, 1], [half, half]), rmtool.wignerpol())
    rival = timed(lambda: rmtool.Lmz2pdf(polynomial, x).density, 1)
    ours = timed(lambda: free_add(Discrete([-1.0, 1.0]), Semicircle()).density(x), repeats)
    # G solves G^3 - 2 x G^2 + x^2 G - x = 0 for atoms at -1 and 1 and variance 1
    truth = np.array([np.max(np.roots([1, -2 * t, t * t, -t]).imag) / np.pi for t in x])
    line("two points + semicircle | rmtool", ours, rival, truth)


def against_lilypads(folder: str, repeats: int) -> None:
    """Linear Gaussian networks by Newton lilypads, down to a height of 1e-4; ours by the solver of deep Jacobians."""
    sys.path.insert(0, folder)
    lilypads = importlib.import_module("experiments.newton_lilypads")
    for depth in (2, 4, 8, 16):
        law = FussCatalan(depth)
        low, high = 0.005 * law.bounds()[1], 0.99 * law.bounds()[1]
        x = np.linspace(low, high, POINTS)
        network = Architecture.mlp(depth=depth, width=500, activation=None, sigma_w=1.0)
        ours = timed(lambda x=x, network=network: jacobian_spectrum(network).measure.density(x), repeats)
        ones, window = [1.0] * depth, (low, high)
        rival = timed(
            lambda ones=ones, window=window: lilypads.run_as_module(
                ones, ones, interval=window, N=POINTS, ignoreNonLinearity=True
            )["density"],
            1,
        )
        line(f"{depth} Gaussian layers, network law | lilypads", ours, rival, law.density(x))


def alone(repeats: int) -> None:
    """What no other library answers: the time of the density, and of support and 300 quantiles from scratch."""
    generator = np.random.default_rng(0)
    cases: dict[str, Callable[[], SpectralMeasure]] = {
        "1,000 measured points + semicircle": lambda: free_add(Discrete(nodes), Semicircle(0.1)),
        "1,000 measured points x Marchenko-Pastur": lambda: free_mul(Discrete(nodes**2), MarchenkoPastur(0.5)),
        "tanh' squared x Marchenko-Pastur, 64 layers": lambda: free_power(
            free_mul(GaussianPushforward(lambda h: np.cosh(h) ** -4.0, 0.1), MarchenkoPastur(1.0)), 64
        ),
    }
    nodes = generator.standard_normal(1000)
    for name, make in cases.items():
        low, high = make().quantile(np.array([0.01, 0.99]))
        x = np.linspace(low, high, POINTS)
        density, _ = timed(lambda make=make, x=x: make().density(x), repeats)
        levels = np.linspace(0.005, 0.995, 300)
        quantiles, _ = timed(lambda make=make, levels=levels: make().quantile(levels), repeats)
        print(f"{name:46} density {density:8.1f} ms   support and 300 quantiles {quantiles:8.1f} ms")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lilypads", metavar="FOLDER", help="a checkout of FreeNN")
    arguments = parser.parse_args()
    repeats = arguments.repeats
    warnings.simplefilter("ignore")
    print(f"{'density at 1,000 points':42} {'torch_rmt':>11} {'error':>8}   {'rival':>12} {'error':>8}   ratio")
    rivals = {"freealg": against_freealg, "rmtool": against_rmtool}
    for name, compare in rivals.items():
        module = optional(name)
        if module is None:
            print(f"{name}: not installed")
        else:
            compare(module, repeats)
    if arguments.lilypads is None:
        print("lilypads: no --lilypads FOLDER was given")
    else:
        against_lilypads(arguments.lilypads, repeats)
    alone(repeats)


if __name__ == "__main__":
    main()
