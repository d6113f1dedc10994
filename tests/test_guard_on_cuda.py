"""The guard where there is a GPU, tried with `torch.cuda` put in the place of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.pretended_device import OnDevice, on_device, pretended_device
from torch_rmt.guard import undisturbed
from torch_rmt.operators import Hessian


class Driver:
    """Two devices with a random state each."""

    def __init__(self) -> None:
        self.states = [torch.full((4,), i, dtype=torch.uint8) for i in range(2)]
        self.awake = True

    def get(self, index: int) -> Tensor:
        return self.states[index].clone()

    def set(self, state: Tensor, index: int) -> None:
        self.states[index] = state.clone()

    def seed(self, seed: int) -> None:
        self.states = [torch.full((4,), seed % 200, dtype=torch.uint8) for _ in range(2)]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    for name, function in {
        "is_available": lambda: True,
        "is_initialized": lambda: driver.awake,
        "device_count": lambda: 2,
        "get_rng_state": driver.get,
        "set_rng_state": driver.set,
        "manual_seed_all": driver.seed,
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return driver


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("fails", [False, True])
def test_the_random_state_of_every_device_is_put_back(driver: Driver, fails: bool) -> None:
    try:
        with undisturbed(nn.Linear(2, 2)):
            torch.cuda.manual_seed_all(7)
            assert [int(s[0]) for s in driver.states] == [7, 7]
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert [int(s[0]) for s in driver.states] == [0, 1]


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_driver_that_sleeps_is_not_woken(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def wake(*_: Any) -> None:
        raise AssertionError("woken")

    driver.awake = False
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, wake)
    with undisturbed(nn.Linear(2, 2)):
        pass


def test_autocast_of_the_device_is_off_inside() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), undisturbed(nn.Linear(2, 2)):
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_enabled("cuda")


def test_buffers_come_back_without_a_question_and_keep_their_version() -> None:
    """One question a buffer would hold the device up; a new version would break a graph that holds the buffer."""
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    with pretended_device() as device:
        on_device(net)
        mean = net[0].running_mean
        version, before = mean._version, device.waits
        with undisturbed(net):
            net(OnDevice(torch.randn(5, 3) + 4.0))
            assert device.waits == before
        assert device.waits == before
        assert mean._version <= version + 1  # that of the forward pass itself
        assert not mean.held.any()
        assert net[0].running_mean is mean


def test_dropout_is_seeded_on_the_device() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    with pretended_device() as device:
        x, y = OnDevice(torch.randn(5, 3)), OnDevice(torch.randint(0, 2, (5,)))
        H = Hessian(on_device(net), F.cross_entropy, (x, y))
        H.matmat(torch.ones(H.shape[0], 1, device="cuda"))
        assert device.seeded >= 3
