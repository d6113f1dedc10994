"""Nothing outside `undisturbed` notices what happens inside, not even after an exception."""

from __future__ import annotations

import functools
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from torch_rmt.guard import undisturbed

KERNELS = (  # of attention; the last alone can be differentiated twice
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.math_sdp_enabled,
)
CUDNN_FLAGS = ("enabled", "benchmark", "deterministic", "allow_tf32")


def _net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    net.history = [1, 2]
    net.seen = {1}
    net.count = 0
    net(torch.randn(5, 3)).sum().backward()
    return net.train()


def _wreck(net: nn.Module) -> None:
    net.eval()
    net.count += 1
    net.history.append(3)
    net.seen.add(3)
    net.extra = torch.ones(1)
    net[0].register_forward_hook(lambda *_: None)
    net[3].weight.requires_grad_(False)
    with torch.enable_grad():
        net(torch.randn(5, 3)).sum().backward()
    net[0].bias.grad = None
    net[1].running_mean.add_(1.0)
    net[1].num_batches_tracked = torch.tensor(99)
    torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(1)
    for flag in CUDNN_FLAGS:
        setattr(torch.backends.cudnn, flag, not getattr(torch.backends.cudnn, flag))


def _state(net: nn.Module) -> list[Any]:
    tensors = [t.clone() for t in (*net.parameters(), *net.buffers())]
    gradients = [p.grad.clone() for p in net.parameters()]
    rest = [
        [m.training for m in net.modules()],
        [p.requires_grad for p in net.parameters()],
        [id(p.grad) for p in net.parameters()],
        [sorted(vars(m)) for m in net.modules()],
        (net.count, list(net.history), set(net.seen), len(net[0]._forward_hooks)),
        [getattr(torch.backends.cudnn, flag) for flag in CUDNN_FLAGS],
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        [kernel() for kernel in KERNELS],
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
    ]
    return [*tensors, *gradients, torch.get_rng_state(), *rest]


def _equal(a: list[Any], b: list[Any]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails: bool) -> None:
    net = _net()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        guard = undisturbed(net)  # beartype may draw from Python's generator on the call: before the state is taken
        before = _state(net)
        try:
            with guard:
                assert torch.is_grad_enabled()
                assert all(p.grad is None for p in net.parameters())
                assert not torch.is_autocast_enabled("cpu")
                assert [kernel() for kernel in KERNELS] == [False, False, True]
                with torch.no_grad():
                    _wreck(net)
                if fails:
                    raise KeyError("inside")
        except KeyError:
            assert fails
        _equal(before, _state(net))


def test_inference_mode_is_left_and_entered_again() -> None:
    net = _net()
    with torch.inference_mode():
        with undisturbed(net):
            x = torch.randn(2, 3, requires_grad=True)
            (g,) = torch.autograd.grad(net.eval()(x).sum(), x)
            assert g.shape == x.shape
        assert torch.is_inference_mode_enabled()
    assert net.training


def test_training_with_a_measurement_in_between_is_bit_identical() -> None:
    from torch_rmt.operators import Hessian

    def train(measure: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(5):
            x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            if measure:
                H = Hessian(net, nn.functional.cross_entropy, (x, y))
                H.matmat(torch.ones(H.shape[0], 2))
            optimizer.step()
        return [t.clone() for t in net.state_dict().values()] + [torch.get_rng_state()]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_compiled_modules_are_measured_eagerly() -> None:
    from torch_rmt.operators import Hessian, dense

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    compiled = torch.compile(net, backend="eager")
    refuses = torch.compile(net[0], backend=lambda *_: pytest.fail("was compiled"))
    with undisturbed(refuses):
        assert torch.equal(refuses(x), net[0](x))
    torch.testing.assert_close(
        dense(Hessian(compiled, nn.functional.mse_loss, (x, y))),
        dense(Hessian(net, nn.functional.mse_loss, (x, y))),
    )


COUNTED = {"calls": 0}
TOTAL = 0


def test_what_hooks_write_is_put_back() -> None:
    class Meter:
        def __init__(self) -> None:
            self.calls, self.kept = 0, deque([0])

        def __call__(self, *_: Any) -> None:
            self.calls += 1
            self.kept.append(self.calls)

    closed, meter, held = [0], Meter(), 0
    inner = Meter()

    def closure(*_: Any) -> None:
        nonlocal held
        held += 1
        closed.append(held)
        inner()

    def globally(*_: Any) -> None:
        global TOTAL
        TOTAL += 1
        COUNTED["calls"] += 1

    def wrapped(times: list[int], *_: Any) -> None:
        times.append(1)
        closure()

    times = [1]
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for hook in (meter, meter.__call__, closure, globally, functools.partial(wrapped, times)):
        net[0].register_forward_hook(hook)
    net[1].register_forward_pre_hook(closure)
    net[1].register_full_backward_hook(closure)

    def state() -> list[Any]:
        return [meter.calls, list(meter.kept), list(closed), held, inner.calls, dict(COUNTED), TOTAL, list(times)]

    net(torch.ones(1, 2)).sum().backward()
    before = state()
    with undisturbed(net):
        net(torch.ones(1, 2)).sum().backward()
        assert all(now != then for now, then in zip(state(), before, strict=True))
    assert state() == before


def test_contents_of_containers_and_own_generators_are_put_back() -> None:
    net = nn.Linear(2, 2)
    net.queue, net.nested = deque([1], maxlen=3), {"list": [1], "deep": {"set": {1}}}
    net.generators = [torch.Generator().manual_seed(1), np.random.default_rng(1), random.Random(1)]
    net.legacy = np.random.RandomState(1)

    def drawn() -> list[Any]:
        first, second, third = net.generators
        return [torch.rand(1, generator=first).item(), second.random(), third.random(), net.legacy.rand()]

    with undisturbed(net):
        inside = drawn()
        net.queue.append(2)
        net.nested["list"].append(2)
        net.nested["deep"]["set"].add(2)
    assert drawn() == inside
    assert (list(net.queue), net.nested) == ([1], {"list": [1], "deep": {"set": {1}}})


@pytest.mark.parametrize("lazy", [nn.LazyLinear(2), nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False))])
def test_lazy_modules_are_refused_by_name(lazy: nn.Module) -> None:
    with (
        pytest.raises(ValueError, match=r"'(weight|1.running_mean)' of \w+ has no shape yet: run the lazy"),
        undisturbed(lazy),
    ):
        pass
