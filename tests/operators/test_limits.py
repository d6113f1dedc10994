"""Dual or dense by counting; limits of memory and time are kept to; running out of memory leads to a smaller plan."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.operators.module_kinds import Calls
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
    layer_blocks,
)
from torch_rmt.operators import ladder as ladder_module
from torch_rmt.operators.dual_counts import dual_bytes, dual_counts
from torch_rmt.spectra import exact
from torch_rmt.spectra import exact as exact_function
from torch_rmt.spectra.affordable import affordable_spectrum


def _setting(samples: int, width: int = 24, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3)).double()
    return net, (torch.randn(samples, 8, dtype=torch.float64), torch.randint(0, 3, (samples,)))


@pytest.mark.parametrize(
    "make",
    [
        lambda net, batch: GaussNewton(net, F.cross_entropy, batch),
        lambda net, batch: Fisher(net, F.cross_entropy, batch, kind="empirical"),
        lambda net, batch: Fisher(net, F.cross_entropy, batch, kind="sampled", draws=2),
        lambda net, batch: GradientCovariance(net, F.cross_entropy, batch),
        lambda net, batch: NeuralTangentKernel(net, batch[0]),
    ],
)
def test_exact_takes_the_dual_of_few_samples_and_the_matrix_of_many(make: Any) -> None:
    for samples, way in ((30, "dual"), (600, "dense")):
        operator = make(*_setting(samples, width=24 if way == "dual" else 6))
        if isinstance(operator, NeuralTangentKernel) and way == "dense":
            continue  # samples x outputs either way
        routes = exact_routes(operator)
        spectrum = exact(operator)
        assert spectrum.method.startswith(f"exact, {routes[0].name}"), spectrum.method
        if type(operator) is GaussNewton or way == "dual":
            assert routes[0].name == way
        values = torch.linalg.eigvalsh(dense(operator)).clamp_min(0).numpy()
        assert spectrum.eigenvalues is not None
        np.testing.assert_allclose(spectrum.eigenvalues, values, rtol=1e-7, atol=1e-9 * values[-1])


def test_exact_keeps_to_its_limits_and_says_what_it_left_out() -> None:
    operator = GaussNewton(*_args(30))
    dual, matrix = exact_routes(operator)
    assert (dual.name, matrix.name) == ("dual", "dense")
    assert dual.bytes < matrix.bytes
    assert "rather than dense" in exact(operator, max_memory=dual.bytes).method
    wide = GaussNewton(*_args(600, width=6))
    matrix, dual = exact_routes(wide)
    assert matrix.bytes < dual.bytes
    with pytest.raises(ValueError, match="take fewer samples, or estimate it"):
        exact(wide, max_memory=matrix.bytes // 2)
    with pytest.raises(ValueError, match="left out for time"):
        exact(wide, max_seconds=0.0)


def _args(samples: int, width: int = 24) -> tuple[Any, ...]:
    net, batch = _setting(samples, width)
    return net, F.cross_entropy, batch


@pytest.mark.parametrize("problem", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_dual_that_runs_out_of_memory_is_followed_by_the_matrix(problem: BaseException, monkeypatch: Any) -> None:
    operator = GaussNewton(*_args(30))
    reference = exact(operator).eigenvalues

    def fails(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr(sys.modules[exact_function.__module__], "dual_gram", fails)
    spectrum = exact(operator)
    assert spectrum.method.startswith("exact, dense")
    assert any("dual" in note and "ran out of memory" in note for note in spectrum.notes)
    np.testing.assert_allclose(spectrum.eigenvalues, reference, rtol=1e-6, atol=1e-10)


def test_a_general_error_is_not_taken_for_a_lack_of_memory(monkeypatch: Any) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(sys.modules[exact_function.__module__], "dual_gram", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        exact(GaussNewton(*_args(30)))


def test_blocks_of_vectors_shrink(monkeypatch: Any) -> None:
    batched = ladder_module.batched

    def small_device(one: Any) -> Any:
        run = batched(one)

        def many(block: tuple[Tensor, ...]) -> Any:
            if block[0].shape[0] > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return run(block)

        return many

    H = Hessian(*_args(20))
    reference = dense(H)
    monkeypatch.setitem(ladder_module._BLOCKS, "vmap", small_device)
    H = Hessian(*_args(20))  # another module: nothing is remembered
    monkeypatch.setattr(ladder_module, "batched", small_device)
    torch.testing.assert_close(dense(H), reference)
    assert H.chunk == 4
    assert [n for n in H.notes if "out of memory" in n] == ["out of memory: blocks of 4 vectors from here on"]


class _Small(nn.Module):
    """A device on which a graph of more than `limit` samples does not fit, while a plain forward pass does."""

    def __init__(self, inner: nn.Module, limit: int, problem: BaseException) -> None:
        super().__init__()
        self.inner, self.limit, self.problem = inner, limit, problem

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.shape[0] > self.limit:
            raise self.problem
        return self.inner(x)


@pytest.mark.parametrize("kind", [Hessian, GaussNewton, Fisher, GradientCovariance])
@pytest.mark.parametrize(
    "problem", [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), MemoryError()]
)
def test_batches_are_cut_until_a_graph_fits(kind: type[Curvature], problem: BaseException) -> None:
    net, (x, y) = _setting(21, width=5)
    y[3] = -100
    whole = kind(net, F.cross_entropy, (x, y))
    if kind is GradientCovariance:
        whole.gradient()  # type: ignore[attr-defined]
    operator = kind(_Small(net, 6, problem), F.cross_entropy, (x, y))
    if kind is GradientCovariance:
        operator._mean = whole._mean  # type: ignore[attr-defined]
    torch.testing.assert_close(dense(operator), dense(whole), rtol=1e-10, atol=1e-13)
    assert any("batches are cut into parts of at most 6 samples" in note for note in operator.notes)
    assert not operator.keep


def test_samples_that_depend_on_one_another_are_not_cut() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    x, y = torch.randn(16, 8, dtype=torch.float64), torch.randint(0, 3, (16,))
    operator = Hessian(_Small(net, 6, MemoryError()), F.cross_entropy, (x, y))
    with pytest.raises(MemoryError):
        dense(operator)


def test_max_memory_cuts_batches_and_blocks_go_by_the_whole() -> None:
    net, (x, y) = _setting(64, width=5)
    plain = Hessian(net, F.cross_entropy, (x, y))
    part = Hessian(net, F.cross_entropy, (x[:16], y[:16]))
    quarter = part.footprint().product(1)
    tight = Hessian(net, F.cross_entropy, (x, y), max_memory=quarter)
    assert max(b.samples for b in tight.batches) == 16
    assert any("recomputed" in note for note in tight.notes)
    torch.testing.assert_close(dense(tight), dense(plain), rtol=1e-10, atol=1e-13)
    for name, block in layer_blocks(tight).items():
        assert type(block).__name__ == "_Restricted"  # a shared graph would be a kept graph
        torch.testing.assert_close(dense(block), dense(layer_blocks(plain)[name]), rtol=1e-10, atol=1e-13)
    none = Hessian(net, F.cross_entropy, (x, y), max_memory=0)
    assert any("is not kept to" in note for note in none.notes)


def test_graphs_of_many_batches_are_kept_while_they_fit_half_of_what_is_free(monkeypatch: Any) -> None:
    net, (x, y) = _setting(40, width=5)
    pieces = list(zip(x.split(10), y.split(10), strict=True))
    plain = Hessian(net, F.cross_entropy, pieces)
    one = Hessian(net, F.cross_entropy, pieces[0]).footprint()
    assert plain.footprint(keep=True).kept == 4 * one.kept
    assert plain.footprint(keep=False).kept == one.kept
    need = plain.footprint(keep=True).product(1)
    V = torch.randn(plain.shape[1], 2, dtype=torch.float64)
    for free, kept in ((2 * need, True), (2 * need - 2, False)):
        monkeypatch.setattr("torch_rmt.operators.curvature.free_bytes", lambda _, free=free: free)
        operator = Hessian(net, F.cross_entropy, pieces)
        assert operator.keep == kept
        assert any("recomputed in every product" in note for note in operator.notes) != kept
        torch.testing.assert_close(operator.matmat(V), plain.matmat(V), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_the_dual_of_an_operator_that_was_cut_is_the_dual_of_the_whole(kind: Any) -> None:
    net, (x, y) = _setting(32, width=5)
    whole = Fisher(net, F.cross_entropy, (x, y), kind=kind)
    quarter = Fisher(net, F.cross_entropy, (x[:8], y[:8])).footprint().product(1)
    tight = Fisher(net, F.cross_entropy, (x, y), kind=kind, max_memory=quarter)
    assert len(tight.batches) == 4
    gram = dual_gram(tight)
    assert gram.method == "Gram matrices of the modules"
    torch.testing.assert_close(gram.matrix, dual_gram(whole).matrix)


def test_affordable_spectrum_is_exact_where_that_is_cheaper_and_keeps_to_its_seconds() -> None:
    generator = torch.Generator().manual_seed(0)
    few = GaussNewton(*_args(30))
    assert affordable_spectrum(few, generator).method.startswith("exact, dual")
    hessian = Hessian(*_args(100, width=60))
    spectrum = affordable_spectrum(hessian, generator, products=80)
    assert re.search(r"slq.*\(lanczos \(", spectrum.method)
    assert spectrum.matvecs <= 80
    values = np.linalg.eigvalsh(dense(hessian).numpy())
    value, error = spectrum.moment(2)
    assert abs(value - (values**2).mean()) < 5 * error
    from torch_rmt.operators import cost

    tight = affordable_spectrum(hessian, generator, products=10**6, max_seconds=20 * cost(hessian).seconds)
    assert tight.matvecs < 200
    assert any("allow no more" in note for note in tight.notes)
    with pytest.raises(ValueError, match="use fewer samples"):
        affordable_spectrum(hessian, generator, max_seconds=1e-12)


def test_a_loss_that_is_not_convex_goes_by_the_matrix() -> None:
    net, (x, _) = _setting(30)
    operator = GaussNewton(net, lambda o, t: torch.cos(o - t).mean(), (x, torch.randn(30, 3, dtype=torch.float64)))
    spectrum = exact(operator)
    assert spectrum.method.startswith("exact, dense")
    assert any("not convex" in note for note in spectrum.notes)
    assert spectrum.eigenvalues is not None
    assert spectrum.eigenvalues[0] < 0


@pytest.mark.skipif(sys.platform != "linux", reason="address space limits")
def test_a_real_lack_of_memory() -> None:
    """A process whose address space ends: the graph of all samples does not fit, parts of it do."""
    script = """
        import resource, torch
        from torch import nn
        from torch_rmt.operators import Hessian
        torch.set_num_threads(1)
        torch.manual_seed(0)
        layers = [m for _ in range(8) for m in (nn.Linear(32, 32), nn.Tanh())]
        net = nn.Sequential(nn.Linear(4, 32), *layers, nn.Linear(32, 1)).double()
        x, y = torch.randn(24000, 4).double(), torch.randn(24000, 1).double()
        loss = nn.MSELoss()
        parts = Hessian(net, loss, list(zip(x.split(1000), y.split(1000))), max_memory=10**8)
        v = torch.randn(parts.shape[0], 1).double()
        expected = parts.matmat(v)
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 150 * 2**20, -1))
        H = Hessian(net, loss, (x, y))
        torch.testing.assert_close(H.matmat(v), expected, rtol=1e-9, atol=1e-12)
        assert any("out of memory" in note for note in H.notes), H.notes
        print(H.notes)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "parts" in run.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="address space limits")
def test_a_real_lack_of_memory_with_several_batches() -> None:
    """The allocator itself refuses: graphs are recomputed, batches cut, and the product is that of a free process."""
    script = """
        import resource, torch
        from torch import nn
        from torch_rmt.operators import GaussNewton, Hessian
        torch.set_num_threads(1)
        torch.manual_seed(0)
        layers = [m for _ in range(8) for m in (nn.Linear(32, 32), nn.Tanh())]
        net = nn.Sequential(nn.Linear(4, 32), *layers, nn.Linear(32, 1)).double()
        x, y = torch.randn(12000, 4).double(), torch.randn(12000, 1).double()
        sizes = [5000, 4000, 3000]
        v = torch.randn(sum(p.numel() for p in net.parameters()), 2).double()
        for kind, rooms in ((Hessian, (1000, 80, 35, 25, 20)), (GaussNewton, (1000, 30, 22, 16, 12))):
            said = ""
            for room in rooms:  # how much fits into a room depends on what the allocator holds: smaller until it is cut
                H = kind(net, nn.MSELoss(), list(zip(x.split(sizes), y.split(sizes))))
                size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (size + room * 2**20, -1))
                image = H.matmat(v)
                resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
                expected = image if room == 1000 else expected
                torch.testing.assert_close(image, expected, rtol=1e-9, atol=1e-12)
                said = " ".join(n for n in H.notes if "out of memory" in n or "cut" in n)
                assert not (said and room == 1000), said
                print(kind.__name__, room, said)
                if "are cut into parts" in said or (said and kind is GaussNewton):
                    break
            assert said
    """
    # Buffers go back to the system when they are freed, so that each round starts from the same size.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("are recomputed in every product") >= 2, run.stdout
    assert "batches are cut into parts" in run.stdout, run.stdout


def test_a_custom_part_goes_by_products_and_is_counted_so() -> None:
    torch.manual_seed(0)
    net = Calls(lambda m, x: m.out(x * m.scale.weight[0]), scale=nn.Linear(8, 1), out=nn.Linear(8, 3)).double()
    few = NeuralTangentKernel(net, torch.randn(40, 8, dtype=torch.float64))
    counts = dual_counts(few)
    assert (counts.rows, counts.rows_by_products) == (120, 120)
    gram = dual_gram(few)
    assert "2 parameters by products" in gram.method
    torch.testing.assert_close(gram.matrix, dense(few))


def test_a_module_that_is_the_whole_model_is_contracted() -> None:
    torch.manual_seed(0)
    G = GaussNewton(nn.Linear(8, 3).double(), F.cross_entropy, _setting(20)[1])
    gram = dual_gram(G)
    assert gram.method == "Gram matrices of the modules"
    torch.testing.assert_close(gram.eigenvalues()[-20:], torch.linalg.eigvalsh(dense(G))[-20:], rtol=1e-8, atol=1e-12)


def test_the_dual_takes_half_of_what_is_free_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = GaussNewton(*_args(30))
    expected, need = dual_gram(operator).matrix, dual_bytes(operator, dual_counts(operator))
    monkeypatch.setattr("torch_rmt.operators.dual_counts.free_bytes", lambda _: 2 * need)
    torch.testing.assert_close(dual_gram(operator).matrix, expected)
    monkeypatch.setattr("torch_rmt.operators.dual_counts.free_bytes", lambda _: 2 * need - 2)
    with pytest.raises(ValueError, match="use fewer samples"):
        dual_gram(operator)


def test_what_was_left_out_for_time_is_not_done_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine slow at eigenvalues the matrix is left out; a budget beyond the dimension does not bring it back."""
    monkeypatch.setattr(sys.modules["torch_rmt.operators.plan"], "machine_speed", lambda _: 1.0)
    hessian = Hessian(*_args(40, width=4))
    found = affordable_spectrum(hessian, torch.Generator().manual_seed(0), products=10**5, max_seconds=1e5)
    assert not found.method.startswith("exact"), found.method
    assert found.matvecs < hessian.shape[0]
    assert any("left out for time" in note for note in found.notes)
