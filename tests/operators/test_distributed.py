"""Two gloo processes: data-parallel products and FSDP2 parameters equal one process on all data."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from torch_rmt.guard import undisturbed
from torch_rmt.operators import (
    AllReduced,
    EngineError,
    Fisher,
    GaussNewton,
    GradientCovariance,
    Hessian,
    ShardedGaussNewton,
    ShardedHessian,
    column_bytes,
    dense,
    product_bytes,
    unsharded,
)
from torch_rmt.operators.live import Live
from torch_rmt.spectra import SLQ, Spectrum


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.b(torch.tanh(self.a(x))))))


def _setting() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Tied().double().eval(), torch.randn(7, 4).double(), torch.tensor([0, 1, 2, -100, 1, -100, 0])


CASES: dict[str, tuple[Any, dict[str, str]]] = {
    "hessian": (Hessian, {}),
    "gauss_newton": (GaussNewton, {}),
    "empirical": (Fisher, {"kind": "empirical"}),
}


_WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
LOSSES: dict[str, Any] = {
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "sum by a function": lambda output, target: F.cross_entropy(output, target, reduction="sum"),
    "class weights": nn.CrossEntropyLoss(weight=_WEIGHT),
    "class weights, summed": nn.CrossEntropyLoss(weight=_WEIGHT, reduction="sum"),
}
SHARDED: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "hessian": (ShardedHessian, Hessian, {}),
    "exact": (ShardedGaussNewton, Fisher, {"kind": "exact"}),
    "empirical": (ShardedGaussNewton, Fisher, {"kind": "empirical"}),
    "sampled": (ShardedGaussNewton, Fisher, {"kind": "sampled", "draws": 2, "seed": 3}),
}


def _uneven(x: Tensor, y: Tensor, rank: int) -> list[tuple[Tensor, Tensor]]:
    """Two batches for each rank, of 3 + 1 and 1 + 2 samples."""
    cuts = [slice(0, 3), slice(3, 4)] if rank == 0 else [slice(4, 5), slice(5, 7)]
    return [(x[part], y[part]) for part in cuts]


def _some_vectors(rows: int) -> Tensor:
    return torch.randn(rows, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _spectrum_in_memory(rank: int) -> dict[str, Tensor]:
    """Ranks whose graphs differ in size must run as many probes at a time, or they wait for one another."""
    generator = torch.Generator().manual_seed(rank)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    samples = 48 if rank == 0 else 2
    x, y = torch.randn(samples, 4, generator=generator, dtype=torch.float64), torch.arange(samples) % 3

    def spectrum(max_memory: int | None) -> Spectrum:
        operator = AllReduced(Hessian(model, F.cross_entropy, (x, y)))
        return SLQ(probes=4, depth=20, max_memory=max_memory)(operator, torch.Generator().manual_seed(0))

    reduced = AllReduced(Hessian(model, F.cross_entropy, (x, y)))
    probe = column_bytes(reduced) + 28 * reduced.shape[0] * 8
    limit = product_bytes(reduced, 0) + 2 * probe
    assert product_bytes(reduced, 0) >= product_bytes(reduced.local, 0) + rank * probe  # one more would fit rank 1
    with Live() as live:
        found = spectrum(limit)
    assert live.peak <= limit
    assert any("2 of 4 probes at a time" in note for note in found.notes)
    return {"nodes within bytes": torch.from_numpy(found.nodes), "nodes": torch.from_numpy(spectrum(None).nodes)}


def _next_token(output: Tensor, labels: Tensor) -> Tensor:
    """A loss of shifted tokens, as language models have it."""
    return F.cross_entropy(output[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _texts() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Two texts of unequal padded length, one for each rank."""
    torch.manual_seed(2)
    labels = [torch.tensor([[0, 1, 2, 1, 2], [1, 2, 0, -100, -100]]), torch.tensor([[2, 1, -100]])]
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return net, [(torch.randn(*y.shape, 4, dtype=torch.float64), y) for y in labels]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model, x, y = _setting()
    part = slice(0, 5) if rank == 0 else slice(5, 7)
    results: dict[str, Tensor] = {}
    for name, (cls, kwargs) in CASES.items():
        operator = AllReduced(cls(model, F.cross_entropy, (x[part], y[part]), **kwargs))
        results[name] = dense(operator)
    torch.manual_seed(rank)  # vectors that differ between ranks: those of rank 0 count
    V = torch.randn(operator.shape[0], 2, dtype=torch.float64)
    results["rank 0 vectors"] = operator.matmat(V)
    try:
        AllReduced(GradientCovariance(model, F.cross_entropy, (x, y)))
    except TypeError as refused:
        results["refusal"] = torch.tensor(len(str(refused)))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    skeleton = copy.deepcopy(model).to("meta")
    sharded = copy.deepcopy(model)
    sharded.a.bias.requires_grad_(False)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    whole = unsharded(sharded, skeleton)
    assert whole.b.weight is whole.a.weight
    assert not whole.a.bias.requires_grad
    for p in sharded.parameters():
        p.grad = torch.full_like(p, 0.5)
    before = [(p.to_local().clone(), p.grad) for p in sharded.parameters()]
    random_state = torch.get_rng_state()
    differences = ShardedHessian(sharded, F.cross_entropy, (x[part], y[part]))
    assert differences.adjoint() is differences
    results["differences"] = dense(differences)
    for p, (values, gradient) in zip(sharded.parameters(), before, strict=True):
        assert torch.equal(p.to_local(), values)
        assert p.grad is gradient
    assert torch.equal(random_state, torch.get_rng_state())
    for kind in ("exact", "empirical"):
        products = ShardedGaussNewton(sharded, F.cross_entropy, (x[part], y[part]), kind=kind)
        results[f"gauss-newton, {kind}"] = dense(products)
        errors = []
        for step in (1e-2, 1e-3):  # the order of the error: h^2
            v = torch.linspace(-1, 1, products.shape[0], dtype=torch.float64)
            with undisturbed(sharded):
                errors.append(products._slope(v, step))
        results[f"order, {kind}"] = torch.stack(errors)
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 2])  # none ignored: a batch of one needs a term
    for loss_name, loss in LOSSES.items():
        for kind, (cls, _, settings) in SHARDED.items():
            operator = cls(sharded, loss, _uneven(x, labels, rank), **settings)
            results[f"{loss_name}, {kind}"] = operator.matmat(_some_vectors(operator.shape[0]))
        operator = AllReduced(Hessian(model, loss, _uneven(x, labels, rank)))
        results[f"{loss_name}, reduced"] = operator.matmat(_some_vectors(operator.shape[0]))
    try:
        ShardedHessian(sharded, F.cross_entropy, [(x * (float("nan") if rank else 1.0), y)])
    except ValueError as refused:
        results["loss of one rank"] = torch.tensor(len(str(refused)))
    for p, (values, gradient) in zip(sharded.parameters(), before, strict=True):
        assert torch.equal(p.to_local(), values)
        assert p.grad is gradient
    results["differences of rank 0 vectors"] = differences.matmat(V[: differences.shape[0]])
    try:
        ShardedHessian(sharded, F.cross_entropy, [(x, y)] * (1 + rank))
    except ValueError as refused:
        results["uneven ranks"] = torch.tensor(len(str(refused)))
    rough = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3)).double()
    with torch.no_grad():  # half the units stand on their kink
        rough[0].bias.zero_()
        rough[0].weight.mul_(1e-7)
    fully_shard(rough, mesh=init_device_mesh("cpu", (2,)))
    try:
        ShardedHessian(rough, F.cross_entropy, (x, y)).matmat(torch.ones(515, 1, dtype=torch.float64))
    except EngineError as refused:
        results["rough"] = torch.tensor(len(str(refused)))
    net, texts = _texts()
    results["texts, reduced"] = AllReduced(Hessian(net, _next_token, texts[rank])).matmat(_some_vectors(51))
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    for kind, (cls, _, settings) in SHARDED.items():
        if kind in ("hessian", "exact"):
            operator = cls(net, _next_token, texts[rank], **settings)
            results[f"texts, {kind}"] = operator.matmat(_some_vectors(51))
    for cls in (ShardedHessian, ShardedGaussNewton):
        operator = cls(sharded, F.cross_entropy, [(x.repeat(40, 1), y.repeat(40)), (x, y)])
        need = product_bytes(operator, 2)
        with Live() as live:
            operator.matmat(V[: operator.shape[0]])
        assert 0.3 * need < live.peak <= need, (live.peak, need)
        try:
            SLQ(2, 3, max_memory=need // 2)(operator, torch.Generator().manual_seed(0))
        except ValueError as refused:
            results[f"bytes, {cls.__name__}"] = torch.tensor("are allowed" in str(refused))
    results["sharded"] = dense(Hessian(whole, F.cross_entropy, (x, y), "*"))
    results |= _spectrum_in_memory(rank)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo with a file store")
def test_two_processes_are_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model, x, y = _setting()
    for name, (cls, kwargs) in CASES.items():
        expected = dense(cls(model, F.cross_entropy, (x, y), **kwargs))
        torch.testing.assert_close(first[name], expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(first[name], second[name])
    assert torch.equal(first["rank 0 vectors"], second["rank 0 vectors"])
    assert int(first["refusal"]) > 0
    assert torch.equal(first["differences of rank 0 vectors"], second["differences of rank 0 vectors"])
    assert int(first["uneven ranks"]) > 0
    assert int(first["rough"]) > 0
    torch.testing.assert_close(first["nodes within bytes"].max(), first["nodes"].max(), rtol=1e-4, atol=0.0)
    assert torch.equal(first["nodes within bytes"], second["nodes within bytes"])
    assert int(first["loss of one rank"]) > 0
    assert int(second["loss of one rank"]) > 0
    trained = [n for n, _ in model.named_parameters() if n != "a.bias"]
    expected = dense(Hessian(model, F.cross_entropy, (x, y), trained))
    assert float((first["differences"] - expected).norm()) < 1e-6 * float(expected.norm())
    for kind in ("exact", "empirical"):
        expected = dense(Fisher(model, F.cross_entropy, (x, y), trained, kind=kind))
        assert float((first[f"gauss-newton, {kind}"] - expected).norm()) < 1e-6 * float(expected.norm())
        v = torch.linspace(-1, 1, expected.shape[0], dtype=torch.float64)
        far, near = (float((image - expected @ v).norm()) for image in first[f"order, {kind}"])
        assert 70 < far / near < 140
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 2])
    for loss_name, loss in LOSSES.items():
        whole = [*_uneven(x, labels, 0), *_uneven(x, labels, 1)]
        for kind, (_, cls, settings) in SHARDED.items():
            operator = cls(model, loss, whole if kind == "sampled" else (x, labels), trained, **settings)
            expected = operator.matmat(_some_vectors(operator.shape[0]))
            gap = float((first[f"{loss_name}, {kind}"] - expected).norm())
            assert gap < 1e-6 * float(expected.norm()), f"{loss_name}, {kind}: {gap:.1e}"
        operator = Hessian(model, loss, (x, labels))
        expected = operator.matmat(_some_vectors(operator.shape[0]))
        torch.testing.assert_close(first[f"{loss_name}, reduced"], expected, rtol=1e-10, atol=1e-12)
    assert all(first[f"bytes, {cls}"] for cls in ("ShardedHessian", "ShardedGaussNewton"))
    net, texts = _texts()
    for kind in ("reduced", "hessian", "exact"):
        expected = (Fisher if kind == "exact" else Hessian)(net, _next_token, texts).matmat(_some_vectors(51))
        torch.testing.assert_close(first[f"texts, {kind}"], expected, rtol=1e-5, atol=1e-7)
    expected = dense(Hessian(model, F.cross_entropy, (x, y), "*"))
    torch.testing.assert_close(first["sharded"], expected, rtol=1e-10, atol=1e-12)


def test_one_process_is_told_so() -> None:
    model, x, y = _setting()
    with pytest.raises(RuntimeError, match="not initialised"):
        AllReduced(Hessian(model, F.cross_entropy, (x, y)))
    with pytest.raises(RuntimeError, match="not initialised"):
        ShardedHessian(model, F.cross_entropy, (x, y))


def test_a_skeleton_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="before fully_shard"):
        unsharded(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
