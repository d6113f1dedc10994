"""`max_memory` is kept to: the bytes of all storages that live at the same time, counted at every operation."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_rmt.operators import (
    Curvature,
    Fisher,
    GaussNewton,
    GradientCovariance,
    Hessian,
    NeuralTangentKernel,
    dense,
    dual_gram,
    exact_routes,
    input_to_layers,
    layers_to_output,
)
from torch_rmt.operators.memory import saved_bytes
from torch_rmt.spectra import SLQ, exact, top_eigenvalues
from torch_rmt.spectra.affordable import affordable_spectrum


class Live(TorchDispatchMode):
    """Bytes of the storages that were made inside and still live; their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Bytes that live."""
        self.held = {key: entry for key, entry in self.held.items() if not entry[0].expired()}
        return sum(size for _, size in self.held.values())


def _setting(width: int, samples: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 5))
    return net, (torch.randn(samples, 16), torch.randint(0, 5, (samples,)))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _peak(run: Callable[[], Any]) -> tuple[int, Any]:
    with Live() as live:
        result = run()
    return live.peak, result


SHAPES = {"activations outweigh": (24, 800), "parameters outweigh": (100, 40)}
MATRICES: dict[str, Any] = {
    "hessian": Hessian,
    "gauss newton": GaussNewton,
    "gradient covariance": GradientCovariance,
    "empirical": lambda *args, **limits: Fisher(*args, kind="empirical", **limits),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MATRICES)
def test_products_keep_to_their_bytes(name: str, shape: str) -> None:
    net, batch = _setting(*SHAPES[shape])
    make = MATRICES[name]
    whole = make(net, F.cross_entropy, batch)
    least = whole.footprint().product(1)
    V = torch.randn(whole.shape[1], 4, generator=_generator())
    expected = whole.matmat(V)
    unbounded = _peak(lambda: make(net, F.cross_entropy, batch).matmat(V))[0]
    notes = []
    for share in (0.7, 1.1, 2.5):
        limit = int(share * least) + 6 * V.numel() * 4
        operator: list[Curvature] = []

        def run(limit: int = limit, operator: list[Curvature] = operator) -> Tensor:
            operator.append(make(net, F.cross_entropy, batch, max_memory=limit))
            return operator[0].matmat(V)

        used, image = _peak(run)
        notes += operator[0].notes
        assert used <= limit, f"{used / limit:.2f} of the limit at {share}"
        if not any("not kept to" in note for note in notes):
            torch.testing.assert_close(image, expected, rtol=2e-3, atol=2e-4 * float(expected.abs().max()))
    if shape == "activations outweigh":
        assert name != "hessian" or unbounded > 0.7 * least + 6 * V.numel() * 4  # or the limit bound nothing
        assert any("cut into parts" in note for note in notes)


ESTIMATES: dict[str, Callable[[Any, int], Any]] = {
    "slq": lambda make, limit: SLQ(3, 8, max_memory=limit)(make(), _generator()),
    "affordable": lambda make, limit: affordable_spectrum(make(), _generator(), products=24, max_memory=limit),
    "extremes": lambda make, limit: top_eigenvalues(make(), 2, _generator(), max_matvecs=40, max_memory=limit),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cls", [Hessian, GaussNewton])
@pytest.mark.parametrize("name", ESTIMATES)
def test_estimates_keep_to_their_bytes_or_refuse(name: str, cls: type[Curvature], shape: str) -> None:
    net, batch = _setting(*SHAPES[shape])
    whole = cls(net, F.cross_entropy, batch)
    vector = whole.footprint().vector
    exact_routes(whole)  # measures the machine's speed, once a process
    done = 0
    for factor in (0.6, 3.0):
        limit = int(factor * (whole.footprint().product(1) + 30 * vector))
        try:
            used, _ = _peak(lambda limit=limit: ESTIMATES[name](lambda: cls(net, F.cross_entropy, batch), limit))
        except ValueError as problem:
            if factor >= 1.0 or "allowed" not in str(problem):
                raise
            continue
        done += 1
        assert used <= limit, f"{used / limit:.2f} of the limit at {factor}"
    assert done >= 1


@pytest.mark.parametrize("kind", ["gauss newton", "tangent kernel", "sampled"])
def test_the_dual_goes_group_by_group(kind: str) -> None:
    net, (x, y) = _setting(96, 30)
    make: Callable[[], Any] = {
        "gauss newton": lambda: GaussNewton(net, F.cross_entropy, (x, y)),
        "sampled": lambda: Fisher(net, F.cross_entropy, (x, y), kind="sampled", draws=3),
        "tangent kernel": lambda: NeuralTangentKernel(net, x),
    }[kind]
    route = next(r for r in exact_routes(make()) if r.name == "dual")
    expected = dual_gram(make()).eigenvalues()
    used, spectrum = _peak(lambda: exact(make(), max_memory=int(1.02 * route.bytes)))
    assert used <= 1.02 * route.bytes
    assert any("groups for memory" in note for note in spectrum.notes)
    np.testing.assert_allclose(spectrum.eigenvalues, expected.numpy(), rtol=1e-3, atol=1e-5 * float(expected[-1]))
    with pytest.raises(ValueError, match="samples x columns"):
        dual_gram(make(), max_memory=route.bytes // 2)


def test_the_whole_matrix_keeps_to_its_bytes() -> None:
    net, batch = _setting(12, 100)
    route = next(r for r in exact_routes(Hessian(net, F.cross_entropy, batch)) if r.name == "dense")
    used, _ = _peak(lambda: exact(Hessian(net, F.cross_entropy, batch), max_memory=route.bytes))
    assert used <= route.bytes


@pytest.mark.parametrize("sweep", [input_to_layers, layers_to_output])
def test_a_sweep_keeps_to_its_bytes(sweep: Any) -> None:
    net, (x, _) = _setting(64, 100)
    expected = sweep(net, x)
    result = sum(t.numel() * 4 for t in expected.values())
    limit = result + 3 * 2**20
    used, found = _peak(lambda: sweep(net, x, max_memory=limit))
    assert used <= limit
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t)
    with pytest.raises(ValueError, match="partial_jacobian_norms"):
        sweep(net, x, max_memory=result)


def test_counting_bytes_leaves_nothing_behind() -> None:
    """A hook on saved tensors that gives them back ties the graph to itself."""
    net, (x, y) = _setting(32, 500)
    H = Hessian(net, F.cross_entropy, (x, y))
    with Live() as live:
        for _ in range(3):
            saved_bytes(H.pure, x)
        gc.collect()
        assert live.now() < 10_000


def _fails_at(run: Callable[..., Tensor], call: int) -> Callable[..., Tensor]:
    calls = [0]

    def product(*args: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == call:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return run(*args)

    return product


@pytest.mark.parametrize("cls", [Hessian, GaussNewton])
def test_memory_that_runs_out_in_the_middle_changes_no_number(cls: type[Curvature], monkeypatch: Any) -> None:
    net, (x, y) = _setting(12, 60)
    net, x = net.double(), x.double()
    expected = SLQ(3, 10)(cls(net, F.cross_entropy, (x, y)), _generator())
    operator = cls(net, F.cross_entropy, (x, y))
    dense(operator)  # graphs are kept, and let go when memory runs out
    monkeypatch.setattr(operator, "_multiply", _fails_at(operator._multiply, 5))
    found = SLQ(3, 10)(operator, _generator())
    np.testing.assert_allclose(found.nodes, expected.nodes, rtol=1e-7, atol=1e-10)
    assert any("out of memory" in note for note in operator.notes)


def test_an_estimate_that_runs_out_of_memory_is_planned_again(monkeypatch: Any) -> None:
    net, batch = _setting(60, 40)
    operator = Hessian(net, F.cross_entropy, batch)
    monkeypatch.setattr(
        "torch_rmt.spectra.slq.BlockSLQ.__call__", _fails_at(lambda *_: pytest.fail("not planned again"), 1)
    )
    found = affordable_spectrum(operator, _generator(), products=40)
    assert found.method.startswith("slq")
    assert any("planned again" in note for note in found.notes)


@pytest.mark.parametrize("cls", [Hessian, GaussNewton])
def test_a_limit_holds_inside_its_context_and_changes_nothing_outside(cls: type[Curvature]) -> None:
    net, (x, y) = _setting(6, 32)
    net, x = net.double(), x.double()
    operator = cls(net, F.cross_entropy, (x, y))
    V = torch.randn(operator.shape[1], 3, generator=_generator(), dtype=torch.float64)
    expected = operator.matmat(V)  # the graph of the whole batch is kept, and serves no part of it
    quarter = cls(net, F.cross_entropy, (x[:8], y[:8])).footprint().product(1)
    before = (operator.max_memory, operator.keep, operator.batches, operator.notes)
    with operator.within(quarter):
        assert max(b.samples for b in operator.batches) <= 8
        assert not operator.keep
        torch.testing.assert_close(operator.matmat(V), expected)
    after = (operator.max_memory, operator.keep, operator.batches, operator.notes)
    assert all(a is b for a, b in zip(after, before, strict=True))
    torch.testing.assert_close(operator.matmat(V), expected)
    tight = cls(net, F.cross_entropy, (x, y), max_memory=quarter)
    parts = tight.batches
    for wider in (None, 10**12):
        with tight.within(wider):
            assert (tight.max_memory, tight.batches) == (quarter, parts)
    with tight.within(quarter // 2):
        assert tight.max_memory == quarter // 2
        assert len(tight.batches) > len(parts)
