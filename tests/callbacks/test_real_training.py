"""Modules and loops as people have them: training with a callback is, bit for bit, training without it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.callbacks.runs import Classifier, blobs, differences, everything, fit, mlp
from torch_rmt.callbacks import CriticalInit, CurvatureSpectrum, JacobianSpectrum, SpectralMonitor
from torch_rmt.callbacks.base import Point, _freeze_untrained
from torch_rmt.callbacks.budget import gradient_seconds
from torch_rmt.compare import Report


class Keep:
    def __init__(self) -> None:
        self.reports: list[Report] = []

    def write(self, report: Report, step: int) -> None:
        self.reports.append(report)


def watchers() -> list[Any]:
    """What is cheap to measure, and goes through forward mode, reverse mode and the losses."""
    once = {"schedule": lambda step: step == 1, "max_seconds": 1e9, "sinks": [Keep()]}
    return [JacobianSpectrum(**once), CurvatureSpectrum(what=["fisher"], **once)]


class Users(Classifier):
    """A classifier that keeps what its user counts."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.batches: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(batch[0].clone())
        return super().training_step(batch, batch_idx)

    def users(self) -> Any:
        return self.batches


class FirstInPlace(Users):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)))


class Noise(nn.Module):
    """Draws from generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.torch = torch.Generator().manual_seed(1)
        self.others = {"numpy": np.random.default_rng(1), "python": random.Random(1)}

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.others["numpy"].standard_normal() + self.others["python"].random()
        return x + 0.01 * torch.randn(x.shape, generator=self.torch) + 0.01 * drawn


class Noisy(Users):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(12, 8), Noise(), nn.Tanh(), nn.Linear(8, 3)))

    def users(self) -> Any:
        noise = self.net[1]
        return noise.torch.get_state(), noise.others["python"].getstate(), noise.others["numpy"].bit_generator.state


class Hooked(Users):
    """Counts its calls in the ways of hooks; those on parameters wait for the gradients of training."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.calls: list[str] = []
        forward, backward = [], []
        self.kept = forward, backward
        self.net[0].register_forward_hook(lambda module, args, output: forward.append(output.shape))
        self.net[2].weight.register_hook(lambda gradient: backward.append(gradient.sum().item()))
        self.net[4].register_forward_pre_hook(self.count)

    def count(self, module: nn.Module, args: Any) -> None:
        self.calls.append(type(module).__name__)

    def users(self) -> Any:
        return self.calls, self.kept


class Spectral(Users):
    """The norm is estimated by power iteration: its vectors are buffers that every call in train mode moves."""

    def __init__(self) -> None:
        norm = nn.utils.parametrizations.spectral_norm
        super().__init__(nn.Sequential(norm(nn.Linear(12, 8)), nn.Tanh(), norm(nn.Linear(8, 8)), nn.Linear(8, 3)))


MODULES = {cls.__name__: cls for cls in (FirstInPlace, Noisy, Hooked, Spectral)}


def run(make: Callable[[], Any], callbacks: list[Any], **settings: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    module = make()
    trainer = fit(module, callbacks, seed=3, epochs=1, **settings)
    return everything(trainer, module) | {"user's": getattr(module, "users", list)()}


@pytest.mark.parametrize("name", MODULES)
def test_modules_with_a_will_of_their_own(name: str) -> None:
    callbacks = watchers()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=RuntimeWarning, message=".*Spectr")
        assert differences(run(MODULES[name], []), run(MODULES[name], callbacks)) == []
    assert all(callback.latest for callback in callbacks)


def test_lazy_modules_stay_lazy_until_training_runs_them() -> None:
    class Lazy(Users):
        def __init__(self) -> None:
            layers = nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(3)
            super().__init__(nn.Sequential(*layers))

    settings = {"schedule": lambda step: step in (0, 1), "max_seconds": 1e9, "sinks": [Keep()]}
    callback = CurvatureSpectrum(what=["fisher"], **settings)
    without = run(Lazy, [])
    with pytest.warns(
        RuntimeWarning, match=r"at step 0.*'net.0.weight' of Lazy has no shape yet: run the lazy modules"
    ):
        within = run(Lazy, [callback])
    for found in (without, within):
        del found["python rng"]  # the tests' type checks draw from it, on the call that is refused
    assert differences(without, within) == []
    assert callback.latest


def test_averages_that_no_optimiser_holds_are_no_parameters() -> None:
    class Averaged(Users):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.average = torch.optim.swa_utils.AveragedModel(self.net)

        def on_train_batch_end(self, *_: Any) -> None:
            self.average.update_parameters(self.net)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.net.parameters(), lr=0.01)

        def users(self) -> Any:
            return [p.requires_grad for p in self.parameters()]

    callback = watchers()[1]
    without, within = run(Averaged, []), run(Averaged, [callback])
    assert differences(without, within) == []
    assert all(within["user's"])
    assert callback.latest["fisher"].spectrum.dim == sum(p.numel() for p in mlp().parameters())


class Counting(nn.CrossEntropyLoss):
    """A loss of the callback's own, which no module holds."""

    calls = 0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(output, target)


class Labelled(Dataset):
    """Samples as keywords, the targets among them."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = blobs()[index]
        return {"x": x, "labels": y}


def test_mappings_with_labels_are_read() -> None:
    class Keywords(Users):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["x"], batch["labels"]), batch_idx)

    def loader() -> DataLoader:
        return DataLoader(Labelled(), batch_size=16)

    without = run(lambda: Keywords(mlp()), [], data=loader())
    by_rule, (_, by_hand) = watchers(), watchers()
    assert differences(without, run(lambda: Keywords(mlp()), by_rule, data=loader())) == []
    by_hand.loss = Counting()
    by_hand.batch = lambda batch: (batch.pop("x"), batch.pop("labels"))  # takes apart what the training step needs
    assert differences(without, run(lambda: Keywords(mlp()), [by_hand], data=loader())) == []
    assert by_hand.loss.calls == 0
    assert by_rule[0].latest["jacobian"].spectrum.dim == 8
    one, other = (callback.latest["fisher"].spectrum.nodes for callback in (by_rule[1], by_hand))
    np.testing.assert_array_equal(one, other)


def test_two_of_a_kind_have_names_in_logs_and_checkpoints(tmp_path: Path) -> None:
    keep = Keep()
    settings = {"schedule": lambda step: step == 0, "max_seconds": 1e9, "sinks": [keep]}
    first = JacobianSpectrum(source="net.0", target="net.4", **settings)
    second = JacobianSpectrum(source="net.2", target="net.4", name="late", **settings)
    trainer = fit(Classifier(mlp()), [first, second], epochs=1)
    assert {report.name for report in keep.reports} == {"jacobian", "late/jacobian"}
    assert first.latest.keys() == second.latest.keys() == {"jacobian"}
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"]
    assert saved.keys() >= {"JacobianSpectrum", "JacobianSpectrum(late)"}
    with pytest.raises(ValueError, match=r"SpectralMonitor and JacobianSpectrum both log jacobian: .*name="):
        fit(Classifier(mlp()), [SpectralMonitor(sinks=[keep]), JacobianSpectrum(sinks=[keep])])


def test_an_interrupt_in_the_middle_of_a_measurement_leaves_nothing_behind() -> None:
    class Interrupts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise KeyboardInterrupt
            return x

    seen: list[Any] = []

    class Watch(type(JacobianSpectrum()).__mro__[2]):  # Lightning's callback
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(torch.get_rng_state())

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            modes = {module.training for module in pl_module.modules()}
            seen.append((torch.get_rng_state(), modes, "log" in vars(pl_module), torch.is_grad_enabled()))

    module = Classifier(nn.Sequential(nn.Linear(12, 8), Interrupts(), nn.Tanh(), nn.Linear(8, 3)))
    callback = JacobianSpectrum(schedule=lambda step: step == 1, max_seconds=1e9, sinks=[Keep()])
    with pytest.raises(SystemExit):
        fit(module, [Watch(), callback])
    state, modes, logs, gradients = seen.pop()
    assert torch.equal(state, seen[-1])
    assert modes == {True}
    assert not logs
    assert gradients
    assert callback.budget.spent > 0


def test_critical_init_reads_no_data_of_its_own() -> None:
    read: list[int] = []

    class Stream(IterableDataset):
        """Gives what it has once."""

        def __iter__(self) -> Iterator[Any]:
            x, y = blobs().tensors
            while len(read) < len(x):
                read.append(len(read))
                yield x[read[-1]], y[read[-1]]

    module = Users(mlp())
    callback = CriticalInit(batch=lambda batch: (asked.append(1), (batch.pop(0), batch.pop(0)))[1])
    asked: list[int] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="CriticalInit")
        fit(module, [callback], data=DataLoader(Stream(), batch_size=16), epochs=1, accumulate_grad_batches=2)
    assert callback.report is not None
    assert asked == [1]  # also where the first batches make no step
    assert torch.equal(torch.cat(module.batches), blobs().tensors[0])


def test_a_point_can_be_run_again_and_what_fails_costs_nothing() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return x.add_(1.0) * scale

    x = torch.ones(2)
    point = Point(Adds(), {"x": x, "scale": torch.ones(2)}, None, None)
    assert torch.equal(point.output(), point.output())
    assert torch.equal(x, torch.ones(2))
    assert gradient_seconds(Point(nn.Linear(3, 2), x, None, None)) == 0.0  # shapes that do not fit
    assert gradient_seconds(Point(nn.Linear(2, 2), x, None, None)) > 0.0


def test_nothing_is_frozen_where_the_optimiser_holds_other_tensors() -> None:
    class Trainer:
        optimizers = (torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1),)

    module = mlp()
    _freeze_untrained(Trainer(), module)
    assert all(p.requires_grad for p in module.parameters())
