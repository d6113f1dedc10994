"""Products, blocks, duals and sweeps as ratios to one gradient of the same loss, beside curvlinops.

Run `python benchmarks/operators.py [--device cuda] [--threads N] [--only mlp gpt resnet]`; prints a Markdown
table. All figures of one model come from one run, "g" is one forward and backward pass. Medians of
interleaved repetitions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from torch_rmt.operators import (
    Fisher,
    GaussNewton,
    Hessian,
    dual_gram,
    input_to_layers,
    layer_blocks,
)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (p.view(b, t, self.heads, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(dim), Attention(dim, heads), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int = 65, dim: int = 128, depth: int = 5, length: int = 64) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*[Block(dim, 4) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        logits = self.head(self.norm(self.blocks(self.token(tokens) + self.place(places))))
        return logits.flatten(0, 1)


class Residual(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        same = stride == 1 and into == out
        self.skip = nn.Identity() if same else nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.skip(x))


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    net = nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10))
    return net, torch.randn(512, 784), torch.randint(0, 10, (512,))


def gpt() -> tuple[nn.Module, Tensor, Tensor]:
    return GPT(), torch.randint(0, 65, (16, 64)), torch.randint(0, 65, (16 * 64,))


def resnet() -> tuple[nn.Module, Tensor, Tensor]:
    widths = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    body = [Residual(*w) for w in widths]
    net = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return net.eval(), torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {"mlp": mlp, "gpt": gpt, "resnet": resnet}
REPEATS = 5


def seconds(run: Callable[[], Any]) -> float:
    """One timed call, the device's queue emptied before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rows(name: str, device: str) -> dict[str, Callable[[], Any]]:
    """What to time on one model; the first row is the gradient."""
    torch.manual_seed(0)
    model, x, y = MODELS[name]()
    model, x, y = model.to(device), x.to(device), y.to(device)
    loss = nn.CrossEntropyLoss()

    def gradient() -> None:
        model.zero_grad()
        loss(model(x), y).backward()

    work: dict[str, Callable[[], Any]] = {"gradient": gradient}
    n = sum(p.numel() for p in model.parameters())
    v, many = torch.randn(n, 1, device=device), torch.randn(n, 16, device=device)
    hessian = Hessian(model, loss, (x, y))
    operators: dict[str, Any] = {"Hessian": hessian, "Gauss-Newton": GaussNewton(model, loss, (x, y))}
    if name != "gpt":  # the GPT's loss counts tokens, its empirical Fisher samples
        operators["empirical Fisher"] = Fisher(model, loss, (x, y), kind="empirical")
    for label, operator in operators.items():
        work[f"{label} product"] = lambda o=operator: o.matmat(v)
        work[f"{label}, block of 16, a vector"] = lambda o=operator: o.matmat(many)
    blocks = layer_blocks(hessian)
    parts = {key: torch.randn(b.shape[0], 1, device=device) for key, b in blocks.items()}
    work[f"all {len(blocks)} layer blocks of the Hessian"] = lambda: [b.matmat(parts[k]) for k, b in blocks.items()]
    if name == "mlp":
        work["exact Gauss-Newton spectra of all layers, batch 128"] = lambda: dual_gram(
            GaussNewton(model, loss, (x[:128], y[:128])), by_layer=True
        ).layer_eigenvalues()
    try:
        import curvlinops
    except ImportError:
        return work
    params = list(model.parameters())
    theirs = {"Hessian": curvlinops.HessianLinearOperator, "Gauss-Newton": curvlinops.GGNLinearOperator}
    for label, kind in theirs.items():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            operator = kind(model, loss, params, [(x, y)], check_deterministic=False)

        def product(o: Any = operator) -> Any:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return o @ v[:, 0]

        work[f"curvlinops {label} product"] = product
    return work


def sweep(device: str) -> tuple[float, float]:
    """Seconds for all input-to-layer Jacobians of a deep MLP, and for the last one alone."""
    net = nn.Sequential(*[p for _ in range(32) for p in (nn.Linear(256, 256), nn.Tanh())]).to(device)
    x, names = torch.randn(1, 256, device=device), [str(2 * i + 1) for i in range(32)]
    calls = (lambda: input_to_layers(net, x, names), lambda: input_to_layers(net, x, names[-1:]))
    for call in calls:
        call()
    times = [[seconds(call) for call in calls] for _ in range(REPEATS)]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.only:
        work = rows(name, options.device)
        for run in work.values():
            run()
        taken: dict[str, list[float]] = {label: [] for label in work}
        for _ in range(REPEATS):
            for label, run in work.items():
                taken[label].append(seconds(run))
        g = statistics.median(taken["gradient"])
        print(f"\n{name}: one gradient {1e3 * g:.1f} ms, {options.threads} threads, {options.device}\n")
        print("| work | g |\n|---|---|")
        for label, times in taken.items():
            share = 16 if "block of 16" in label else 1
            print(f"| {label} | {statistics.median(times) / g / share:.2f} |")
    whole, last = sweep(options.device)
    print(f"\nall input-to-layer Jacobians, 32 layers of 256: {whole / last:.2f} times the last one alone")


if __name__ == "__main__":
    main()
