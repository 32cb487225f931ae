"""`vla eval`: accuracy of a trained model."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from ..data import Normalize, Pictures, PictureStream, open_pictures
from ..data.sources import Relabelled
from ..errors import UserError
from ..train import ModelSpec, RunFolder, TrainConfig, open_model
from ..train.config import parse_pairs
from ..train.evaluate import evaluate, make_eval_loader
from ..train.run import atomic_file
from ..train.runtime import Runtime
from ..train.weights import imagenet_classes
from .app import app, examples, out
from .progress import progress_bar
from .train import report_unreadable

Model = Annotated[str, typer.Option("--model", "-m", help="Run folder, its model.safetensors, or a model name.")]
Checkpoint = Annotated[
    str | None, typer.Option(help="Weights for a model name; its published ones by default.", show_default=False)
]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Input size in pixels; the model's own by default.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, …; the best that there is by default.")]


@app.command(
    "eval",
    epilog=examples(
        "vla eval --model runs/vmamba_atto-digits",
        "vla eval --model vmamba_tiny_s1l8 --data imagenet/ --workers 8 --amp bf16",
        "vla eval --model vmamba_tiny_s1l8 --checkpoint weights.pth --data imagenet/ --out result.json",
    ),
)
def eval_command(
    model: Model,
    data: Annotated[str | None, typer.Option("--data", "-d", help="As for vla train; a run's own by default.")] = None,
    checkpoint: Checkpoint = None,
    data_root: Annotated[str | None, typer.Option(help="Where a set that timm reads lies.")] = None,
    split: Annotated[str | None, typer.Option(help="Name of the split, where it is not the usual one.")] = None,
    data_kwargs: Annotated[list[str] | None, typer.Option(help="Further create_dataset argument key=value.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Download the set, where timm can.")] = False,
    img_size: ImageSize = None,
    crop_pct: Annotated[float | None, typer.Option(help="Centre crop; the model's own by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per batch.")] = 128,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 0,
    device: Device = None,
    amp: Annotated[Literal["none", "bf16", "fp16"], typer.Option(help="Mixed precision.")] = "none",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Channels-last memory layout.")] = False,
    result: Annotated[Path | None, typer.Option("--out", "-o", help="Write the result to this JSON file.")] = None,
) -> None:
    """Measure top-1 and top-5 accuracy of a model on the validation pictures."""
    runtime = Runtime.create(device, amp, channels_last)
    network, spec = open_model(model, checkpoint, img_size)
    if crop_pct is not None:
        if crop_pct <= 0:
            raise UserError(f"crop_pct: {crop_pct}, wanted more than 0")
        spec.crop_pct = crop_pct
    given = {"root": data_root, "split_name": split, "options": parse_pairs("data_kwargs", data_kwargs or [])}
    source, options = _data_options(model, data, given)
    pictures = open_pictures(source, "validation", mode=spec.mode, download=download, batch_size=batch_size, **options)
    pictures = _match_classes(pictures, spec, source)
    loader = make_eval_loader(pictures, spec, batch_size, workers, runtime)
    network = runtime.place(network)
    normalize = Normalize(spec.mean, spec.std).to(runtime.device)
    with progress_bar() as progress:
        task = progress.add_task("evaluating", total=len(pictures) or None)
        accuracy = evaluate(network, pictures, loader, normalize, runtime, lambda count: progress.advance(task, count))
    runtime.close()
    if not runtime.is_main:
        return
    if result is not None:
        values = {"model": model, "data": source, **asdict(accuracy)}
        with atomic_file(result) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    table = Table(title=f"{model} on {source}", show_header=False)
    table.add_row("top-1", f"[bold]{accuracy.top1:.2f} %[/bold]")
    table.add_row("top-5", f"{accuracy.top5:.2f} %")
    table.add_row("loss", f"{accuracy.loss:.4f}")
    table.add_row("pictures", f"{accuracy.count:,} at {spec.input_size[-1]} px")
    out.print(table)
    report_unreadable(accuracy.unreadable)


def _match_classes(pictures: Pictures | PictureStream, spec: ModelSpec, source: str) -> Pictures | PictureStream:
    """Number the classes as the model does, by their names, so that a set may lack some of them."""
    ours, theirs = spec.classes, pictures.classes
    if ours is None or theirs is None or ours == theirs or isinstance(pictures, PictureStream):
        return pictures
    imagenet = ours == imagenet_classes(len(ours))
    for names in (ours, imagenet_classes(len(ours), words=False) if imagenet else None):
        if names is not None and set(theirs) <= set(names):
            return Relabelled(pictures, names)
    if imagenet and len(theirs) == len(ours):
        return pictures
    unknown = [name for name in theirs if name not in ours]
    raise UserError(f"data: {source} has classes that the model has not: {', '.join(unknown[:5])}")


def _data_options(model: str, data: str | None, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Source of the pictures, and how to open it: as the run's configuration says, unless told otherwise."""
    config = _run_config(model)
    options = {name: value for name, value in given.items() if value}
    if config is None or (data is not None and data != config.data):
        if data is None:
            raise UserError("data: missing; only a run folder knows its own, give --data")
        # A folder without a split of its own is all for this.
        return data, {"holdout": 1.0} | options
    own = {
        "root": config.data_root,
        "split_name": config.val_split,
        "holdout": config.holdout,
        "options": config.data_kwargs,
    }
    return config.data, own | options


def _run_config(model: str) -> TrainConfig | None:
    path = Path(model).expanduser()
    folder = RunFolder(path.parent if path.is_file() else path)
    return folder.load_config() if path.exists() and folder.config_file.exists() else None
