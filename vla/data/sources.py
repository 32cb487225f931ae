"""Where pictures come from. A source gives decoded, untransformed pictures with their class."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from timm.data.readers import create_reader
from torch.utils.data import Dataset

from ..errors import UserError, require_extra, suggest

Split = Literal["train", "validation"]
Mode = Literal["RGB", "L"]

# What PIL and the file system raise for a picture that cannot be read.
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError)

# What counts as a picture in a folder. timm's own list would leave out all but the first three without a word.
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")

_TIMM_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
_SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "eval", "evaluation", "test"),
}


class Pictures(ABC):
    """Pictures with classes, by position.

    Args:
        classes: Class names by index, or None when the source does not know them.
        mode: Colour mode of the pictures.
    """

    def __init__(self, classes: list[str] | None, mode: Mode):
        self.classes = classes
        self.mode = mode

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Picture and class index, -1 for an unlabelled picture; raises one of `UNREADABLE` for a broken one."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What the picture is called in a message."""


class Subset(Pictures):
    """The pictures of `source` at `indices`, in that order."""

    def __init__(self, source: Pictures, indices: np.ndarray):
        super().__init__(source.classes, source.mode)
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.source[int(self.indices[index])]

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))


class Relabelled(Pictures):
    """The pictures of `source` with the class indices of `classes`, by name; all its names must be among them."""

    def __init__(self, source: Pictures, classes: list[str]):
        super().__init__(classes, source.mode)
        self.source = source
        self.indices = [classes.index(name) for name in source.classes]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        picture, target = self.source[index]
        return picture, target if target < 0 else self.indices[target]

    def name(self, index: int) -> str:
        return self.source.name(index)


class DigitPictures(Pictures):
    """scikit-learn's 1797 scanned digits, 8x8 pixels of 17 grey levels."""

    def __init__(self, mode: Mode = "RGB"):
        require_extra("sklearn", "train", "the data set digits")
        from sklearn.datasets import load_digits

        super().__init__([str(digit) for digit in range(10)], mode)
        digits = load_digits()
        self.scans = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        self.targets = digits.target

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        # Enlarged here, so that a random crop can cut between the scan's few pixels.
        scan = Image.fromarray(self.scans[index]).resize((64, 64), Image.Resampling.BICUBIC)
        return scan.convert(self.mode), int(self.targets[index])

    def name(self, index: int) -> str:
        return f"digits/{index}"


class FolderPictures(Pictures):
    """Pictures under `path/<class>/`.

    Args:
        path: The folder.
        mode: Colour mode of the pictures.
        class_to_idx: Class indices, or None to number the folders by name.
    """

    def __init__(self, path: Path, mode: Mode = "RGB", class_to_idx: dict[str, int] | None = None):
        try:
            self.reader = create_reader("", root=str(path), class_map=class_to_idx, input_key=";".join(_PICTURES))
        except (RuntimeError, ValueError, OSError):
            raise UserError(f"data: no pictures in {path}; wanted {path}/<class>/<picture>") from None
        self.class_to_idx: dict[str, int] = self.reader.class_to_idx
        super().__init__(_names(self.class_to_idx), mode)
        if self.classes == [""]:
            raise UserError(f"data: {path} holds pictures but no class folders; wanted {path}/<class>/<picture>")
        self.path = path
        self.targets = np.array([target for _, target in self.reader.samples])

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        stream, target = self.reader[index]
        with stream:
            return Image.open(stream).convert(self.mode), target

    def name(self, index: int) -> str:
        return str(self.path / self.reader.filename(index))


class TimmPictures(Pictures):
    """A random-access data set from timm's `create_dataset`."""

    def __init__(self, dataset: Dataset, mode: Mode = "RGB"):
        super().__init__(_classes(dataset), mode)
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if isinstance(self.dataset, ImageDataset):
            # Past the data set's own __getitem__, which replaces an unreadable picture without a word.
            stream, target = self.dataset.reader[index][:2]
            with stream:
                picture = Image.open(stream).convert(self.mode)
        else:
            picture, target = self.dataset[index]
            picture = picture.convert(self.mode)
        return picture, -1 if target is None else int(target)

    def name(self, index: int) -> str:
        try:
            return self.dataset.filename(index)
        except (AttributeError, KeyError, NotImplementedError, TypeError):
            return f"picture {index}"


class PictureStream:
    """Pictures that can only be read in their stored order (WebDataset, streamed Hugging Face sets)."""

    def __init__(self, dataset: IterableImageDataset):
        self.dataset = dataset
        self.classes = _classes(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for picture, target in self.dataset:
            yield picture, -1 if target is None else int(target)

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of the next iteration."""
        self.dataset.set_epoch(epoch)


def open_pictures(
    data: str,
    split: Split,
    *,
    root: str | None = None,
    split_name: str | None = None,
    holdout: float = 0.1,
    mode: Mode = "RGB",
    download: bool = False,
    batch_size: int = 1,
    seed: int = 0,
    options: dict[str, Any] | None = None,
) -> Pictures | PictureStream:
    """Open one split of a data set.

    Args:
        data: `'digits'`; a folder with one sub-folder of pictures per class, or with such folders under `train` and
            `val`; or a name for timm's `create_dataset`: `torch/…`, `hfds/…`, `hfids/…`, `wds/…`, `tfds/…`.
        split: Which split.
        root: Folder where a set that timm reads lies or is to be stored.
        split_name: Name of the split in the source, when it is not the usual one.
        holdout: Part of each class held out for validation, where a folder has no split of its own; 1 for all. The
            split depends on the file names only, never on a seed.
        mode: Colour mode of the pictures.
        download: Download the set where timm can.
        batch_size: Hint for streamed sets.
        seed: Shuffle seed of streamed sets.
        options: Further arguments of `create_dataset` (`input_key`, `target_key`, `num_samples`, …).

    Raises:
        UserError: When the source cannot be opened or holds no classes.
    """
    if data in BUILTIN:
        splits = "train_split" if split == "train" else "val_split"
        for name, value in {"data_root": root, splits: split_name, "data_kwargs": options}.items():
            if value:
                raise UserError(f"{name}: {data} comes with the library and has no such option")
        return BUILTIN[data](split, mode)
    prefix = data.partition("/")[0].lower()
    if "/" not in data or prefix not in _TIMM_PREFIXES:
        return _open_folder(data, split, split_name, holdout, mode)

    if prefix in ("torch", "wds") and root is None:
        raise UserError(f"data_root: {data} needs the folder where it lies")
    if prefix in ("hfds", "hfids"):
        require_extra("datasets", "data", f"the data set {data}")
    if prefix == "wds":
        require_extra("webdataset", "data", f"the data set {data}")
    try:
        dataset = create_dataset(
            data,
            root=root,
            split=split_name or split,
            is_training=split == "train",
            download=download,
            batch_size=batch_size,
            seed=seed,
            input_img_mode=mode,
            **(options or {}),
        )
    except Exception as error:  # each library behind timm has its own, from missing files to a refused download
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"data: cannot open {data}, split {split_name or split}: {reason}") from error
    return PictureStream(dataset) if isinstance(dataset, IterableImageDataset) else TimmPictures(dataset, mode)


def _open_digits(split: Split, mode: Mode) -> Pictures:
    """1437 digits to train on and 360 to test on, the classes in proportion."""
    from sklearn.model_selection import train_test_split

    digits = DigitPictures(mode)
    train, test = train_test_split(np.arange(len(digits)), test_size=360, stratify=digits.targets, random_state=0)
    return Subset(digits, np.sort(train if split == "train" else test))


BUILTIN: dict[str, Callable[[Split, Mode], Pictures]] = {"digits": _open_digits}


def _open_folder(data: str, split: Split, split_name: str | None, holdout: float, mode: Mode) -> Pictures:
    path = Path(data).expanduser()
    if not path.exists():
        known = ", ".join(BUILTIN)
        raise UserError(f"data: {data!r} is neither a folder nor a known data set ({known}){suggest(data, BUILTIN)}")
    train = _split_folder(path, "train", split_name if split == "train" else None)
    validation = _split_folder(path, "validation", split_name if split == "validation" else None)

    if validation is None:
        pictures = FolderPictures(train or path, mode)
        return Subset(pictures, _hold_out(pictures.targets, holdout, split))
    if split == "validation":
        pictures = FolderPictures(validation, mode)
        if train is None:
            return pictures
        class_to_idx = FolderPictures(train).class_to_idx
        unknown = [name for name in pictures.classes if name not in class_to_idx]
        if unknown:
            raise UserError(f"data: {validation} has classes that {train} has not: {', '.join(unknown[:5])}")
        return FolderPictures(validation, mode, class_to_idx)
    if train is None:
        raise UserError(f"data: {path} has the folder {validation.name} but no train folder")
    return FolderPictures(train, mode)


def _split_folder(path: Path, split: Split, name: str | None) -> Path | None:
    if name is None:
        return next((path / usual for usual in _SPLIT_FOLDERS[split] if (path / usual).is_dir()), None)
    if not (path / name).is_dir():
        raise UserError(f"data: {path} has no folder {name!r}")
    return path / name


def _hold_out(targets: np.ndarray, part: float, split: Split) -> np.ndarray:
    held_out = np.zeros(len(targets), dtype=bool)
    for target in np.unique(targets):
        members = np.random.default_rng(0).permutation(np.flatnonzero(targets == target))
        # At least one to validate on, but never a class's only picture, unless nothing is for training.
        most = len(members) if part == 1 else len(members) - 1
        held_out[members[: min(max(round(len(members) * part), 1), most)]] = True
    return np.flatnonzero(held_out if split == "validation" else ~held_out)


def _classes(dataset: Dataset) -> list[str] | None:
    class_to_idx = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    return _names(class_to_idx) if class_to_idx else None


def _names(class_to_idx: dict[str, int]) -> list[str]:
    return sorted(class_to_idx, key=class_to_idx.get)


# timm reports every scan of a folder at INFO; what a stream skips is a warning and stays visible.
logging.getLogger("timm.data").setLevel(logging.WARNING)
