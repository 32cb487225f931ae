"""Randomness as a function of position, not of history.

Every random draw of a training run is seeded by what it is for: the order of an epoch by (seed, epoch), a picture's
augmentation by (seed, epoch, picture), a training step by (seed, step, rank). So neither the number of loader workers
nor an interruption can change a run, and no generator state has to be saved.
"""

import random
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """Independent purposes of randomness; the first key after the run's seed."""

    INIT = 0
    ORDER = 1
    AUGMENT = 2
    STEP = 3
    VALIDATION = 4


def seed_all(seed: int, stream: Stream, *position: int, device: torch.device | None = None) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators for one position of one stream.

    Args:
        seed: The run's seed, at least 0.
        stream: Purpose of the draws that follow.
        position: Where in the stream, each at least 0.
        device: Accelerator whose generator is seeded beside the CPU's.
    """
    words = np.random.SeedSequence((seed, stream, *position)).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    word = (int(words[2]) << 31) ^ int(words[3])
    # torch.manual_seed records a stack trace for each device not in use, which costs more than a picture.
    torch.default_generator.manual_seed(word)
    if device is not None and device.type != "cpu":
        getattr(torch, device.type).manual_seed(word)


def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the pictures in an epoch, int64 (length,)."""
    return np.random.default_rng((seed, Stream.ORDER, epoch)).permutation(length)
