"""The networks and matrices that the predictions are about, drawn by torch at a given size."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from torch_rmt.measures import PointMass
from torch_rmt.theory import (
    Architecture,
    Layer,
    Prediction,
    Residual,
    SphericalSpinGlass,
    as_activation,
    conjugate_kernel_spectrum,
    deep_fisher_spectrum,
    fisher_spectrum,
    gram_spectrum,
    hessian_spectrum,
    jacobian_spectrum,
    neural_tangent_spectrum,
)

TORCH_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "linear": lambda h: 1.0 * h,
    "abs": torch.abs,
    "hard_tanh": torch.nn.functional.hardtanh,
    "hard_sigmoid": torch.nn.functional.hardsigmoid,
}


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def spread(count: int) -> torch.Tensor:
    """The quantiles of N(0, 1): biases without the noise of drawing them, which would hide the rate."""
    p = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.special.ndtri(p)


@dataclass(frozen=True)
class GramCase:
    activation: str
    shape: tuple[float, float, float]
    sigma_w: float = 1.0
    sigma_x: float = 1.0
    sigma_b: float = 0.0

    def sizes(self, n: int) -> dict[str, int]:
        return {key: round(n * part) for key, part in zip(("n_in", "n_out", "n_samples"), self.shape, strict=True)}

    def predict(self, n: int) -> Prediction:
        return gram_spectrum(
            self.activation, **self.sizes(n), sigma_w=self.sigma_w, sigma_x=self.sigma_x, sigma_b=self.sigma_b
        )

    def matrix(self, n: int, generator: torch.Generator, *, centred: bool = True) -> torch.Tensor:
        """Y Y^T / m, each row less the mean that its bias gives it, or (not centred) as it is."""
        size = self.sizes(n)
        bias = self.sigma_b * spread(size["n_out"])[:, None]
        h = self.sigma_w * normal(generator, size["n_out"], size["n_in"]) / size["n_in"] ** 0.5
        h = h @ (self.sigma_x * normal(generator, size["n_in"], size["n_samples"]))
        phi = TORCH_ACTIVATIONS[self.activation]
        y = phi(h + bias)
        if centred:
            nodes, weights = np.polynomial.hermite_e.hermegauss(120)
            g = torch.as_tensor(self.sigma_w * self.sigma_x * nodes)
            y = y - (phi(g + bias) @ torch.as_tensor(weights / weights.sum()))[:, None]
        return y @ y.T / y.shape[1]

    def draw(self, n: int, generator: torch.Generator) -> np.ndarray:
        return torch.linalg.eigvalsh(self.matrix(n, generator)).numpy()


def kernels(
    activation: str,
    widths: tuple[int, ...],
    samples: int,
    sigma_w: float,
    generator: torch.Generator,
    outputs: int = 1,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Conjugate kernels of all layers and the tangent kernel, for inputs drawn independently; activation odd."""
    phi = TORCH_ACTIVATIONS[activation]
    x = [normal(generator, widths[0], samples)]
    weights, slopes = [], []
    for n_in, n_out in itertools.pairwise(widths):
        w = sigma_w * normal(generator, n_out, n_in) / n_in**0.5
        h = (w @ x[-1]).requires_grad_(True)
        y = phi(h)
        (slope,) = torch.autograd.grad(y.sum(), h)
        weights.append(w)
        slopes.append(slope)
        x.append(y.detach())
    top = x[-1].T @ x[-1]
    tangent = torch.kron(torch.eye(outputs, dtype=torch.float64), top)
    # one column a pair of output and sample
    delta = (sigma_w * normal(generator, widths[-1], outputs) / widths[-1] ** 0.5)[:, :, None] * slopes[-1][:, None, :]
    for k in range(len(weights) - 1, -1, -1):
        back, gram = delta.reshape(len(delta), -1), x[k].T @ x[k]
        tangent = tangent + (back.T @ back) * gram.repeat(outputs, outputs)
        if k > 0:
            delta = (weights[k].T @ back).reshape(-1, outputs, samples) * slopes[k - 1][:, None, :]
    conjugate = [torch.linalg.eigvalsh(layer.T @ layer / layer.shape[0]).numpy() for layer in x]
    return conjugate, torch.linalg.eigvalsh(tangent).numpy()


@dataclass(frozen=True)
class KernelCase:
    activation: str
    shape: tuple[float, ...]
    samples: float
    sigma_w: float
    tangent: bool = False
    outputs: int = 1

    def widths(self, n: int) -> tuple[int, ...]:
        return tuple(round(n * part) for part in self.shape)

    def predict(self, n: int) -> Prediction:
        settings = {"widths": self.widths(n), "n_samples": round(n * self.samples), "sigma_w": self.sigma_w}
        if self.tangent:
            return neural_tangent_spectrum(self.activation, **settings, n_outputs=self.outputs)
        return conjugate_kernel_spectrum(self.activation, **settings)[-1]

    def draw(self, n: int, generator: torch.Generator) -> np.ndarray:
        conjugate, tangent = kernels(
            self.activation, self.widths(n), round(n * self.samples), self.sigma_w, generator, self.outputs
        )
        return tangent if self.tangent else conjugate[-1]


@dataclass(frozen=True)
class HessianCase:
    phi: float
    energy: float
    residual: str

    def predict(self, n: int) -> Prediction:
        return hessian_spectrum(phi=self.phi, energy=self.energy, residual=self.residual, dim=2 * n)

    def draw(self, n: int, generator: torch.Generator) -> np.ndarray:
        """Wishart H0 plus H1: one hidden unit's block of the sum over samples of error x input, or a Wigner matrix."""
        dim, samples = 2 * n, round(2 * n / self.phi)
        jacobian = normal(generator, dim, samples)
        hessian = jacobian @ jacobian.T / samples
        if self.residual == "wigner":
            noise = normal(generator, dim, dim)
            hessian = hessian + (noise + noise.T) * (self.energy / dim) ** 0.5
        else:
            # phi = 2 n / m; a ReLU unit is active on half of the m samples
            error = (2.0 * self.energy) ** 0.5 * normal(generator, n, samples // 2)
            block = error @ normal(generator, n, samples // 2).T / samples
            hessian[:n, n:] += block
            hessian[n:, :n] += block.T
        return torch.linalg.eigvalsh(hessian).numpy()


@dataclass(frozen=True)
class FisherCase:
    activation: str

    def predict(self, n: int) -> Prediction:
        return fisher_spectrum(self.activation, width=n)

    def draw(self, n: int, generator: torch.Generator) -> np.ndarray:
        """The whole (2 n^2, 2 n^2) matrix, mean over 40 n^2 inputs, the activation centred."""
        samples = 40 * n * n
        first, second = normal(generator, n, n) / n**0.5, normal(generator, n, n) / n**0.5
        x = normal(generator, samples, n)
        h = (x @ first.T).requires_grad_(True)
        y = TORCH_ACTIVATIONS[self.activation](h)
        (slope,) = torch.autograd.grad(y.sum(), h)
        y = y.detach() - y.detach().mean()
        outer = (slope[:, :, None] * x[:, None, :]).reshape(samples, n * n)
        weights = (second.T @ second)[:, None, :, None]
        hidden = ((outer.T @ outer / samples).reshape(n, n, n, n) * weights).reshape(n * n, n * n)
        output = torch.kron(torch.eye(n, dtype=torch.float64), y.T @ y / samples)
        cross = torch.einsum("oi,iaj->iaoj", second, (outer.T @ y / samples).reshape(n, n, n)).reshape(n * n, n * n)
        fisher = torch.cat([torch.cat([hidden, cross], 1), torch.cat([cross.T, output], 1)], 0)
        return torch.linalg.eigvalsh(fisher).numpy()


def deep_theta(
    activation: str, depth: int, n: int, sigma_w: float, ensemble: str, generator: torch.Generator
) -> tuple[np.ndarray, list[float], list[torch.Tensor]]:
    """Eigenvalues of J J^T / n by the chain rule, with the drawn |x|^2/n and D^2 of every layer."""
    x = normal(generator, n)
    x = x / x.norm() * n**0.5
    theta, seconds, slopes2 = torch.zeros(n, n, dtype=torch.float64), [], []
    for _ in range(depth):
        weight = normal(generator, n, n) / n**0.5
        if ensemble == "orthogonal":
            q, r = torch.linalg.qr(weight)
            weight = q * torch.sign(torch.diagonal(r))
        weight = sigma_w * weight
        seconds.append(float(x @ x) / n)
        if slopes2:
            root = slopes2[-1].sqrt()
            theta = weight @ (root[:, None] * theta * root[None, :]) @ weight.T
        theta = theta + seconds[-1] * torch.eye(n, dtype=torch.float64)
        h = (weight @ x).requires_grad_(True)
        y = TORCH_ACTIVATIONS[activation](h)
        (slope,) = torch.autograd.grad(y.sum(), h)
        slopes2.append(slope**2)
        x = y.detach()
    return torch.linalg.eigvalsh(theta).numpy(), seconds, slopes2


@dataclass(frozen=True)
class DeepFisherCase:
    activation: str
    depth: int
    sigma_w: float
    ensemble: str = "gaussian"

    def predict(self, n: int) -> Prediction:
        return deep_fisher_spectrum(
            self.activation, depth=self.depth, width=n, sigma_w=self.sigma_w, ensemble=self.ensemble
        )

    def draw(self, n: int, generator: torch.Generator) -> np.ndarray:
        return deep_theta(self.activation, self.depth, n, self.sigma_w, self.ensemble, generator)[0]


@dataclass(frozen=True)
class SpinGlassCase:
    """The Riemannian Hessian of a cubic form at a random point of the sphere."""

    def predict(self, n: int) -> Prediction:
        return SphericalSpinGlass(3).hessian_spectrum(0.0, dim=n - 1)

    def draw(self, n: int, generator: torch.Generator) -> np.ndarray:
        coupling = normal(generator, n, n, n) / n
        x = normal(generator, n)
        x = x / x.norm() * n**0.5
        cubic = sum(coupling.permute(*order) for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1)))
        hessian = torch.einsum("aij,a->ij", cubic, x)
        hessian = hessian + hessian.T
        # the second fundamental form subtracts p H / N; adding it back centres the law at the energy of this point
        basis = torch.linalg.svd(x[None, :])[2][1:].T
        return torch.linalg.eigvalsh(basis.T @ hessian @ basis).numpy()


@dataclass(frozen=True)
class ResidualCase:
    """J^T J of a chain of blocks x + W_2 phi(W_1 x / |x|)."""

    activation: str
    depth: int
    scale: float

    def predict(self, n: int) -> Prediction:
        norm = Layer(n, n, None, 1.0, ensemble=PointMass(1.0), normalisation="rms")
        inner = Layer(n, n, as_activation(self.activation), 1.0)
        block = Residual((norm, inner, Layer(n, n, None, self.scale)))
        return jacobian_spectrum(Architecture((block,) * self.depth, input_second_moment=1.0))

    def draw(self, n: int, generator: torch.Generator) -> np.ndarray:
        x, jacobian = normal(generator, n), torch.eye(n, dtype=torch.float64)
        x = x / x.pow(2).mean() ** 0.5
        for _ in range(self.depth):
            root = x.pow(2).mean() ** 0.5
            first, second = normal(generator, n, n) / n**0.5, self.scale * normal(generator, n, n) / n**0.5
            h = (first @ x / root).requires_grad_(True)
            y = TORCH_ACTIVATIONS[self.activation](h)
            (slope,) = torch.autograd.grad(y.sum(), h)
            jacobian = jacobian + second @ (slope[:, None] * (first @ jacobian)) / root
            x = x + second @ y.detach()
        return torch.linalg.svdvals(jacobian).flip(0).numpy() ** 2


@dataclass(frozen=True)
class PredictionRow:
    """A prediction, the thing itself, three sizes, seeds a size, and the exponent at which W1 falls with the size."""

    case: GramCase | KernelCase | HessianCase | FisherCase | DeepFisherCase | SpinGlassCase | ResidualCase
    sizes: tuple[int, int, int] = (40, 80, 160)
    seeds: int = 4
    rate: float = 1.0
    #: W1, in units of the law's root mean square, times size^rate stays below this; measured, and half as much again
    constant: float = 1.0
    #: whether the law depends on the ratios of the sizes alone
    same_law: bool = True


PREDICTIONS: dict[str, PredictionRow] = {
    "gram tanh": PredictionRow(GramCase("tanh", (1.5, 1.0, 2.0), sigma_w=1.5), constant=2.5),
    "gram relu wide": PredictionRow(GramCase("relu", (1.0, 2.0, 0.8), sigma_x=1.3), constant=2.5),
    "gram gelu two bands": PredictionRow(GramCase("gelu", (0.25, 1.0, 4.0)), sizes=(120, 240, 480), constant=8.0),
    "gram linear": PredictionRow(GramCase("linear", (1.0, 1.5, 2.0)), constant=2.5),
    "gram even": PredictionRow(GramCase("abs", (1.0, 1.0, 1.5)), constant=5.0),
    "gram tanh with bias": PredictionRow(GramCase("tanh", (1.5, 1.0, 2.0), sigma_w=1.5, sigma_b=1.0), constant=2.5),
    "gram relu with bias": PredictionRow(GramCase("relu", (1.0, 1.5, 1.0), sigma_b=0.7), constant=2.7),
    "conjugate kernel, 1 layer": PredictionRow(KernelCase("tanh", (2.0, 1.5), 1.0, 1.5), constant=2.6),
    "conjugate kernel, 3 layers": PredictionRow(KernelCase("tanh", (2.0, 3.0, 1.5, 2.5), 1.0, 1.5), constant=2.6),
    "conjugate kernel, deficient": PredictionRow(KernelCase("tanh", (1.0, 2.0, 0.5), 1.0, 1.2), constant=3.5),
    "tangent kernel": PredictionRow(
        KernelCase("tanh", (2.0, 2.5, 3.0), 1.0, 1.3, tangent=True), seeds=16, rate=0.5, constant=0.62, same_law=False
    ),
    "tangent kernel, 3 outputs": PredictionRow(
        KernelCase("tanh", (2.0, 2.5), 0.6, 1.3, tangent=True, outputs=3),
        seeds=12,
        rate=0.5,
        constant=0.52,
        same_law=False,
    ),
    "hessian relu": PredictionRow(HessianCase(0.5, 0.4, "relu"), constant=1.2),
    "hessian relu, few data": PredictionRow(HessianCase(2.5, 0.2, "relu"), constant=1.9),
    "hessian wigner": PredictionRow(HessianCase(0.5, 0.4, "wigner"), constant=1.7),
    "fisher tanh": PredictionRow(FisherCase("tanh"), sizes=(6, 10, 16), constant=1.2),
    "fisher relu": PredictionRow(FisherCase("relu"), sizes=(6, 10, 16), constant=1.9),
    "fisher linear": PredictionRow(FisherCase("linear"), sizes=(6, 10, 18), constant=1.0),
    "deep fisher gaussian": PredictionRow(
        DeepFisherCase("tanh", 3, 1.3), sizes=(24, 64, 160), seeds=16, rate=0.5, constant=0.9
    ),
    "deep fisher orthogonal": PredictionRow(
        DeepFisherCase("tanh", 3, 1.3, "orthogonal"), sizes=(24, 64, 160), seeds=16, rate=0.5, constant=0.7
    ),
    "deep fisher relu": PredictionRow(
        DeepFisherCase("relu", 3, 2.0**0.5), sizes=(24, 64, 160), seeds=24, rate=0.5, constant=1.9
    ),
    "residual blocks": PredictionRow(ResidualCase("relu", 4, 0.7), seeds=8, constant=5.5),
    "spin glass": PredictionRow(SpinGlassCase(), sizes=(24, 48, 96), constant=5.0),
}
