"""`vla bench`: how fast a model is on this machine."""

import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.table import Table
from torch import nn

from ..errors import UserError
from ..timing import Timing, environment, evaluation, measure, measure_latency, synchronize, training
from ..train import build_model
from ..train.run import atomic_file
from ..train.runtime import Runtime
from ..train.weights import has_fixed_size
from .app import app, complain, err, examples, out

PEERS = ("convnext_tiny", "swin_tiny_patch4_window7_224", "mambaout_tiny", "deit_small_patch16_224")


@app.command(
    "bench",
    epilog=examples(
        "vla bench vmamba_tiny_s1l8 --peers",
        "vla bench vrwkv_tiny vrwkv_small --compile --json speed.json",
        "vla bench vmamba_atto --device cpu --batch-size 4",
    ),
)
def bench_command(
    models: Annotated[list[str], typer.Argument(help="Model names, of timm too.", metavar="MODEL...")],
    peers: Annotated[bool, typer.Option("--peers", help=f"Also {', '.join(PEERS)}.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures per batch; 128 on a GPU, 4 on a CPU.", show_default=False)
    ] = None,
    img_size: Annotated[int, typer.Option(min=1, help="Input size in pixels.")] = 224,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, …; the best that there is by default.")] = None,
    amp: Annotated[
        Literal["none", "bf16", "fp16"] | None,
        typer.Option(help="Mixed precision; bf16 on a GPU, none on a CPU.", show_default=False),
    ] = None,
    channels_last: Annotated[bool, typer.Option(help="Channels-last memory layout.")] = True,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile the models.")] = False,
    train: Annotated[bool, typer.Option(help="Time training steps too.")] = True,
    seconds: Annotated[float, typer.Option(min=0.0, help="About how long each figure may take.")] = 4.0,
    result: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Measure a model's speed and memory on this machine, with random weights and pictures.

    Pictures a second in evaluation and training (forward, backward, no optimizer), the time of a single picture, peak
    memory, and what the first call costs, which is mostly the compilation of kernels.
    """
    kind = Runtime.create(device).device.type
    runtime = Runtime.create(device, amp or ("none" if kind == "cpu" else "bf16"), channels_last)
    batch_size = batch_size or (4 if kind == "cpu" else 128)
    names = dict.fromkeys((*models, *(PEERS if peers else ())))
    networks = {name: _build(name, img_size) for name in names}  # a wrong name is told before anything is timed

    rows: list[dict] = []
    for name in names:
        with err.status(f"{name}: measuring"):
            rows.append(_bench(name, networks.pop(name), runtime, batch_size, img_size, compiled, train, seconds))
            _free(runtime.device)  # the next model's peak is its own
    surroundings = environment(runtime.device)
    settings = {
        "img_size": img_size,
        "amp": str(runtime.amp_dtype or "none").removeprefix("torch."),
        "channels_last": channels_last,
        "compiled": compiled,
    }
    if result is not None:
        content = {"environment": surroundings, "settings": settings, "results": rows}
        with atomic_file(result) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    out.print(_table(rows, surroundings, settings))
    failed = [row for row in rows if "error" in row]
    for row in failed:
        complain(f"bench: {row['model']}: {row['error']}")
    if failed:
        raise typer.Exit(1)


def _build(name: str, img_size: int) -> nn.Module:
    model = build_model(name, **({"img_size": img_size} if has_fixed_size(name) else {}))
    if not isinstance(getattr(model, "num_classes", None), int):
        raise UserError(f"bench: {name} does not classify pictures")
    return model


def _bench(
    name: str,
    model: nn.Module,
    runtime: Runtime,
    batch_size: int,
    img_size: int,
    compiled: bool,
    train: bool,
    seconds: float,
) -> dict:
    """All figures of one model; what cannot be measured has a reason instead."""
    row: dict = {"model": name, "parameters": sum(p.numel() for p in model.parameters())}
    try:
        model = runtime.place(model)
        channels = getattr(model, "in_chans", 3)
        single = runtime.place_images(torch.randn(1, channels, img_size, img_size))
        call = torch.compile(model) if compiled else model

        step = evaluation(call, single, runtime.autocast)
        synchronize(runtime.device)
        start = time.perf_counter()
        step()
        synchronize(runtime.device)
        row["first_call_s"] = time.perf_counter() - start
        row["latency_ms"] = 1e3 * measure_latency(step, runtime.device, seconds=seconds).median
        for kind, make in (("eval", evaluation), ("train", training))[: 1 + train]:
            batch, timing = _largest(make, call, single, runtime, batch_size, seconds)
            row |= {f"{kind}_batch": batch, f"{kind}_per_second": batch / timing.median}
            if timing.peak_memory is not None:
                row[f"{kind}_peak_gib"] = timing.peak_memory / 2**30
    except Exception as error:  # whatever a model, a compiler or a driver raises: the others are still of interest
        lines = str(error).strip().splitlines()
        row["error"] = lines[0] if lines else type(error).__name__
    return row


def _largest(
    make: Callable, model: nn.Module, single: torch.Tensor, runtime: Runtime, batch_size: int, seconds: float
) -> tuple[int, Timing]:
    """The time of a batch that fits in memory: as asked for, or halved until it does."""
    for batch in _halves(batch_size):
        try:
            images = runtime.place_images(single.expand(batch, -1, -1, -1))
            return batch, measure(make(model, images, runtime.autocast), runtime.device, seconds=seconds)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            images = None
            model.zero_grad(set_to_none=True)
            _free(runtime.device)
    raise AssertionError("unreachable")


def _halves(number: int) -> Iterator[int]:
    while number >= 1:
        yield number
        number //= 2


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _table(rows: list[dict], surroundings: dict, settings: dict) -> Table:
    mode = "compiled" if settings["compiled"] else "eager"
    layout = "channels last" if settings["channels_last"] else "contiguous"
    title = f"{surroundings['device']}, torch {surroundings['packages']['torch']}, {settings['img_size']} px"
    caption = f"{mode}, amp {settings['amp']}, {layout}"
    table = Table(title=title, caption=caption, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("model", overflow="fold")
    for heading in ("eval\nimg/s", "train\nimg/s", "\nbatch", "1 img\nms", "train\nGiB", "first\ncall s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if "error" in row:
            table.add_row(row["model"], "failed")
            continue
        batches = dict.fromkeys(row[key] for key in ("eval_batch", "train_batch") if key in row)
        table.add_row(
            row["model"],
            f"{row['eval_per_second']:.1f}",
            f"{row['train_per_second']:.1f}" if "train_per_second" in row else "-",
            " / ".join(map(str, batches)),
            f"{row['latency_ms']:.2f}",
            f"{row['train_peak_gib']:.2f}" if "train_peak_gib" in row else "-",
            f"{row['first_call_s']:.2f}",
        )
    return table
