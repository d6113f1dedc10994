"""Products, blocks, duals and sweeps beside other libraries: time as ratios to one gradient, and peak memory.

Run `python benchmarks/operators.py [--device cuda] [--dtype bfloat16] [--threads N] [--only mlp gpt resnet] [--tiny]`;
prints a Markdown table; a model takes one to three minutes on an idle core. All figures of one model come from one
run, interleaved; "g" is one forward and backward pass. Memory is the peak above what was held before, of building a
row's operator and of its first run. Each row is also put beside the machine's matrix product (1024 square on a CPU,
4096 on a GPU, in the type that the row multiplies in). Of a model in half precision our rows are measured in float32
copies, as the engine does by itself; a gradient in float32 stands beside that of the model. Convolutions do without
TF32, for all alike. For hessian-eigenthings and PyHessian run it with a Python that has them.

`--only large_mlp large_gpt` is meant for a GPU of 80 GB: 1.1 billion and 98 million parameters. Each row is then built,
timed and let go before the next (with a gradient of its own beside it), since one Hessian's graph and proof take 13
times the parameters' bytes, 52 GiB. Under each table stands how every row was made and what was given up.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from networks import Setting, gpt, large_gpt, large_mlp, mlp, resnet
from rivals import Build, rivals
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from torch_rmt.operators import Fisher, GaussNewton, Hessian, dual_gram, input_to_layers, layer_blocks

MODELS: dict[str, Callable[[bool], Setting]] = {
    "mlp": mlp,
    "gpt": gpt,
    "resnet": resnet,
    "large_mlp": large_mlp,
    "large_gpt": large_gpt,
}
REPEATS = 5
BLOCK = 16
HALF = (torch.float16, torch.bfloat16)


def seconds(run: Callable[[], Any], device: str) -> float:
    """One timed call, the device's queue emptied before and after; CPU time of one thread does not see neighbours."""
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def _resident(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak(run: Callable[[], Any], device: str) -> tuple[Any, float | None]:
    """Result of a call, and the MiB that it held at most above what was held before (None where unknown)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        return run(), None
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    result = run()
    return result, (_resident("VmHWM") - before) / 2**20


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Flops a second of a product of two large square matrices."""
    size = 4096 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds(lambda: a @ a, device) for _ in range(5))


def rows(name: str, device: str, dtype: torch.dtype, tiny: bool) -> dict[str, Build]:
    """What to time on one model: label, and what builds the call; the first row is the gradient."""
    torch.manual_seed(0)
    model, x, y = MODELS[name](tiny)
    model, x, y = model.to(device, dtype), x.to(device), y.to(device)
    x = x.to(dtype) if x.is_floating_point() else x
    loss = nn.CrossEntropyLoss()

    def gradient() -> None:
        model.zero_grad()
        loss(model(x), y).backward()

    work: dict[str, Build] = {"gradient": lambda: gradient}
    if dtype in HALF:
        work["gradient in float32"] = lambda: float32_gradient(model, x, y)
    n = sum(p.numel() for p in model.parameters())
    measured = torch.float32 if dtype in HALF else dtype
    v = torch.randn(n, 1, device=device, dtype=measured)

    def products(make: Callable[[], Any], width: int) -> Callable[[], Any]:
        operator = make()
        vectors = v if width == 1 else torch.randn(width, n, device=device, dtype=measured).T

        return functools.partial(operator.matmat, vectors)

    operators: dict[str, Callable[[], Any]] = {
        "Hessian": lambda: Hessian(model, loss, (x, y)),
        "Gauss-Newton": lambda: GaussNewton(model, loss, (x, y)),
    }
    if "gpt" not in name:  # the GPT's loss counts tokens, its empirical Fisher samples
        operators["empirical Fisher"] = lambda: Fisher(model, loss, (x, y), kind="empirical")
    for label, make in operators.items():
        work[f"{label} product"] = lambda make=make: products(make, 1)
        if name in ("mlp", "gpt"):  # elsewhere a block of 16 takes a minute and says nothing new
            work[f"{label}, block of {BLOCK}, a vector"] = lambda make=make: products(make, BLOCK)

    def blocks() -> Callable[[], Any]:
        parts = layer_blocks(Hessian(model, loss, (x, y)))
        vectors = {key: torch.randn(b.shape[0], 1, device=device, dtype=measured) for key, b in parts.items()}
        return lambda: [b.matmat(vectors[key]) for key, b in parts.items()]

    if name in ("mlp", "gpt"):
        work["all layer blocks of the Hessian, a product each"] = blocks
    if name == "mlp":
        few = (x[:128], y[:128])
        work["exact Gauss-Newton spectra of all layers, batch 128"] = lambda: (
            lambda: dual_gram(GaussNewton(model, loss, few), by_layer=True).layer_eigenvalues()
        )
    if dtype == measured:
        work.update(rivals(model, x, y, v[:, 0]))
    return work


def float32_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Forward and backward pass of a copy in float32."""
    wide, inputs = copy.deepcopy(model).float(), x.float() if x.is_floating_point() else x

    def run() -> None:
        wide.zero_grad()
        nn.CrossEntropyLoss()(wide(inputs), y).backward()

    return run


def sweep(device: str, tiny: bool) -> tuple[float, float]:
    """Seconds for all input-to-layer Jacobians of a deep MLP, and for the last one alone."""
    width = 16 if tiny else 256
    net = nn.Sequential(*[p for _ in range(32) for p in (nn.Linear(width, width), nn.Tanh())]).to(device)
    x, names = torch.randn(1, width, device=device), [str(2 * i + 1) for i in range(32)]
    calls = (lambda: input_to_layers(net, x, names), lambda: input_to_layers(net, x, names[-1:]))
    for call in calls:
        call()
    times = [[seconds(call, device) for call in calls] for _ in range(REPEATS)]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def tried(build: Build, label: str, device: str) -> tuple[Callable[[], Any], float | None, float] | None:
    """What a row runs, its peak memory and its flops; None, and why, where it cannot."""

    def first() -> Callable[[], Any]:
        run = build()
        run()
        return run

    try:
        run, memory = peak(first, device)
    except Exception as problem:  # a rival that refuses this model must not end the run
        print(f"{label}: {type(problem).__name__}: {str(problem).splitlines()[:1]}", file=sys.stderr)
        return None
    try:
        with FlopCounterMode(display=False) as counter:
            run()
        return run, memory, counter.get_total_flops()
    except RuntimeError:  # the counter's module hooks do not bear every use of autograd
        return run, memory, 0.0


def how_made(run: Callable[[], Any]) -> str:
    """Engine and notes of the operator whose product a row runs; nothing for other rows."""
    operator = getattr(getattr(run, "func", None), "__self__", None)
    return "; ".join((operator.engine, *operator.notes)) if operator is not None else ""


def measure(name: str, device: str, dtype: torch.dtype, tiny: bool) -> None:
    """Print one model's table."""
    work, repeats = rows(name, device, dtype, tiny), 3 if name == "resnet" else REPEATS
    found: dict[str, tuple[float, float, float | None, float]] = {}  # seconds, those of a gradient, memory, flops
    made: dict[str, str] = {}
    if name.startswith("large"):  # one after the other, or their graphs do not fit
        gradient = work["gradient"]()
        for label, build in work.items():
            row = tried(build, label, device)
            if row is None:
                continue
            times = [[seconds(run, device) for run in (row[0], gradient)] for _ in range(repeats)]
            middle, g = (statistics.median(t[i] for t in times) for i in (0, 1))
            found[label], made[label] = (middle, g, *row[1:]), how_made(row[0])
            del row
    else:
        kept = {label: row for label, build in work.items() if (row := tried(build, label, device))}
        taken = [{label: seconds(row[0], device) for label, row in kept.items()} for _ in range(repeats)]
        middles = {label: statistics.median(t[label] for t in taken) for label in kept}
        for label, row in kept.items():
            found[label], made[label] = (middles[label], middles["gradient"], *row[1:]), how_made(row[0])
    limits = {t: matmul_rate(device, t) for t in {dtype, torch.float32 if dtype in HALF else dtype}}
    rates = ", ".join(f"{limit / 1e9:.0f} Gflop/s in {t}" for t, limit in limits.items())
    where = f"{torch.get_num_threads()} threads, {device}, {dtype}"
    print(f"\n{name}: one gradient {1e3 * found['gradient'][1]:.1f} ms, {where}; matrix product {rates}\n")
    print("| work | g | peak MiB | share of the matrix product's rate |\n|---|---|---|---|")
    for label, (middle, g, held, flops) in found.items():
        share = BLOCK if "block of" in label else 1
        shown = "" if held is None else f"{held:.0f}"
        limit = limits[dtype if label == "gradient" or dtype not in HALF else torch.float32]
        rate = f"{flops / middle / limit:.0%}" if flops else ""
        print(f"| {label} | {middle / g / share:.2f} | {shown} | {rate} |")
    print("\n".join(("", *(f"* {label}: {how}" for label, how in made.items() if how))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=MODELS, default=["mlp", "gpt", "resnet"])
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script itself")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False
    for name in options.only:
        measure(name, options.device, getattr(torch, options.dtype), options.tiny)
    if "mlp" not in options.only:
        return
    whole, last = sweep(options.device, options.tiny)
    print(f"\nall input-to-layer Jacobians, 32 layers of 256: {whole / last:.2f} times the last one alone")


if __name__ == "__main__":
    main()
