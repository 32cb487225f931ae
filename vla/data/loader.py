"""Loaders: which picture comes when, transformed how. Batches are uint8; the device normalises them."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info
from torch.utils.data import Dataset as MapDataset

from ..errors import UserError
from .seeds import Stream, permutation, seed_all
from .sources import UNREADABLE, Pictures, PictureStream

Transform = Callable[[Image.Image], Tensor]
# (picture, class index, position of an unreadable picture or -1)
Item = tuple[Tensor, int, int]


class Normalize(nn.Module):
    """Turn uint8 pixels into the model's input: `(x / 255 - mean) / std`, (B, C, H, W) float32.

    Args:
        mean: Mean per channel, in [0, 1].
        std: Standard deviation per channel.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).mul(255).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).mul(255).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.std


def keep_a_bit(transform: Callable) -> Callable:
    """The augmentation, in which timm's posterize leaves a bit where it would leave none, which Pillow 13 refuses."""
    for step in getattr(transform, "transforms", ()):
        for op in (*getattr(step, "ops", ()), *chain.from_iterable(getattr(step, "policy", ()))):
            if getattr(op, "aug_fn", None) is auto_augment.posterize:
                op.aug_fn = _posterize
    return transform


def _posterize(picture: Image.Image, bits: int, **options: Any) -> Image.Image:
    return auto_augment.posterize(picture, max(1, bits), **options)


class TrainPictures(MapDataset):
    """Augmented pictures by (epoch, position); an unreadable one is replaced by the next and reported.

    Args:
        pictures: Source.
        transform: Random transform to uint8 (C, H, W).
        seed: The run's seed.
    """

    def __init__(self, pictures: Pictures, transform: Transform, seed: int):
        self.pictures = pictures
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, wanted = key
        unreadable = -1
        for offset in range(len(self)):
            index = (wanted + offset) % len(self)
            try:
                picture, target = self.pictures[index]
            except UNREADABLE:
                unreadable = wanted
                continue
            seed_all(self.seed, Stream.AUGMENT, epoch, wanted)
            return self.transform(picture), target, unreadable
        raise unreadable_source(self.pictures)


def unreadable_source(pictures: Pictures) -> UserError:
    """The error for a source without a single readable picture."""
    return UserError(f"data: none of {len(pictures)} pictures can be read, the first is {pictures.name(0)}")


class EvalPictures(MapDataset):
    """Pictures by position; an unreadable one is blank, without a class (-1), and reported.

    Args:
        pictures: Source.
        transform: Transform to uint8 (C, H, W).
    """

    def __init__(self, pictures: Pictures, transform: Transform):
        self.pictures = pictures
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Item:
        try:
            picture, target = self.pictures[index]
        except UNREADABLE:
            return self.transform(Image.new(self.pictures.mode, (64, 64))), -1, index
        return self.transform(picture), target, -1


class StreamedPictures(IterableDataset):
    """Transformed pictures in stored order, augmented by their count in the worker.

    Args:
        stream: Source.
        transform: Transform to uint8 (C, H, W).
        seed: The run's seed.
    """

    def __init__(self, stream: PictureStream, transform: Transform, seed: int):
        self.stream = stream
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        self.stream.set_epoch(self.epoch)
        for count, (picture, target) in enumerate(self.stream):
            seed_all(self.seed, Stream.AUGMENT, self.epoch, worker.id if worker else 0, count)
            yield self.transform(picture), target, -1


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, position) for one process: a fresh permutation each epoch, from any batch on.

    Args:
        length: Number of pictures.
        batch_size: Pictures per batch and process.
        batches: Batches per epoch and process.
        seed: The run's seed.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(self, length: int, batch_size: int, batches: int, seed: int, rank: int = 0, world_size: int = 1):
        self.length = length
        self.batch_size = batch_size
        self.batches = batches
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.first = 0

    def __len__(self) -> int:
        return self.batches - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = permutation(self.length, self.seed, self.epoch)
        for batch in range(self.first, self.batches):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, int(index)) for index in order[start : start + self.batch_size]]


class TrainLoader:
    """Batches (uint8 images (B, C, H, W), classes (B,), unreadable positions (B,)) of any epoch, from any batch on.

    Args:
        pictures: Source.
        transform: Random transform to uint8 (C, H, W).
        batch_size: Pictures per batch and process; a smaller set gives smaller batches.
        group: The number of batches in an epoch is a multiple of it (gradient accumulation).
        even: Round the batch size down to an even number (mixup pairs pictures).
        seed: The run's seed.
        workers: Loader processes.
        rank: This process.
        world_size: Number of processes.

    Raises:
        UserError: When there are too few pictures for one batch, or none can be read.
    """

    def __init__(
        self,
        pictures: Pictures | PictureStream,
        transform: Transform,
        batch_size: int,
        *,
        group: int = 1,
        even: bool = False,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if isinstance(pictures, PictureStream):
            # timm's readers share a stream out themselves and count one process's part.
            world_size = 1
        batch_size = min(batch_size, len(pictures) // (world_size * group))
        batch_size -= batch_size % 2 if even else 0
        if batch_size < 1:
            raise UserError(f"data: {len(pictures)} training pictures are too few for one batch")
        self.batch_size = batch_size
        self.batches = len(pictures) // (batch_size * world_size) // group * group
        common = {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
        if isinstance(pictures, PictureStream):
            self.streamed = StreamedPictures(pictures, transform, seed)
            self.loader = DataLoader(self.streamed, batch_size=batch_size, drop_last=True, **common)
        else:
            # Fails here in one line rather than in a worker process with its traceback.
            TrainPictures(pictures, transform, seed)[0, 0]
            self.streamed = None
            self.sampler = EpochBatches(len(pictures), batch_size, self.batches, seed, rank, world_size)
            self.loader = DataLoader(
                TrainPictures(pictures, transform, seed),
                batch_sampler=self.sampler,
                persistent_workers=workers > 0,
                **common,
            )

    def epoch(self, epoch: int, first: int = 0) -> Iterator[list[Tensor]]:
        """The batches of one epoch from batch `first` on."""
        if self.streamed is None:
            self.sampler.epoch, self.sampler.first = epoch, first
            yield from self.loader
            return
        # A stream cannot be entered in the middle: what was trained on before an interruption is read again.
        self.streamed.epoch = epoch
        batch = -1
        for batch, items in zip(range(self.batches), self.loader, strict=False):
            if batch >= first:
                yield items
        if batch + 1 < self.batches:
            raise UserError(f"data: the stream ended after {batch + 1} of {self.batches} batches; check num_samples")


def eval_loader(
    pictures: Pictures | PictureStream,
    transform: Transform,
    batch_size: int,
    *,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Batches like `TrainLoader`'s, each picture once, in order; a process reads every `world_size`-th one."""
    common = {"batch_size": batch_size, "num_workers": workers, "pin_memory": torch.cuda.is_available()}
    if isinstance(pictures, PictureStream):
        return DataLoader(StreamedPictures(pictures, transform, seed=0), **common)
    return DataLoader(EvalPictures(pictures, transform), sampler=range(rank, len(pictures), world_size), **common)
