from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.callbacks.runs import Classifier, blobs, fit, mlp, norm_and_dropout
from tests.cases import CALLBACKS
from torch_rmt.callbacks import CurvatureSpectrum, JacobianSpectrum, SpectralMonitor
from torch_rmt.compare import Report
from torch_rmt.operators import Jacobian
from torch_rmt.spectra import exact


def always(step: int) -> bool:
    return True


#: A test must not depend on how busy the machine is.
ALWAYS: dict[str, Any] = {"schedule": always, "max_seconds": 1e9}
SELDOM: dict[str, Any] = {"schedule": lambda step: step in (0, 4), "max_seconds": 1e9}


class Keep:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.reports: list[tuple[int, Report]] = []

    def write(self, report: Report, step: int) -> None:
        self.reports.append((step, report))

    def steps(self, name: str) -> list[int]:
        return [step for step, report in self.reports if report.name == name]


def rows(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = folder.rglob("events.out.*")
    events = EventAccumulator(str(path))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


# --- what is logged, and where --------------------------------------------------------------------------


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """To draw them takes longer than to measure."""
    monkeypatch.setattr("torch_rmt.sinks.TensorBoardSink.write_pictures", lambda *_: None)


@pytest.mark.usefixtures("_no_pictures")
def test_every_logger_gets_every_scalar_under_its_own_separator(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "csv")
    board = TensorBoardLogger(tmp_path / "board")
    keep = Keep()
    torch.manual_seed(0)
    fit(Classifier(mlp()), [SpectralMonitor(**SELDOM, sinks=[keep])], logger=[logger, board])
    board.finalize("success")
    in_board, in_csv = scalars(tmp_path / "board"), rows(tmp_path / "csv")
    assert {report.name for _, report in keep.reports} == {"jacobian", "hessian", "fisher"}
    assert len({(step, report.name) for step, report in keep.reports}) == len(keep.reports)
    for step, report in keep.reports:
        for key, value in report.scalars().items():
            if key.count("/") > 1:
                assert f"{report.name}/{key}" not in in_board
                continue
            tag = f"{report.name}/{key}"
            assert in_board[tag][step] == pytest.approx(value, rel=1e-5)
            written = {float(row[tag]) for row in in_csv if row["step"] == str(step) and row[tag]}
            assert any(other == pytest.approx(value, rel=1e-6) for other in written)
    lines = [json.loads(line) for line in (Path(logger.log_dir) / "spectra.jsonl").read_text().splitlines()]
    assert [(line["step"], line["name"]) for line in lines] == [(s, r.name) for s, r in keep.reports]


def test_pictures_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoardLogger(tmp_path)
    torch.manual_seed(0)
    fit(Classifier(mlp()), [SpectralMonitor(schedule=lambda step: False, max_seconds=1e9)], logger=board, epochs=1)
    board.finalize("success")
    (path,) = tmp_path.rglob("events.out.*")
    events = EventAccumulator(str(path))
    events.Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {f"{name}/spectrum" for name in ("jacobian", "hessian", "fisher")}
    assert set(tags["histograms"]) == {
        "jacobian/log10_eigenvalues",
        "hessian/eigenvalues",
        "fisher/eigenvalues",
    }


@pytest.mark.usefixtures("_no_pictures")
def test_no_flood_of_charts(tmp_path: Path) -> None:
    def network(depth: int) -> nn.Module:
        hidden = [m for _ in range(depth) for m in (nn.Linear(8, 8), nn.Tanh())]
        return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), *hidden, nn.Linear(8, 3))

    counts = []
    for name, net in {"deep": network(4), "shallow": network(1)}.items():
        board = TensorBoardLogger(tmp_path / name)
        fit(Classifier(net), [SpectralMonitor(**SELDOM)], logger=board, epochs=1)
        board.finalize("success")
        counts.append(len([tag for tag in scalars(tmp_path / name) if "/" in tag]))
    assert counts[0] == counts[1] <= 60


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("seed", [0])
def test_the_point_at_x_has_the_weights_of_the_loss_at_x(accumulate: int, seed: int, tmp_path: Path) -> None:
    class Recording(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            weights = {k: v.clone() for k, v in self.net.state_dict().items()}
            loss = super().training_step(batch, batch_idx)
            self.before.append((weights, batch[0][:1].clone(), float(loss)))
            return loss

    torch.manual_seed(seed)
    module = Recording(mlp())
    module.before = []
    keep = Keep()
    callback = JacobianSpectrum(source="net.0", target="net.6", **ALWAYS, sinks=[keep])
    fit(
        module,
        [callback],
        logger=CSVLogger(tmp_path),
        seed=seed,
        accumulate_grad_batches=accumulate,
        epochs=1 * accumulate,
        data=DataLoader(blobs(64), batch_size=16, shuffle=True),
    )
    assert callback.first["jacobian"] is keep.reports[0][1]
    assert callback.latest["jacobian"] is keep.reports[-1][1]
    assert callback._last_batch is None  # let go of
    steps = len(module.before) // accumulate
    # One at every step, and one more when training has ended.
    assert keep.steps("jacobian") == list(range(steps + 1))
    losses = {int(row["step"]): float(row["loss"]) for row in rows(tmp_path) if row["loss"]}
    for step, report in keep.reports[:-1]:
        # self.log writes at the end of an accumulation window, we measure at its beginning: same weights.
        weights, x, _ = module.before[step * accumulate]
        last_of_window = module.before[(step + 1) * accumulate - 1][2]
        assert losses[step] == pytest.approx(last_of_window, rel=1e-6)
        net = mlp()
        net.load_state_dict(weights)
        expected = exact(Jacobian(net, x, "0", "6")).nodes
        np.testing.assert_allclose(np.sort(report.spectrum.nodes), np.sort(expected), rtol=1e-4, atol=1e-7)


def test_sanity_checking_and_validation_measure_nothing(tmp_path: Path) -> None:
    keep = Keep()

    class Validated(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.at_validation.append(len(keep.reports))

    module = Validated(mlp())
    module.at_validation = []
    trainer_data = DataLoader(blobs(), batch_size=16)
    module.val_dataloader = lambda: DataLoader(blobs(), batch_size=16)  # type: ignore[method-assign]
    fit(
        module,
        [JacobianSpectrum(schedule=lambda s: s == 0, max_seconds=1e9, sinks=[keep])],
        data=trainer_data,
        num_sanity_val_steps=2,
    )
    assert module.at_validation[:2] == [0, 0]
    assert len(keep.reports) == 2


def test_both_lightning_packages_take_the_callbacks(tmp_path: Path) -> None:
    import lightning.pytorch as other

    class Module(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.criterion(self.net(batch[0]), batch[1])

        criterion = staticmethod(nn.functional.cross_entropy)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    monitor = SpectralMonitor(max_seconds=1e9)
    trainer = other.Trainer(
        max_epochs=1, callbacks=[monitor], logger=other.loggers.CSVLogger(tmp_path), accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(blobs(), batch_size=16))
    assert set(monitor.latest) == {"jacobian", "hessian", "fisher"}


# --- what goes wrong ------------------------------------------------------------------------------------


class NeedsCompany(nn.Module):
    """Raises on a single sample, which is what a Jacobian is measured on."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] < 2:
            raise RuntimeError("one sample is not enough for me")
        return x


def messages(caught: list[warnings.WarningMessage]) -> list[str]:
    said = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    return [message for message in said if message.startswith(tuple(CALLBACKS))]


def test_a_measurement_that_fails_warns_once_and_training_goes_on() -> None:
    network = nn.Sequential(nn.Linear(12, 8), NeedsCompany(), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    module = Classifier(network)
    monitor = SpectralMonitor(**SELDOM, sinks=[Keep()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, [monitor])
    (message,) = messages(caught)
    assert trainer.global_step == 6
    assert message.startswith("SpectralMonitor could not measure the jacobian spectrum at step 0 in layer 'net.1'")
    assert "RuntimeError: one sample is not enough for me" in message
    assert "Training goes on" in message
    assert "JacobianSpectrum(source=" in message
    assert set(monitor.latest) == {"hessian", "fisher"}


def test_a_loss_that_is_not_finite_is_said_once_with_the_layer() -> None:
    module = Classifier(mlp())
    with torch.no_grad():
        module.net[2].weight[0, 0] = torch.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, [CurvatureSpectrum(**ALWAYS, sinks=[Keep()])])
    said = messages(caught)
    assert trainer.global_step == 6
    assert len(said) == 2
    for message, what in zip(said, ("hessian", "fisher"), strict=True):
        assert f"could not measure the {what} spectrum at step 0 in layer 'net.2.weight'" in message
        assert "'net.2.weight' is not finite" in message
        assert "lower the learning rate" in message


def test_a_batch_that_is_no_pair_is_said_once_with_the_remedy() -> None:
    class Three(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[:2], batch_idx)

    x, y = blobs().tensors
    loader = DataLoader(torch.utils.data.TensorDataset(x, y, y), batch_size=16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Three(mlp()), [CurvatureSpectrum(what=["fisher"], **ALWAYS, sinks=[Keep()])], data=loader)
    (message,) = messages(caught)
    assert "batch=lambda batch: (inputs, targets)" in message
    keep = Keep()
    callback = CurvatureSpectrum(what=["fisher"], batch=lambda b: (b[0], b[1]), max_seconds=1e9, sinks=[keep])
    fit(Three(mlp()), [callback], data=loader)
    assert keep.reports


def test_without_a_loss_the_monitor_says_so_and_measures_the_jacobian() -> None:
    class Lossless(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp())
            del self.loss_fn

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    monitor = SpectralMonitor(**SELDOM, sinks=[Keep()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Lossless(), [monitor])
    (message,) = messages(caught)
    assert "loss=lambda output, target" in message
    assert set(monitor.latest) == {"jacobian"}
    with pytest.raises(ValueError, match="loss=lambda output, target"):
        fit(Lossless(), [CurvatureSpectrum(sinks=[Keep()])])
    given = SpectralMonitor(loss=nn.functional.cross_entropy, max_seconds=1e9, sinks=[Keep()])
    fit(Lossless(), [given])
    assert set(given.latest) == {"jacobian", "hessian", "fisher"}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_loss_that_is_not_the_one_trained_is_noticed(weight: float, accumulate: int) -> None:
    class Weighted(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return weight * super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    callback = CurvatureSpectrum(what=["fisher"], **SELDOM, sinks=[Keep()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Weighted(norm_and_dropout()), [callback], accumulate_grad_batches=accumulate)
    said = messages(caught)
    assert len(said) == (weight != 1.0)
    assert all("training_step returned" in m and "loss=lambda output, target" in m for m in said)


def test_a_sink_that_fails_is_said_once_and_the_others_are_written() -> None:
    class Full:
        def write(self, report: Report, step: int) -> None:
            raise OSError("no space left on device")

    keep = Keep()
    callback = JacobianSpectrum(**SELDOM, sinks=[Full(), keep])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(Classifier(mlp()), [callback])
    (message,) = messages(caught)
    assert "could not write to Full: OSError: no space left on device" in message
    assert trainer.global_step == 6
    assert keep.steps("jacobian") == [0, 4, 6]


def test_a_loss_that_was_given_is_not_doubted() -> None:
    class Weighted(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 3.0 * super().training_step(batch, batch_idx)

    loss = nn.functional.cross_entropy
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Weighted(mlp()), [CurvatureSpectrum(what=["fisher"], loss=loss, **SELDOM, sinks=[Keep()])])
    assert messages(caught) == []


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_trainer_with_nowhere_to_write_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"nowhere to write to.*sinks="):
        fit(Classifier(mlp()), [CALLBACKS[name]()], logger=False)


def test_a_module_name_that_does_not_exist_is_named_with_the_nearest() -> None:
    callback = JacobianSpectrum(source="nett.0", target="net.6", **ALWAYS, sinks=[Keep()])
    with pytest.warns(RuntimeWarning, match=r"'nett.0'.*net.0"):
        fit(Classifier(mlp()), [callback])


def test_a_schedule_that_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError):
        SpectralMonitor(schedule=100)


# --- cost and state -------------------------------------------------------------------------------------


def test_a_spent_budget_stops_measuring_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    keep = Keep()
    monitor = SpectralMonitor(schedule=always, max_seconds=0.0, max_fraction=0.0, sinks=[keep])
    module = Classifier(mlp())
    module.net[0].register_forward_hook(lambda layer, *_: print("training" if layer.training else "measuring"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, [monitor])
    assert keep.reports == []
    said = messages(caught)
    assert len(said) == 3
    assert all("raise max_seconds" in message for message in said)
    # The gradient is timed once, not at every step that cannot afford a measurement.
    assert capsys.readouterr().out.split().count("measuring") == 3


def test_what_may_be_spent_at_the_beginning_in_between_and_at_the_end() -> None:
    """The first may take all that is left; then a quarter of what the end leaves over; the end may take all."""

    class OneProcess:
        world_size, is_global_zero = 1, True

    monitor = JacobianSpectrum(max_seconds=10.0, max_fraction=0.0)
    monitor._gradient = 0.1
    (measurement,) = monitor.measurements(True).values()

    def affords(cost: float | None, others: float = 0.0, *, last: bool = False) -> bool:
        monitor._costs = {} if cost is None else {"jacobian": cost}
        if others:
            monitor._costs["others"] = others
        return monitor._affords(OneProcess(), "jacobian", measurement, last=last)

    forecast = 0.1 * measurement.gradients
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for spent, allowed in ((10.0 - 1.01 * forecast, True), (10.0 - 0.99 * forecast, False)):
            monitor.budget.spent = spent
            assert affords(None) == allowed
        monitor.budget.spent = 4.0  # six are left
        for cost, others, last, allowed in (
            (1.15, 0.0, False, True),
            (1.25, 0.0, False, False),
            (1.15, 2.0, False, False),
            (5.9, 2.0, True, True),
            (6.1, 0.0, True, False),
        ):
            assert affords(cost, others, last=last) == allowed


def test_a_state_that_is_loaded_is_the_state_that_was_saved() -> None:
    first, second = JacobianSpectrum(), JacobianSpectrum()
    state = {"last_step": 7, "spent": 1.5, "elapsed": 30.0, "costs": {"jacobian": 0.25}}
    first.load_state_dict(state)
    assert first.state_dict() == state
    second.load_state_dict(first.state_dict())
    second.budget.start()
    again = second.state_dict()
    assert 30.0 <= again.pop("elapsed") < 60.0
    assert again.items() <= state.items()


def test_the_state_loads_with_weights_only_and_resumes(tmp_path: Path) -> None:
    first = JacobianSpectrum(**ALWAYS, sinks=[Keep()])
    torch.manual_seed(0)
    trainer = fit(Classifier(mlp()), [first], epochs=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    assert state["spent"] == first.budget.spent > 0
    assert state["costs"].keys() == {"jacobian"}
    assert 0 < state["costs"]["jacobian"] <= state["spent"]
    keep = Keep()
    second = JacobianSpectrum(**ALWAYS, sinks=[keep])
    torch.manual_seed(0)
    module = Classifier(mlp())
    trainer = fit_from(module, [second], tmp_path / "run.ckpt", epochs=2)
    assert second.budget.spent > first.budget.spent
    # Step 3 was measured when the first run ended.
    assert keep.steps("jacobian") == [4, 5, 6]


def fit_from(module: Any, callbacks: list[Any], path: Path, *, epochs: int) -> Any:
    import pytorch_lightning as pl

    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=callbacks, logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(blobs(), batch_size=16, shuffle=True), ckpt_path=str(path))
    return trainer


def test_self_log_in_forward_is_silent_while_measuring(tmp_path: Path) -> None:
    calls: list[bool] = []

    class Chatty(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.log("size", out.abs().mean())
            calls.append(self.training)
            return out

    module = Chatty(mlp())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=RuntimeWarning, message="CurvatureSpectrum")
        fit(module, [CurvatureSpectrum(what=["fisher"], **SELDOM)], logger=CSVLogger(tmp_path))
    assert calls.count(True) == 7  # six steps, and one look at the loss
    assert calls.count(False) > 6
    assert "log" not in vars(module)
    sizes = [row["size"] for row in rows(tmp_path) if row["size"]]
    assert len(sizes) == 6
