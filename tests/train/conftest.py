"""A picture folder small enough to train on in a second."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Three classes of coloured noise, 12 pictures each to train on and 4 to validate."""
    path = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for channel, name in enumerate(("red", "green", "blue")):
            (path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 80
                Image.fromarray(pixels).save(path / split / name / f"{i}.png")
    return path
