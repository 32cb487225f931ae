"""What a loader gives depends on seed, epoch and position only: not on workers, processes or where it was entered."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from vla.data import Normalize, TrainLoader, eval_loader, open_pictures
from vla.data.loader import TrainPictures
from vla.data.sources import Pictures
from vla.errors import UserError


class Numbered(Pictures):
    """Pictures whose pixels say which they are; those in `broken` cannot be read."""

    def __init__(self, length, broken=()):
        super().__init__(["even", "odd"], "RGB")
        self.length, self.broken = length, broken

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("broken")
        return Image.new("RGB", (8, 8), (index, index, index)), index % 2

    def name(self, index):
        return f"number {index}"


AUGMENT = create_transform(8, is_training=True, hflip=0.5, color_jitter=0.9, use_prefetcher=True)
PLAIN = create_transform(8, crop_pct=1.0, use_prefetcher=True)


def epoch(loader, *position):
    return [[part.clone() for part in batch] for batch in loader.epoch(*position)]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(y))


def test_workers_and_entry_point_do_not_matter():
    alone = TrainLoader(Numbered(50), AUGMENT, 8, seed=3)
    shared = TrainLoader(Numbered(50), AUGMENT, 8, seed=3, workers=2)
    whole = epoch(alone, 1)
    assert len(whole) == alone.batches == 6
    assert_equal(epoch(shared, 1), whole)
    assert_equal(epoch(shared, 1, 4), whole[4:])
    assert_equal(epoch(alone, 1, 5), whole[5:])


def test_epochs_and_seeds_differ():
    first = torch.cat([images for images, *_ in epoch(TrainLoader(Numbered(32), AUGMENT, 8, seed=0), 0)])
    for seed, number in ((0, 1), (1, 0)):
        other = torch.cat([images for images, *_ in epoch(TrainLoader(Numbered(32), AUGMENT, 8, seed=seed), number)])
        assert not torch.equal(first, other)


def test_processes_share_an_epoch():
    alone = epoch(TrainLoader(Numbered(48), PLAIN, 8, seed=5), 2)
    ranks = [epoch(TrainLoader(Numbered(48), PLAIN, 4, seed=5, rank=rank, world_size=2), 2) for rank in range(2)]
    for batch, first, second in zip(alone, *ranks, strict=True):
        assert torch.equal(batch[0], torch.cat([first[0], second[0]]))


@pytest.mark.parametrize(
    "length, batch_size, options, batches, size",
    [
        (50, 8, {}, 6, 8),
        (5, 8, {}, 1, 5),
        (5, 8, {"even": True}, 1, 4),
        (50, 8, {"group": 4}, 4, 8),
        (50, 64, {"group": 4}, 4, 12),
        (50, 8, {"world_size": 2}, 3, 8),
    ],
)
def test_batch_counts(length, batch_size, options, batches, size):
    loader = TrainLoader(Numbered(length), PLAIN, batch_size, **options)
    assert (loader.batches, loader.batch_size) == (batches, size)
    assert [len(images) for images, *_ in loader.epoch(0)] == [size] * batches


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_replaced_and_reported(workers):
    loader = TrainLoader(Numbered(20, broken=(3, 4, 11)), PLAIN, 5, workers=workers)
    images, labels, broken = (torch.cat(parts) for parts in zip(*epoch(loader, 0), strict=True))
    assert sorted(broken[broken >= 0].tolist()) == [3, 4, 11]
    # 3 and 4 both become 5, 11 becomes 12; labels follow the pictures.
    numbers = images[:, 0, 0, 0]
    assert np.bincount(numbers.numpy(), minlength=20)[[3, 4, 5, 11, 12]].tolist() == [0, 0, 3, 0, 2]
    assert torch.equal(labels, numbers.long() % 2)


def test_no_readable_picture_is_one_line():
    with pytest.raises(UserError, match="none of 4 pictures can be read, the first is number 0"):
        TrainLoader(Numbered(4, broken=range(4)), PLAIN, 2)
    with pytest.raises(UserError, match="1 training pictures are too few"):
        TrainLoader(Numbered(1), PLAIN, 2, world_size=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_each_picture_once(workers):
    parts = [eval_loader(Numbered(11, (4,)), PLAIN, 3, workers=workers, rank=r, world_size=2) for r in range(2)]
    images, labels, broken = (torch.cat(p) for p in zip(*(b for loader in parts for b in loader), strict=True))
    assert images[labels >= 0][:, 0, 0, 0].sort().values.tolist() == [i for i in range(11) if i != 4]
    assert broken[labels < 0].tolist() == [4]


def test_loaders_can_be_sent_to_new_processes(tmp_path):
    """Where processes are spawned and not forked, everything a worker needs is pickled."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    for data in ("digits", str(tmp_path)):
        for split, transform in (("train", AUGMENT), ("validation", PLAIN)):
            pictures = open_pictures(data, split)
            again = pickle.loads(pickle.dumps(TrainPictures(pictures, transform, 0)))
            assert torch.equal(again[1, 0][0], TrainPictures(pictures, transform, 0)[1, 0][0])


def test_normalize():
    normalize = Normalize((0.5, 0.4, 0.3), (0.2, 0.1, 0.3))
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.1, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(normalize(pixels), (pixels / 255 - mean) / std)
