"""`vla predict`: what a picture shows."""

from itertools import chain, count
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from rich.table import Table

from ..data import Normalize
from ..data.sources import UNREADABLE
from ..errors import UserError
from ..train import ModelSpec, open_model
from ..train.run import atomic_file
from ..train.runtime import Runtime
from .annotate import annotate
from .app import app, complain, examples, out
from .evaluate import Checkpoint, Device, ImageSize, Model


@app.command(
    "predict",
    epilog=examples(
        "vla predict examples/digit.png --model runs/vmamba_atto-digits --out prediction.png",
        "vla predict *.jpg --model vmamba_tiny_s1l8 --topk 3",
    ),
)
def predict_command(
    images: Annotated[list[Path], typer.Argument(help="Pictures.", metavar="IMAGE...")],
    model: Model,
    checkpoint: Checkpoint = None,
    topk: Annotated[int, typer.Option(min=1, help="Classes to show.")] = 5,
    target: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the annotated picture here; for several pictures, a folder."),
    ] = None,
    img_size: ImageSize = None,
    device: Device = None,
) -> None:
    """Name the most probable classes of pictures."""
    runtime = Runtime.create(device)
    network, spec = open_model(model, checkpoint, img_size)
    network = runtime.place(network)
    targets = {} if target is None else _targets(images, target)
    broken = 0
    for path in images:
        try:
            with Image.open(path) as file:
                picture = file.convert(spec.mode)
        except UNREADABLE as error:
            broken += 1
            reason = "no such file" if isinstance(error, FileNotFoundError) else "cannot be read as a picture"
            complain(f"{path}: {reason}")
            continue
        best = _classify(network, picture, spec, runtime, topk)
        table = Table("class", "probability", title=str(path))
        for name, probability in best:
            table.add_row(name, f"{100 * probability:.2f} %")
        out.print(table)
        if target is not None:
            _write(picture, best, targets[path])
    if broken:
        raise typer.Exit(1)


def _targets(images: list[Path], target: Path) -> dict[Path, Path]:
    """Where each annotated picture goes: pictures of one name in different folders get numbers."""
    if len(images) == 1:
        return {images[0]: target}
    taken: dict[Path, Path] = {}
    for path in dict.fromkeys(images):
        names = chain([path.stem], (f"{path.stem}-{i}" for i in count(2)))
        files = (target / f"{name}.png" for name in names)
        taken[next(file for file in files if file not in taken)] = path
    return {path: file for file, path in taken.items()}


@torch.inference_mode()
def _classify(
    network: torch.nn.Module, picture: Image.Image, spec: ModelSpec, runtime: Runtime, topk: int
) -> list[tuple[str, float]]:
    normalize = Normalize(spec.mean, spec.std).to(runtime.device)
    pixels = normalize(runtime.place_images(spec.transform()(picture)[None]))
    probabilities = network(pixels)[0].float().softmax(0).cpu()
    values, indices = probabilities.topk(min(topk, len(probabilities)))
    names = [spec.classes[i] if spec.classes and i < len(spec.classes) else f"class {i}" for i in indices.tolist()]
    return list(zip(names, values.tolist(), strict=True))


def _write(picture: Image.Image, best: list[tuple[str, float]], path: Path) -> None:
    if path.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"out: {path} has no picture format; wanted a name such as {path.stem}.png")
    with atomic_file(path) as temporary:
        annotate(picture, best).save(temporary, format=Image.registered_extensions()[path.suffix.lower()])
    out.print(f"wrote {path}", highlight=False)
