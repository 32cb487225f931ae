"""Settings for every test: two threads at most, and uninitialised memory that shows."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels run on CPU tensors then, interpreted; it is read when a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True)
def poison_memory():
    """Fills `torch.empty` with NaN, so that reading memory nothing has written fails a test."""
    previous = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(previous[0])
    torch.utils.deterministic.fill_uninitialized_memory = previous[1]
