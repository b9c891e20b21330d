"""What a run writes down: losses, speed, router statistics, and the curve of it all as a PNG."""

import csv
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from zoo.block import is_sum


def scalars(aux: dict[str, Tensor]) -> dict[str, float]:
    """The blocks' losses and statistics as scalars; a vector (load per expert) becomes one scalar an entry. Sums are
    for the blocks themselves, and those of one batch of one rank would tell nothing."""
    found: dict[str, float] = {}
    for name, value in aux.items():
        if is_sum(name):
            continue
        values = value.float().flatten().tolist()
        found |= {name: values[0]} if value.ndim == 0 else {f"{name}/{i}": each for i, each in enumerate(values)}
    return found


class Metrics(lightning.Callback):
    """Logs every `trainer.log_every_n_steps` optimizer steps: train/loss, tokens a second (validation and saving not
    counted), the rate, router losses and loads. Keeps the curves, through a resume too, and draws them at the end.
    """

    def __init__(self) -> None:
        self.train: list[list[float]] = []  # step, nats a token
        self.validation: list[list[float]] = []  # step, the objective's curve: bits a byte
        self.tokens_per_second = 0.0
        self._begin()

    def _begin(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self.before: float | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.tokens += batch["tokens"].numel()
        if self.before is not None:
            self.seconds += time.perf_counter() - self.before
        step = trainer.global_step
        if step % trainer.log_every_n_steps or trainer.fit_loop._should_accumulate():
            return
        loss = trainer.strategy.reduce(pl_module.last["loss"], reduce_op="mean")  # every rank comes here
        self.tokens_per_second = self.tokens * trainer.world_size / max(self.seconds, 1e-9)
        self._begin()
        metrics = {"train/loss": float(loss), "train/tokens_per_second": self.tokens_per_second}
        metrics["train/learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        if pl_module.gradient_norm is not None:
            metrics["train/gradient_norm"] = float(pl_module.gradient_norm)
        metrics |= scalars(pl_module.last["aux"])
        self.train.append([step, metrics["train/loss"]])
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
            logger.save()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        value = trainer.callback_metrics.get(pl_module.objective.curve)
        if trainer.state.fn == "fit" and not trainer.sanity_checking and value is not None:
            self.validation.append([trainer.global_step, float(value)])

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run and (self.train or self.validation):
            path = Path(trainer.default_root_dir) / "loss.png"
            plot(self.train, self.validation, path, pl_module.objective.label)

    def state_dict(self) -> dict[str, Any]:
        return {"train": self.train, "validation": self.validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train, self.validation = state_dict["train"], state_dict["validation"]


def plot(train: list[list[float]], validation: list[list[float]], path: Path, label: str = "bits/byte") -> None:
    """Draw the loss curves: training in nats a token on the left axis, validation on the right in what `label` says."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no global state of pyplot
    left = figure.add_subplot()
    left.set_xlabel("step")
    left.set_ylabel("training loss (nats a token)", color="tab:blue")
    if train:
        left.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1)
    if validation:
        right = left.twinx()
        right.set_ylabel(f"validation ({label})", color="tab:orange")
        right.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", markersize=3)
    figure.savefig(path, dpi=120)


class RunCSV(CSVLogger):
    """`metrics.csv` in the run's folder itself. A resumed run goes on in the file, from the step it resumes at."""

    def __init__(self, folder: Path, resumed_at: int | None):
        super().__init__(str(folder), name="", version="")
        self.rows: list[dict[str, str]] = []
        path = folder / "metrics.csv"
        if resumed_at is not None and path.exists():
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= resumed_at]

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Experiment logs directory")
                writer = super().experiment  # deletes the file: what stays of it is written again
            for row in self.rows:
                kept = {name: float(value) for name, value in row.items() if value and name != "step"}
                writer.log_metrics(kept, int(row["step"]))
            writer.save()
        return self._experiment


def loggers(folder: Path, resumed_at: int | None) -> list[Any]:
    """metrics.csv and a TensorBoard event file, both in the run's folder."""
    return [RunCSV(folder, resumed_at), TensorBoardLogger(str(folder), name="", version="tensorboard")]
