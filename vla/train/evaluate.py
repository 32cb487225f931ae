"""How good a model is on a set of pictures."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data import Normalize, Pictures, PictureStream, eval_loader
from ..data.seeds import Stream, seed_all
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


def evaluate(
    model: nn.Module,
    pictures: Pictures | PictureStream,
    loader: DataLoader,
    normalize: Normalize,
    runtime: Runtime,
    advance: Callable[[int], None] = lambda count: None,
) -> Accuracy:
    """Measure a classifier.

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

    def measure(images: Tensor, targets: Tensor) -> list[Tensor]:
        logits = model(images).float().cpu()
        if targets.max() >= logits.shape[1]:
            raise UserError(f"data: class {int(targets.max())} but the model has {logits.shape[1]} classes")
        best = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        return [F.cross_entropy(logits, targets, reduction="sum"), best[:, 0].sum(), best.sum()]

    (loss, top1, top5), count, names = _mean_over(model, pictures, loader, normalize, runtime, advance, measure, 3)
    return Accuracy(loss, 100 * top1, 100 * top5, count, names)


def evaluate_reconstruction(
    model: nn.Module,
    pictures: Pictures | PictureStream,
    loader: DataLoader,
    normalize: Normalize,
    runtime: Runtime,
    seed: int,
) -> tuple[float, int, list[str]]:
    """Measure a masked autoencoder, with the same masks at every call.

    Args:
        model: Gives a tuple that starts with its loss.
        pictures: What `loader` reads, to name unreadable ones.
        loader: From `make_eval_loader`.
        normalize: The model's input normalisation, on its device.
        runtime: Device and precision.
        seed: Seed of the masks.

    Returns:
        Mean loss, number of pictures, names of the unreadable ones.

    Raises:
        UserError: When no picture can be read.
    """
    seed_all(seed, Stream.VALIDATION, device=runtime.device)

    def measure(images: Tensor, targets: Tensor) -> list[Tensor]:
        return [model(images)[0].float().cpu() * len(images)]

    (loss,), count, names = _mean_over(model, pictures, loader, normalize, runtime, lambda count: None, measure, 1)
    return loss, count, names


@torch.inference_mode()
def _mean_over(
    model: nn.Module,
    pictures: Pictures | PictureStream,
    loader: DataLoader,
    normalize: Normalize,
    runtime: Runtime,
    advance: Callable[[int], None],
    measure: Callable[[Tensor, Tensor], list[Tensor]],
    figures: int,
) -> tuple[list[float], int, list[str]]:
    """Means over all readable pictures of the sums that `measure` gives for a batch, their number, the rest."""
    training = model.training
    model.eval()
    sums = torch.zeros(figures + 1, dtype=torch.float64)
    unreadable: list[str] = []
    for images, targets, broken in loader:
        unreadable += [pictures.name(int(index)) for index in broken[broken >= 0]]
        readable = targets >= 0
        advance(len(targets))
        if not readable.any():
            continue
        with runtime.autocast():
            batch = measure(normalize(runtime.place_images(images[readable])), targets[readable])
        sums += torch.stack([*batch, readable.sum()]).double()
    model.train(training)

    # NCCL sums on the GPU only; float32 counts exactly up to 16 M pictures, and MPS has no float64.
    *totals, count = runtime.sum(sums.to(runtime.device, torch.float32)).tolist()
    if count == 0:
        raise UserError("data: no picture to validate on can be read")
    names = sorted({name for part in runtime.gather(unreadable) for name in part})
    return [total / count for total in totals], int(count), names
