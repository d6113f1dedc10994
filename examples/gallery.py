"""Every law of a network, drawn over the spectrum of one network: one figure a law.

Run: python examples/gallery.py [--quick] [--out gallery]. Needs matplotlib (pip install 'torch-rmt[plots]').
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from torch_rmt.measures import PointMass, Semicircle, SpectralMeasure
from torch_rmt.theory import (
    SphericalSpinGlass,
    TracyWidom,
    conjugate_kernel_spectrum,
    deep_fisher_spectrum,
    deep_fisher_statistics,
    fisher_spectrum,
    gradient_norm_law,
    gram_spectrum,
    hessian_spectrum,
    largest_eigenvalue_law,
    neural_tangent_spectrum,
    spike_in_sum,
)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def hidden(n_in: int, n_out: int, samples: int, sigma_w: float, sigma_b: float = 0.0) -> torch.Tensor:
    return torch.tanh(sigma_w * normal(n_out, n_in) / n_in**0.5 @ normal(n_in, samples) + sigma_b * normal(n_out, 1))


@dataclass(frozen=True)
class Figure:
    title: str
    law: Callable[[int], SpectralMeasure]
    draw: Callable[[int], torch.Tensor]


def gram(n: int) -> torch.Tensor:
    y = hidden(n, n, 2 * n, 1.5)
    return torch.linalg.eigvalsh(y @ y.T / y.shape[1])


def gram_with_bias(n: int) -> torch.Tensor:
    y = hidden(n, n, 2 * n, 1.5, 1.0)
    return torch.linalg.eigvalsh(y @ y.T / y.shape[1])[:-1]  # the last is the outlier of the row means


def layers(n: int) -> list[torch.Tensor]:
    x, weights = [normal(2 * n, n)], []
    for _ in range(2):
        weights.append(1.5 * normal(2 * n, 2 * n) / (2 * n) ** 0.5)
        x.append(torch.tanh(weights[-1] @ x[-1]))
    return [*x, *weights]


def conjugate(n: int) -> torch.Tensor:
    x = layers(n)[2]
    return torch.linalg.eigvalsh(x.T @ x / len(x))


def tangent(n: int) -> torch.Tensor:
    x0, x1, x2, _, w2 = layers(n)
    back = (1.5 * normal(2 * n) / (2 * n) ** 0.5)[:, None] * (1.0 - x2**2)
    kernel = x2.T @ x2 + (back.T @ back) * (x1.T @ x1)
    back = (w2.T @ back) * (1.0 - x1**2)
    return torch.linalg.eigvalsh(kernel + (back.T @ back) * (x0.T @ x0))


def hessian(n: int) -> torch.Tensor:
    dim, samples = 2 * n, 4 * n
    j = normal(dim, samples)
    matrix = j @ j.T / samples
    block = 0.8**0.5 * normal(n, samples // 2) @ normal(n, samples // 2).T / samples
    matrix[:n, n:] += block
    matrix[n:, :n] += block.T
    return torch.linalg.eigvalsh(matrix)


def wigner(n: int, variance: float = 1.0) -> torch.Tensor:
    noise = normal(n, n)
    return (noise + noise.T) * (variance / (2 * n)) ** 0.5


def hessian_wigner(n: int) -> torch.Tensor:
    j = normal(2 * n, 4 * n)
    return torch.linalg.eigvalsh(j @ j.T / (4 * n) + wigner(2 * n, 0.8))


def fisher(n: int) -> torch.Tensor:
    n = max(6, n // 8)
    first, second, x = normal(n, n) / n**0.5, normal(n, n) / n**0.5, normal(40 * n, n)
    y = torch.tanh(x @ first.T)
    rows = [
        torch.cat([torch.einsum("oi,si,sa->soia", second, 1 - y**2, x).reshape(len(x) * n, n * n)], 1),
        torch.einsum("op,sj->sopj", torch.eye(n, dtype=torch.float64), y).reshape(len(x) * n, n * n),
    ]
    jacobian = torch.cat(rows, 1)
    return torch.linalg.eigvalsh(jacobian.T @ jacobian / len(x))


def deep_fisher(n: int) -> torch.Tensor:
    x, theta, slope = normal(n), torch.zeros(n, n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    x = x / x.norm() * n**0.5
    for _ in range(3):
        w = 2.0**0.5 * normal(n, n) / n**0.5
        theta = x @ x / n * torch.eye(n, dtype=torch.float64) + w @ (slope[:, None] * theta * slope[None, :]) @ w.T
        h = w @ x
        x, slope = torch.relu(h), (h > 0).double()
    return torch.linalg.eigvalsh(theta)


def deep_fisher_orthogonal(n: int) -> torch.Tensor:
    x, theta, slope = normal(n), torch.zeros(n, n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    x = x / x.norm() * n**0.5
    for _ in range(3):
        w = 1.3 * torch.nn.init.orthogonal_(torch.empty(n, n, dtype=torch.float64))
        theta = x @ x / n * torch.eye(n, dtype=torch.float64) + w @ (slope[:, None] * theta * slope[None, :]) @ w.T
        x = torch.tanh(w @ x)
        slope = 1.0 - x**2
    return torch.linalg.eigvalsh(theta)


def spin_glass(n: int) -> torch.Tensor:
    coupling, x = normal(n, n, n) / n, normal(n)
    x = x / x.norm() * n**0.5
    half = sum(torch.einsum("aij,a->ij", coupling.permute(*order), x) for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1)))
    basis = torch.linalg.svd(x[None, :])[2][1:].T
    return torch.linalg.eigvalsh(basis.T @ (half + half.T) @ basis)


FIGURES: dict[str, Figure] = {
    "gram": Figure(
        "Gram matrix, tanh",
        lambda n: gram_spectrum("tanh", n_in=n, n_out=n, n_samples=2 * n, sigma_w=1.5).measure,
        gram,
    ),
    "gram_bias": Figure(
        "Gram matrix with biases",
        lambda n: gram_spectrum("tanh", n_in=n, n_out=n, n_samples=2 * n, sigma_w=1.5, sigma_b=1.0).measure,
        gram_with_bias,
    ),
    "conjugate_kernel": Figure(
        "Conjugate kernel of the second layer",
        lambda n: conjugate_kernel_spectrum("tanh", widths=(2 * n,) * 3, n_samples=n, sigma_w=1.5)[-1].measure,
        conjugate,
    ),
    "tangent_kernel": Figure(
        "Neural tangent kernel",
        lambda n: neural_tangent_spectrum("tanh", widths=(2 * n,) * 3, n_samples=n, sigma_w=1.5).measure,
        tangent,
    ),
    "hessian": Figure(
        "Hessian, one hidden ReLU layer", lambda n: hessian_spectrum(phi=0.5, energy=0.4).measure, hessian
    ),
    "hessian_wigner": Figure(
        "Hessian, Wigner residual part",
        lambda n: hessian_spectrum(phi=0.5, energy=0.4, residual="wigner").measure,
        hessian_wigner,
    ),
    "fisher": Figure("Fisher matrix, one hidden tanh layer", lambda n: fisher_spectrum("tanh").measure, fisher),
    "deep_fisher": Figure(
        "Fisher matrix of one sample, three ReLU layers",
        lambda n: deep_fisher_spectrum("relu", depth=3, width=n, sigma_w=2.0**0.5).measure,
        deep_fisher,
    ),
    "deep_fisher_orthogonal": Figure(
        "Fisher matrix of one sample, three orthogonal tanh layers",
        lambda n: deep_fisher_spectrum("tanh", depth=3, width=n, sigma_w=1.3, ensemble="orthogonal").measure,
        deep_fisher_orthogonal,
    ),
    "spin_glass": Figure("Hessian of a cubic spin glass", lambda n: SphericalSpinGlass(3).hessian_law(0.0), spin_glass),
}


def density_figure(figure: Figure, n: int, path: Path) -> None:
    law, values = figure.law(n), figure.draw(n).numpy()
    place = [at for at, _ in law.atoms()]
    scale = np.ptp(values)
    loose = (
        np.all([np.abs(values - at) > 1e-3 * scale for at in place], axis=0) if place else np.full(values.shape, True)
    )
    fig, ax = plt.subplots(figsize=(6, 3.5))
    ax.hist(values[loose], bins=40, weights=np.full(loose.sum(), 1.0 / len(values)) / 1.0, color="0.8", label="drawn")
    width = np.diff(np.histogram_bin_edges(values[loose], bins=40))[0]
    for k, (low, high) in enumerate(law.support()):
        x = 0.5 * (low + high) - 0.5 * (high - low) * np.cos(np.linspace(0.01, np.pi - 0.01, 400))
        ax.plot(x, law.density(x) * width, color="C0", label="predicted" if k == 0 else None)
    ax.set_title(figure.title + "".join(f"; atom of {mass:.2g} at {at:.3g}" for at, mass in law.atoms()), fontsize=9)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("fraction in a bin")
    ax.set_ylim(top=1.6 * np.histogram(values[loose], bins=40)[0].max() / len(values))
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def gradient_figure(n: int, draws: int, path: Path) -> None:
    widths = [n] * 11
    law = gradient_norm_law(widths, "relu")
    u = torch.randn(draws, n)
    u, x = u / u.norm(dim=1, keepdim=True), torch.randn(draws, n)
    for _ in range(10):
        w = (2.0 / n) ** 0.5 * torch.randn(draws, n, n)
        h = torch.einsum("rba,ra->rb", w, x)
        u, x = torch.einsum("rba,ra->rb", w, u) * (h > 0), torch.relu(h)
    values = torch.log((u**2).sum(dim=1)).numpy()
    fig, ax = plt.subplots(figsize=(6, 3.5))
    ax.hist(values, bins=40, density=True, color="0.8", label="drawn")
    y = np.linspace(values.min(), values.max(), 300)
    ax.plot(y, np.gradient(law.log_cdf(y), y), label="predicted")
    ax.set_title(law.statement(), fontsize=8)
    ax.set_xlabel("log squared gradient norm")
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def largest_eigenvalue_figure(n: int, draws: int, path: Path) -> None:
    law = largest_eigenvalue_law(hessian_spectrum(phi=0.5, energy=0.4, residual="wigner").measure, 2 * n)
    tops = np.array([float(hessian_wigner(n)[-1]) for _ in range(draws)])
    fig, ax = plt.subplots(figsize=(6, 3.5))
    ax.hist((tops - law.edge) / law.scale, bins=20, density=True, color="0.8", label="drawn")
    s = np.linspace(-5.0, 4.0, 200)
    ax.plot(s, TracyWidom().density(s), label="Tracy-Widom, real")
    ax.set_title("Largest eigenvalue of the Hessian, from the edge in units of its scale", fontsize=9)
    ax.set_xlabel("(largest eigenvalue - edge) / scale")
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def spike_figure(n: int, path: Path) -> None:
    strengths = np.linspace(0.2, 3.0, 15)
    fine = np.linspace(0.1, 3.0, 100)
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.5))
    drawn = []
    for theta in strengths:
        matrix = wigner(n)
        matrix[0, 0] += theta
        values, vectors = torch.linalg.eigh(matrix)
        drawn.append((float(values[-1]), float(vectors[0, -1] ** 2)))
    law = [spike_in_sum(PointMass(0.0), Semicircle(), float(theta)) for theta in fine]
    predicted = [[found.position for found in law], [found.overlap for found in law]]
    for ax, k, label in zip(axes, (0, 1), ("largest eigenvalue", "overlap of its eigenvector"), strict=True):
        ax.plot(strengths, [pair[k] for pair in drawn], "o", color="0.6", label="drawn")
        ax.plot(fine, predicted[k], label="predicted")
        ax.set_xlabel("strength of the spike")
        ax.set_ylabel(label)
        ax.legend()
    fig.suptitle("A spike in Wigner noise")
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def drawn_statistics(width: int, samples: int) -> list[float]:
    """Mean, second moment and largest eigenvalue of the Fisher matrix of one drawn network, from its dual."""
    weights = [1.4 * normal(width, width) / width**0.5 for _ in range(3)]
    weights.append(1.4 * normal(1, width) / width**0.5)
    biases = [0.5 * normal(len(weight), 1) for weight in weights]
    x = normal(width, samples)
    inputs, slopes = [x / (x**2).mean(dim=0).sqrt()], []
    for weight, bias in zip(weights[:-1], biases, strict=False):
        inputs.append(torch.tanh(weight @ inputs[-1] + bias))
        slopes.append(1.0 - inputs[-1] ** 2)
    back, dual = torch.ones(1, samples, dtype=torch.float64), torch.zeros(samples, samples, dtype=torch.float64)
    for k in range(3, -1, -1):
        dual += (back.T @ back) * (inputs[k].T @ inputs[k] + 1.0)
        if k:
            back = (weights[k].T @ back) * slopes[k - 1]
    parameters = sum(weight.numel() + len(weight) for weight in weights)
    values = torch.linalg.eigvalsh(dual / samples)
    return [float(values.sum()) / parameters, float((values**2).sum()) / parameters, float(values[-1])]


def statistics_figure(widths: list[int], draws: int, path: Path) -> None:
    samples = 20
    stated = [
        deep_fisher_statistics("tanh", widths=(n, n, n, n, 1), n_samples=samples, sigma_w=1.4, sigma_b=0.5)
        for n in widths
    ]
    drawn = np.array([[drawn_statistics(n, samples) for _ in range(draws)] for n in widths])
    predicted = [(law.mean, law.second_moment, law.largest_eigenvalue) for law in stated]
    fig, axes = plt.subplots(1, 3, figsize=(10, 3.2))
    for k, label in enumerate(("mean eigenvalue", "mean square eigenvalue", "largest eigenvalue")):
        axes[k].errorbar(
            widths, drawn[:, :, k].mean(axis=1), drawn[:, :, k].std(axis=1), fmt="o", color="0.5", label="drawn"
        )
        axes[k].plot(widths, [law[k] for law in predicted], label="predicted")
        axes[k].set(xlabel="width", ylabel=label, xscale="log", yscale="log")
        axes[k].minorticks_off()
        axes[k].set_xticks(widths, [str(n) for n in widths])
        axes[k].legend()
    rate = ", ".join(f"{law.max_stable_lr:.2g}" for law in stated)
    fig.suptitle(f"Fisher matrix of four tanh layers with biases, 20 samples; learning-rate bounds {rate}", fontsize=9)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def complexity_figure(path: Path) -> None:
    glass = SphericalSpinGlass(3)
    u = np.linspace(-1.02 * glass.ground_state_energy, -0.97 * glass.threshold_energy, 300)
    fig, ax = plt.subplots(figsize=(6, 3.5))
    for index in range(4):
        ax.plot(u, glass.complexity(u, index=index), label=f"index {index}")
    ax.plot(u, glass.complexity(u), "k--", label="all")
    for low, _, _ in glass.bands(4):
        ax.axvline(low, color="0.85", zorder=0)
    ax.axvline(-glass.threshold_energy, color="0.5", zorder=0)
    ax.axhline(0.0, color="0.5", linewidth=0.5)
    ax.set_title("Cubic spin glass: critical points by index; bands between -E_0 and -E_inf", fontsize=9)
    ax.set_xlabel("energy per spin")
    ax.set_ylabel("complexity")
    ax.set_ylim(bottom=-0.02)
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(arguments: list[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small matrices: for the tests")
    parser.add_argument("--out", type=Path, default=Path("gallery"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    n = 40 if options.quick else 160
    written = []
    for name, figure in FIGURES.items():
        written.append(options.out / f"{name}.png")
        density_figure(figure, n, written[-1])
    written.append(options.out / "gradient_norm.png")
    gradient_figure(20 if options.quick else 60, 300 if options.quick else 2000, written[-1])
    for name in ("largest_eigenvalue", "spike", "spin_glass_complexity"):
        written.append(options.out / f"{name}.png")
    largest_eigenvalue_figure(20 if options.quick else 40, 60 if options.quick else 600, written[-3])
    spike_figure(60 if options.quick else 400, written[-2])
    complexity_figure(written[-1])
    written.append(options.out / "deep_fisher_statistics.png")
    statistics_figure(
        [16, 32, 64] if options.quick else [25, 50, 100, 200, 400], 4 if options.quick else 40, written[-1]
    )
    print("\n".join(str(path) for path in written))
    return written


if __name__ == "__main__":
    main()
