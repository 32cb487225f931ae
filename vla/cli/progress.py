"""Progress bars with rate and time left."""

import time
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import Tensor

from ..train import Reporter
from ..train.trainer import Trainer
from .app import err

# Seconds between two looks at the loss: looking makes a GPU wait for its queue.
_LOOK_INTERVAL = 0.5


class _ImageRate(ProgressColumn):
    """Pictures per second over the last updates."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed * task.fields.get('images', 1):,.0f} img/s", "cyan")


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A bar on the error stream; where that is no terminal, nothing is drawn."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _ImageRate(),
        *columns,
        TimeElapsedColumn(),
        TextColumn("left", style="dim"),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


class ProgressReporter(Reporter):
    """A bar over all updates of a run, and a line for each epoch."""

    def __init__(self) -> None:
        self.progress = progress_bar(TextColumn("loss {task.fields[loss]:.3f}"))
        self.trainer: Trainer | None = None
        self._looked = 0.0

    def __enter__(self) -> "ProgressReporter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()

    def begin(self, trainer: Trainer) -> None:
        # Started here, since of several processes only the main one gets as far as to report.
        self.progress.start()
        self.trainer = trainer
        config, runtime = trainer.config, trainer.runtime
        parameters = sum(p.numel() for p in trainer.model.parameters())
        processes = f" x {runtime.world_size}" if runtime.world_size > 1 else ""
        err.print(
            f"[bold]{config.model}[/bold] {parameters / 1e6:.2f} M parameters, {trainer.spec.input_size[-1]} px, on "
            f"{config.data}: {len(trainer.train_pictures):,} pictures to train on, {len(trainer.val_pictures):,} to "
            f"validate, {'no labels' if trainer.num_classes is None else f'{trainer.num_classes} classes'}; "
            f"{config.epochs} epochs on {runtime.device}{processes}",
            highlight=False,
        )
        if 0 < trainer.step < trainer.total_steps:
            err.print(f"going on after update {trainer.step} of {trainer.total_steps}", highlight=False)
        self.task = self.progress.add_task("training", total=trainer.total_steps, completed=trainer.step, loss=0.0)

    def step(self, step: int, loss: Tensor, images: int) -> None:
        self.progress.update(self.task, completed=step, images=images)
        if self.progress.disable or time.monotonic() - self._looked < _LOOK_INTERVAL:
            return
        self._looked = time.monotonic()
        epoch = (step - 1) // self.trainer.steps_per_epoch + 1
        description = f"epoch {epoch}/{self.trainer.config.epochs}"
        self.progress.update(self.task, description=description, loss=loss.item())

    def epoch(self, row: dict[str, Any]) -> None:
        accuracy = f"top-1 {row['val_top1']:.2f} %  " if "val_top1" in row else ""
        err.print(
            f"epoch {row['epoch']:>3}/{self.trainer.config.epochs}  loss {row['train_loss']:.4f}  validation loss "
            f"{row['val_loss']:.4f}  {accuracy}{row['images_per_second']:,.0f} img/s",
            highlight=False,
        )
