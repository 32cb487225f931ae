"""Reference values and the deterministic weights and inputs that belong to them.

Every weight is a function of its official name and shape, so that a reference value needs no stored weights.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "golden"


def fill_tensor(name: str, shape) -> np.ndarray:
    """Standard normal float32 values determined by `name`."""
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    return rng.standard_normal(size=tuple(shape)).astype(np.float32)


def fill_param(name: str, shape) -> np.ndarray:
    """Value of the parameter or buffer `name`: scaled like a trained one."""
    shape = tuple(shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    x = fill_tensor(name, shape)
    if leaf == "running_var":
        x = 1 + 0.1 * np.abs(x)
    elif leaf == "running_mean":
        x = 0.1 * x
    elif len(shape) >= 2:
        x = x / np.sqrt(int(np.prod(shape[1:])))
    elif leaf == "weight":
        x = 1 + 0.1 * x
    else:
        x = 0.1 * x
    return x.astype(np.float32)


def fill_state_dict(shapes: dict) -> dict[str, torch.Tensor]:
    """State dict for `{official name: shape}`."""
    return {name: torch.from_numpy(np.asarray(fill_param(name, shape))) for name, shape in shapes.items()}


def image(batch: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    """The input picture of a reference value."""
    return torch.from_numpy(fill_tensor(f"image:{batch}x{channels}x{height}x{width}", (batch, channels, height, width)))


def load(family: str, name: str) -> dict[str, torch.Tensor]:
    """Arrays of the reference file `name` of a family, as stored (float32 or float64)."""
    with np.load(DATA / family / name) as data:
        return {key: torch.from_numpy(data[key]) for key in data.files if data[key].dtype.kind != "U"}


def index(family: str) -> dict:
    """Index of a family's reference files: configuration and official parameter shapes of each."""
    return json.loads((DATA / family / "index.json").read_text())


def load_names(family: str, name: str, key: str) -> list[str]:
    """Names that the reference file `name` of a family stores under `key`."""
    with np.load(DATA / family / name) as data:
        return [str(entry) for entry in data[key]]
