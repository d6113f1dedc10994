"""`max_memory` of the estimators is kept to by Jacobians, closures, sums, scalings and what is made of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.operators.test_memory import _generator, _setting
from torch_rmt.operators import (
    ClosureHessian,
    GaussNewton,
    Hessian,
    Jacobian,
    LinearOperator,
    Scaled,
    column_bytes,
    dense,
    dense_bytes,
    layer_blocks,
    product_bytes,
)
from torch_rmt.operators.live import Live
from torch_rmt.operators.memory import free_bytes, free_of_container
from torch_rmt.spectra import SLQ, exact, spectrum_within, top_eigenvalues

Make = Callable[[], LinearOperator]


def _peak(run: Callable[[], Any]) -> tuple[int, Any]:
    with Live() as live:
        result = run()
    return live.peak, result


def _deep(width: int, depth: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())))


def _convolutions() -> nn.Module:
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.GELU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 144, 30))


def _sum(width: int, samples: int) -> Make:
    net, batch = _setting(width, samples)
    return lambda: Hessian(net, F.cross_entropy, batch) - 0.5 * GaussNewton(net, F.cross_entropy, batch)


def _scaled(width: int, samples: int) -> Make:
    net, batch = _setting(width, samples)
    size = sum(p.numel() for p in net.parameters())
    return lambda: Scaled(Hessian(net, F.cross_entropy, batch), torch.linspace(0.5, 2.0, size))


def _closure(width: int, samples: int) -> Make:
    net, (x, y) = _setting(width, samples)
    return lambda: ClosureHessian(lambda: F.cross_entropy(net(x), y), list(net.parameters()))


def _jacobian(net: nn.Module, x: Tensor) -> Make:
    return lambda: Jacobian(net, x)


OPERATORS: dict[str, Make] = {
    "jacobian, deep": _jacobian(_deep(200, 12), torch.randn(1, 200, generator=_generator())),
    "jacobian, convolutions": _jacobian(_convolutions(), torch.randn(1, 8, 12, 12, generator=_generator())),
    "sum": _sum(16, 400),
    "scaled": _scaled(16, 400),
    "closure": _closure(16, 400),
    "closure, parameters": _closure(60, 20),
}
ESTIMATES: dict[str, Callable[[LinearOperator, int | None], Any]] = {
    "slq": lambda operator, limit: SLQ(4, 4, max_memory=limit)(operator, _generator()),
    "any spectrum": lambda operator, limit: spectrum_within(operator, _generator(), matvecs=16, max_memory=limit),
    "extremes": lambda operator, limit: top_eigenvalues(
        operator, 2, _generator(), max_matvecs=16, max_memory=limit, tolerance=0.5
    ),
}


PAIRS = [(name, estimate) for name in OPERATORS for estimate in ESTIMATES if name[:3] not in ("sum", "sca")]
PAIRS += [("sum", "slq"), ("sum", "extremes"), ("scaled", "slq")]  # the rest of these would take long and show no more


@pytest.mark.parametrize(("name", "estimate"), PAIRS)
def test_estimates_keep_to_their_bytes_or_refuse(name: str, estimate: str) -> None:
    make, run = OPERATORS[name], ESTIMATES[estimate]
    whole = make()
    vector = max(whole.shape) * whole.dtype.itemsize
    least = product_bytes(whole, 1) + 45 * vector
    done = 0
    for factor in (0.6, 1.0, 3.0):
        limit = int(factor * least)
        try:
            used, _ = _peak(lambda limit=limit: run(make(), limit))
        except ValueError as problem:
            if factor >= 1.0 or "allowed" not in str(problem):
                raise
            continue
        done += 1
        assert used <= limit, f"{used / limit:.2f} of the limit at {factor}"
    assert done >= 2


@pytest.mark.parametrize("name", ["jacobian, deep", "jacobian, convolutions"])
def test_a_jacobian_in_smaller_blocks_is_the_same(name: str) -> None:
    J = OPERATORS[name]()
    assert isinstance(J, Jacobian)
    V = torch.randn(J.shape[1], 64, generator=_generator())
    U = torch.randn(J.shape[0], 64, generator=_generator())
    whole, back = J.matmat(V), J.adjoint().matmat(U)
    need = product_bytes(J, 64)
    unbounded = _peak(lambda: OPERATORS[name]().matmat(V))[0]
    with J.within(need, 64):
        assert J.chunk < 64
        assert J.notes == J.adjoint().notes == (f"max_memory: vectors are multiplied {J.chunk} at a time",)
        used, image = _peak(lambda: J.matmat(V))
        torch.testing.assert_close(J.adjoint().matmat(U), back, rtol=1e-4, atol=1e-5)
    assert used <= need < unbounded
    assert J.chunk == 256
    torch.testing.assert_close(image, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["jacobian, deep", "closure, small", "sum, small"])
def test_the_whole_matrix_keeps_to_its_bytes(name: str) -> None:
    make = {"closure, small": _closure(6, 50), "sum, small": _sum(6, 50)}.get(name) or OPERATORS[name]
    limit = dense_bytes(make())
    used, _ = _peak(lambda: exact(make(), max_memory=limit))
    assert used <= limit
    with pytest.raises(ValueError, match="no exact spectrum"):
        exact(make(), max_memory=limit - 1)
    assert spectrum_within(make(), _generator(), matvecs=10**4, max_memory=limit).method == "exact"
    assert spectrum_within(make(), _generator(), matvecs=10**4, max_memory=limit - 1).method != "exact"


def test_parts_of_a_sum_are_cut_and_give_the_same() -> None:
    make = _sum(24, 800)
    whole = make()
    V = torch.randn(whole.shape[1], 2, generator=_generator())
    expected = whole.matmat(V)
    H = make()
    limit = product_bytes(whole, 2) // 2
    with H.within(limit, 2):
        used, image = _peak(lambda: H.matmat(V))
        assert any("cut into parts" in note for note in H.notes)
    assert not H.notes
    found = SLQ(1, 2, max_memory=limit)(H, _generator())
    assert any("cut into parts" in note for note in found.notes)
    assert used <= limit
    torch.testing.assert_close(image, expected, rtol=2e-3, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("cls", [Hessian, GaussNewton])
def test_blocks_of_layers_count_the_whole_behind_them(cls: Any, shared: bool) -> None:
    net, batch = _setting(24, 400)

    def block() -> LinearOperator:
        whole = cls(net, F.cross_entropy, batch)
        whole.keep = shared
        return layer_blocks(whole)["2"]

    part = block()
    each = column_bytes(part) + 12 * part.shape[0] * 4
    limit = product_bytes(part, 0) + 2 * each
    expected = part.matmat(torch.ones(part.shape[0], 1))
    with Live() as live:
        found = block()
        SLQ(4, 4, max_memory=limit)(found, _generator())
    assert live.peak <= limit
    with found.within(limit // 2):
        torch.testing.assert_close(found.matmat(torch.ones(part.shape[0], 1)), expected, rtol=1e-3, atol=1e-5)
        assert shared or found.notes != part.notes  # type: ignore[attr-defined]


def test_a_closure_counts_its_graph() -> None:
    """What it says it takes is what lives: the graph, and one product."""
    net, (x, y) = _setting(24, 800)
    for samples in (100, 800):
        with Live() as live:
            H = ClosureHessian(lambda n=samples: F.cross_entropy(net(x[:n]), y[:n]), list(net.parameters()))
            graph = live.now()
        with Live() as live:
            dense_column = H.matmat(torch.ones(H.shape[0], 1))
        assert dense_column.shape == (H.shape[0], 1)
        least = graph + live.peak
        assert least <= product_bytes(H, 1) < 1.3 * least + 4 * H.shape[0] * 4


def test_live_counts_what_is_made_and_not_what_was_there() -> None:
    outside = torch.ones(1000)
    with Live() as live:
        view = outside[None]
        outside.add_(1.0)
        for _ in range(50):
            view = torch.ones(100) + view.flatten()[:100]
        assert live.now() == 400
    assert 1200 <= live.peak <= 1224
    assert float(dense(ClosureHessian(lambda: (outside.requires_grad_() ** 2).sum(), [outside.requires_grad_()]))[0, 0])


def _groups(root: Path, lines: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    """The kernel kills a process that goes beyond; nothing can be caught then."""
    inner = {"memory.max": "max\n", "memory.current": "300\n", "memory.stat": "anon 300\n"}
    outer = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 500\ninactive_file 100\n"}
    second = {f"jobs/{name}": text for name, text in outer.items()} | {f"jobs/mine/{n}": t for n, t in inner.items()}
    assert free_of_container(_groups(tmp_path / "second", "0::/jobs/mine\n", second)) == 400
    names = {"memory.max": "memory.limit_in_bytes", "memory.current": "memory.usage_in_bytes"}
    own = {f"memory/{names.get(n, n)}": t.replace("inactive", "total_inactive") for n, t in outer.items()}
    lines = "3:cpuset:/\n4:memory:/docker/abc\n0::/\n"  # the path is that of the host
    assert free_of_container(_groups(tmp_path / "first", lines, own)) == 400
    free = {**own, "memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert free_of_container(_groups(tmp_path / "free", lines, free)) is None
    assert free_of_container(tmp_path / "nowhere") is None
    assert free_bytes(torch.device("cpu")) > 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="address space limits")
def test_the_limit_of_the_address_space_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (size + 10**8, resource.RLIM_INFINITY))
    assert 0 < free_bytes(torch.device("cpu")) <= 10**8
    net, (x, y) = _setting(24, 30000)
    with_room = Hessian(net, F.cross_entropy, [(x[:20000], y[:20000]), (x[20000:], y[20000:])])
    assert any("graphs of all batches do not fit" in note for note in with_room.notes)
