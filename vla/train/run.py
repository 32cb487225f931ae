"""The run folder: what a training run leaves behind, every file whole or not there."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .config import TrainConfig


class RunFolder:
    """Files of one training run.

    `config.yaml` is the exact configuration, `metrics.jsonl` one line per epoch, `curves.png` their plot,
    `model.safetensors` the weights with what is needed to use them, and `state.pt` everything that resuming needs.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.curves_file = self.path / "curves.png"
        self.weights_file = self.path / "model.safetensors"
        self.state_file = self.path / "state.pt"

    def create(self, config: TrainConfig) -> None:
        """Make the folder and write the configuration.

        Raises:
            UserError: When the folder already holds a run.
        """
        if self.config_file.exists():
            raise UserError(f"out: {self.path} already holds a run; go on with --resume, or choose another --out")
        with atomic_file(self.config_file) as temporary:
            temporary.write_text(config.to_yaml(), encoding="utf-8")

    def load_config(self) -> TrainConfig:
        """Read the configuration."""
        return TrainConfig.load(self.config_file)

    def save_state(self, state: dict[str, Any]) -> None:
        """Replace the training state: tensors and plain values only, so that loading it runs no code."""
        with atomic_file(self.state_file) as temporary, temporary.open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:
                # torch's closing of the unfinished archive hides why the write failed.
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    def load_state(self) -> dict[str, Any] | None:
        """Read the training state onto the CPU; None when nothing was saved yet.

        Raises:
            UserError: When the file is damaged.
        """
        if not self.state_file.exists():
            return None
        try:
            return torch.load(self.state_file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError, … by where the damage is
            raise UserError(f"resume: {self.state_file} is damaged; delete it to start this run again") from error

    def save_metrics(self, history: list[dict[str, Any]], curves: bool = True) -> None:
        """Write the metrics of all epochs so far, and their plot."""
        with atomic_file(self.metrics_file) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
        if curves and history:
            with atomic_file(self.curves_file) as temporary:
                plot_curves(history, temporary)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; afterwards it takes the place of `path` in one step, or vanishes on an error.

    The temporary name is fixed, so what a killed process left is overwritten by the next one. The folder is made.

    Raises:
        UserError: When it cannot be written, a full disk above all; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; the file is as it was before") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync_folder(path: Path) -> None:
    # The renaming itself must reach the disk. Windows cannot open folders, and needs no such call.
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def plot_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Plot loss, accuracy and learning rate over the epochs into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in history]
    for key, label in (("train_loss", "training"), ("val_loss", "validation")):
        loss.plot(epochs, [row[key] for row in history], label=label)
    for key, label in (("val_top1", "top-1"), ("val_top5", "top-5")):
        if key in history[0]:
            accuracy.plot(epochs, [row[key] for row in history], label=label)
    rate.plot(epochs, [row["lr"] for row in history], color="tab:gray")
    for axes, title in ((loss, "Loss"), (accuracy, "Validation accuracy (%)"), (rate, "Learning rate")):
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    loss.legend(frameon=False)
    if "val_top1" in history[0]:
        accuracy.legend(frameon=False, loc="lower right")
    figure.savefig(path, format="png", dpi=120)
