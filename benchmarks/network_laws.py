"""CPU time of every prediction: building it and evaluating density and distribution function at 1,000 points.

Run: python benchmarks/network_laws.py [--repeats 5]. The aim is 100 ms on one core (with bias 200 ms).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

from torch_rmt.theory import (
    Prediction,
    SphericalSpinGlass,
    TracyWidom,
    conjugate_kernel_spectrum,
    deep_fisher_spectrum,
    fisher_spectrum,
    gradient_norm_law,
    gram_spectrum,
    hessian_spectrum,
    neural_tangent_spectrum,
)

LAWS: dict[str, Callable[[], Prediction]] = {
    "gram": lambda: gram_spectrum("tanh", n_in=300, n_out=200, n_samples=400),
    "gram, bias": lambda: gram_spectrum("tanh", n_in=300, n_out=200, n_samples=400, sigma_b=0.5),
    "conjugate kernel, layer 1": lambda: conjugate_kernel_spectrum("tanh", widths=(300, 200), n_samples=150)[-1],
    "tangent kernel, 2 layers": lambda: neural_tangent_spectrum("tanh", widths=(300, 400, 300), n_samples=150),
    "hessian, relu": lambda: hessian_spectrum(phi=0.5, energy=0.3),
    "hessian, wigner": lambda: hessian_spectrum(phi=0.5, energy=0.3, residual="wigner"),
    "fisher": lambda: fisher_spectrum("tanh"),
    "deep fisher, gaussian": lambda: deep_fisher_spectrum("relu", depth=3, width=300, sigma_w=2.0**0.5),
    "deep fisher, orthogonal": lambda: deep_fisher_spectrum(
        "tanh", depth=3, width=300, sigma_w=1.2, sigma_b=0.1, ensemble="orthogonal"
    ),
    "deep fisher, orthogonal gelu": lambda: deep_fisher_spectrum(
        "gelu", depth=3, width=300, sigma_w=1.4, sigma_b=0.1, ensemble="orthogonal"
    ),
    "deep fisher, orthogonal leaky relu": lambda: deep_fisher_spectrum(
        "leaky_relu", depth=3, width=300, sigma_w=1.4, sigma_b=0.1, ensemble="orthogonal"
    ),
}

NUMBERS: dict[str, Callable[[], object]] = {
    "gradient norm, relu, 100 layers": lambda: gradient_norm_law([1000] * 101, "relu"),
    "gradient norm, relu, orthogonal, band": lambda: gradient_norm_law([50] * 21, "relu", ensemble="orthogonal").band(),
    "gradient norm, relu, band": lambda: gradient_norm_law([50] * 21, "relu").band(),
    "gradient norm, tanh, 100 layers": lambda: gradient_norm_law([1000] * 101, "tanh", q=0.5),
    "gradient norm, tanh, 2000 draws": lambda: gradient_norm_law([100] * 11, "tanh", q=0.5, draws=2000),
    "spin glass": lambda: SphericalSpinGlass(3).bands(10),
    "Tracy-Widom quantile": lambda: TracyWidom().quantile(np.array(0.95)),
}


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1e3 * float(np.median(times))


def whole(make: Callable[[], Prediction]) -> Callable[[], object]:
    def work() -> object:
        law = make().measure
        x = np.linspace(*law.bounds(), 1000)
        return law.density(x), law.cdf(x)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    result = {name: milliseconds(whole(make), repeats) for name, make in LAWS.items()}
    result |= {name: milliseconds(work, repeats) for name, work in NUMBERS.items()}
    print(json.dumps({name: round(value, 1) for name, value in result.items()}, indent=2))


if __name__ == "__main__":
    main()
