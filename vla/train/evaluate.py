"""Accuracy of a model on a set of pictures."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from ..data import Normalize, Pictures, PictureStream, eval_loader
from ..errors import UserError
from .runtime import Runtime
from .weights import ModelSpec


@dataclass
class Accuracy:
    """Mean loss, top-1 and top-5 accuracy in percent, over `count` pictures."""

    loss: float
    top1: float
    top5: float
    count: int
    unreadable: list[str]


def make_eval_loader(
    pictures: Pictures | PictureStream, spec: ModelSpec, batch_size: int, workers: int, runtime: Runtime
) -> DataLoader:
    """Loader of one process's part of the pictures, as the model wants them."""
    return eval_loader(
        pictures, spec.transform(), batch_size, workers=workers, rank=runtime.rank, world_size=runtime.world_size
    )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    pictures: Pictures | PictureStream,
    loader: DataLoader,
    normalize: Normalize,
    runtime: Runtime,
    advance: Callable[[int], None] = lambda count: None,
) -> Accuracy:
    """Measure a model.

    Args:
        model: Gives logits (B, num_classes).
        pictures: What `loader` reads, to name unreadable ones.
        loader: From `make_eval_loader`.
        normalize: The model's input normalisation, on its device.
        runtime: Device and precision.
        advance: Called with the number of pictures after each batch.

    Raises:
        UserError: When no picture can be read.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    unreadable: list[str] = []
    for images, targets, broken in loader:
        unreadable += [pictures.name(int(index)) for index in broken[broken >= 0]]
        readable = targets >= 0
        advance(len(targets))
        if not readable.any():
            continue
        with runtime.autocast():
            logits = model(normalize(runtime.place_images(images[readable]))).float().cpu()
        targets = targets[readable]
        if targets.max() >= logits.shape[1]:
            raise UserError(f"data: class {int(targets.max())} but the model has {logits.shape[1]} classes")
        best = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        sums += torch.stack([loss, best[:, 0].sum(), best.sum(), torch.tensor(len(targets))]).double()
    model.train(training)

    # NCCL sums on the GPU only; float32 counts exactly up to 16 M pictures, and MPS has no float64.
    loss, top1, top5, count = runtime.sum(sums.to(runtime.device, torch.float32)).tolist()
    if count == 0:
        raise UserError("data: no picture to validate on can be read")
    names = sorted({name for part in runtime.gather(unreadable) for name in part})
    return Accuracy(loss / count, 100 * top1 / count, 100 * top5 / count, int(count), names)
