"""`vla train`: its options are the fields of the configuration."""

import dataclasses
import inspect
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..errors import UserError
from ..train import RunFolder, TrainConfig, train
from ..train.config import changed_fields, parse_pairs, read_options
from .app import app, complain, examples, out
from .progress import ProgressReporter

# What may change when a run goes on: none of it changes the weights.
_RESUMABLE = ("device", "download", "data_root", "save_steps", "workers")
_SHOWN_UNREADABLE = 10


def train_command(
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Options from this YAML file; those given here override it.")
    ] = None,
    run: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder.", show_default="runs/MODEL-DATA")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out; start it if it has saved nothing yet.")
    ] = False,
    **options: Any,
) -> None:
    """Train a model on a set of pictures.

    The run folder holds the configuration, the metrics, their curves, the weights (model.safetensors) and the state
    from which --resume goes on. Several GPUs: torchrun --nproc-per-node 8 -m vla train …
    """
    given = {} if config_file is None else read_options(config_file)
    given |= _parse_options(options)
    if resume and run is None:
        raise UserError("resume: say which run, with --out")
    if resume and RunFolder(run).config_file.exists():
        config = _resumed_config(RunFolder(run), given)
    else:
        config = TrainConfig.create(given)
    folder = run or _fresh_folder(config)

    with ProgressReporter() as reporter:
        finished = train(config, folder, resume, reporter)
    if reporter.trainer is not None:
        _summarise(finished, reporter)


def _parse_options(options: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None and value != []}
    return {k: parse_pairs(k, v) if k.endswith("_kwargs") else v for k, v in given.items()}


def _resumed_config(folder: RunFolder, given: dict[str, Any]) -> TrainConfig:
    config = folder.load_config()
    changed = changed_fields(config, given)
    for name in changed:
        if name not in _RESUMABLE:
            was, now = getattr(config, name), given[name]
            raise UserError(f"resume: {name} is {was!r} in {folder.path}, not {now!r}; leave it out or start a new run")
    return dataclasses.replace(config, **{name: given[name] for name in changed})


def _fresh_folder(config: TrainConfig) -> Path:
    data = Path(config.data).name or "data"
    base = Path("runs") / f"{config.model.replace('/', '-')}-{data}"
    folder, count = base, 1
    while folder.exists():
        count += 1
        folder = base.with_name(f"{base.name}-{count}")
    return folder


def _summarise(folder: RunFolder, reporter: ProgressReporter) -> None:
    trainer = reporter.trainer
    row = trainer.history[-1]
    seconds = sum(epoch["seconds"] for epoch in trainer.history)
    table = Table(title=f"{trainer.config.model} on {trainer.config.data}", show_header=False)
    if "val_top1" in row:
        table.add_row("validation top-1", f"[bold]{row['val_top1']:.2f} %[/bold] of {row['val_count']:,} pictures")
        table.add_row("validation top-5", f"{row['val_top5']:.2f} %")
    table.add_row("validation loss", f"{row['val_loss']:.4f}")
    table.add_row("epochs, updates", f"{row['epoch']}, {row['step']:,}")
    table.add_row("training time", f"{seconds / 60:.1f} min" if seconds >= 100 else f"{seconds:.1f} s")
    table.add_row("weights", str(folder.weights_file))
    table.add_row("curves", str(folder.curves_file))
    out.print(table)
    report_unreadable(sorted(trainer.unreadable))


def report_unreadable(names: list[str]) -> None:
    """Count and name the pictures that could not be read."""
    if not names:
        return
    more = len(names) - _SHOWN_UNREADABLE
    shown = ", ".join(names[:_SHOWN_UNREADABLE]) + (f" and {more} more" if more > 0 else "")
    complain(f"{len(names)} unreadable {'picture' if len(names) == 1 else 'pictures'} left out: {shown}")


def _option_type(hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if hint is dict or origin is dict:
        return list[str] | None
    return hint if origin in (types.UnionType, typing.Union) else hint | None


def _option(field: dataclasses.Field) -> Any:
    flag = f"--{field.name.replace('_', '-')}"
    default = field.default
    if isinstance(default, bool):
        flag = f"{flag}/--no-{flag[2:]}"
    elif isinstance(default, tuple):
        default = " ".join(f"{number:.3g}" for number in default)
    help = field.metadata["help"]
    if default not in (None, "", False, dataclasses.MISSING):
        help += rf" [dim]\[default: {'on' if default is True else default}][/dim]"
    flags = {"model": (flag, "-m"), "data": (flag, "-d")}.get(field.name, (flag,))
    return typer.Option(*flags, help=help, rich_help_panel=field.metadata["panel"], show_default=False)


def _with_config_options(command: typing.Callable) -> typing.Callable:
    """Give a command that takes `**options` one optional parameter per field of the configuration."""
    hints = typing.get_type_hints(TrainConfig)
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    own = [p.replace(kind=p.KEYWORD_ONLY) for p in own]
    added = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_option_type(hints[field.name]), _option(field)],
        )
        for field in dataclasses.fields(TrainConfig)
    ]
    command.__signature__ = inspect.Signature(added + own)
    command.__annotations__ = {p.name: p.annotation for p in added + own}
    return command


app.command(
    "train",
    epilog=examples(
        "vla train --model vmamba_atto --data digits",
        "vla train -m vmamba_tiny_s1l8 -d imagenet/ --epochs 300 --batch-size 128 --amp bf16 --workers 8 --ema 0.9999",
        "vla train -m vmamba_tiny_s1l8 --pretrained -d pets/ --epochs 20 --lr 1e-4 --layer-decay 0.8",
        "vla train -m vmamba_atto -d hfds/uoft-cs/cifar10 --val-split test --data-kwargs input_key=img",
        "vla train -m groupmamba_atto -d digits --teacher runs/vmamba_atto-digits",
        "vla train -m mae_vrwkv_atto -d digits --out runs/mae",
        "vla train -m vrwkv_atto -d digits --checkpoint runs/mae",
        "vla train --out runs/vmamba_atto-digits --resume",
    ),
)(_with_config_options(train_command))
